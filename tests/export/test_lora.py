"""LoRA files, read by diffusers' own loaders or compared with original files made elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gralora_diffusion import AdapterFileError, get_family, inject
from gralora_diffusion.export import export_diff, export_lora
from gralora_diffusion.export.names import StyleError, find_names
from gralora_diffusion.io.file_names import WEIGHTS_NAME
from tests.models import PIPELINES, adapt_everywhere, config, merged
from tests.originals import ORIGINALS
from tests.reference import relative_error
from tests.tiny.parts import text_encoder_with_projection


def saved(name: str, folder: Path, components: Iterable[str] = (), **changes: Any) -> Path:
    """An adapter on every component of a tiny pipeline, or on these."""
    adapt_everywhere(PIPELINES[name](), components, **changes).save_gralora_weights(folder)
    return folder


#: Layers of another rank than the others, and of another k, which makes another rank of the LoRA.
MIXED = {
    "rank_pattern": {r"to_q|q_proj|SelfAttention\.q": 8},
    "k_pattern": {r"to_k|k_proj|SelfAttention\.k": 1},
}


def products(file: Path) -> dict[str, Tensor]:
    """Name -> update, as ComfyUI and sd-scripts compute it."""
    tensors, updates, alphas = load_file(file), {}, set()
    for key, down in tensors.items():
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            up, alpha = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.alpha"]
            assert alpha.dtype == torch.float32
            alphas.add(alpha.item())
            dense = up.double().flatten(1) @ down.double().flatten(1)
            updates[name] = (dense * alpha.item() / len(down)).reshape(len(up), *down.shape[1:])
    assert 3 * len(updates) == len(tensors)
    assert len(alphas) == 1  # others would be given to the wrong layers by diffusers
    return updates


def read_by_diffusers(name: str) -> list[str]:
    loadable = getattr(diffusers, get_family(name).pipeline_classes[0])._lora_loadable_modules
    return [c for c in get_family(name).components if c in loadable]


def weights(pipe: Any, components: Iterable[str]) -> dict[str, Tensor]:
    return {f"{c}.{key}": t for c in components for key, t in getattr(pipe, c).state_dict().items()}


@pytest.mark.parametrize("name", PIPELINES)
def test_stock_diffusers_fuses_the_same_update(name, tmp_path):
    components = read_by_diffusers(name)
    adapter = saved(name, tmp_path / "adapter", components, **MIXED)
    report = export_lora(adapter, tmp_path / "lora.safetensors", style="diffusers")
    pipe = PIPELINES[name]()
    base = weights(pipe, components)
    base = {key: tensor.clone() for key, tensor in base.items()}
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    pipe.fuse_lora(components=components)
    pipe.unload_lora_weights()
    expected = weights(merged([(adapter, 1.0)], PIPELINES[name]()), components)
    fused = weights(pipe, components)
    changed = [key for key in expected if not torch.equal(expected[key], base[key])]
    assert len(changed) == len(report.ranks)
    for key, value in expected.items():
        if key in changed:
            assert relative_error(fused[key] - base[key], value - base[key]) < 1e-4, key
        else:
            assert torch.equal(fused[key], value), key


@pytest.mark.parametrize("energy", [None, 0.8])
@pytest.mark.parametrize("name", PIPELINES)
def test_every_layer_has_its_rank_and_alpha_in_the_header(name, energy, tmp_path):
    """As PEFT reads them, whatever the version of diffusers concludes from the tensors."""
    components = read_by_diffusers(name)
    adapter, file = saved(name, tmp_path / "adapter", components, **MIXED), tmp_path / "x"
    report = export_lora(adapter, file, style="diffusers", energy=energy)
    with safe_open(file, "pt") as held:
        fields = json.loads(held.metadata()["lora_adapter_metadata"])
    configs = {
        component: LoraConfig(
            **{k.removeprefix(start): v for k, v in fields.items() if k.startswith(start)}
        )
        for component in components
        if (start := f"{component}.")
    }
    assert len(set(report.ranks.values())) > 1
    for key, rank in report.ranks.items():
        component, _, path = key.partition(".")
        config = configs[component]
        # transformers 4 has a level that 5 took out of some encoders
        for there in {path, path.removeprefix("text_model.")}:
            ranks, alphas = config.rank_pattern, config.alpha_pattern
            assert ranks.get(get_pattern_key(ranks, there), config.r) == rank
            assert alphas.get(get_pattern_key(alphas, there), config.lora_alpha) == rank
            assert check_target_module_exists(config, there)


#: Layers that ComfyUI 0.33 was seen not to name (``comfy.lora.model_lora_keys_unet``).
UNREAD = {
    "flux2": 7,
    "flux2-klein": 5,
    "flux": 0,
    "stable-diffusion-3": 0,
    "stable-diffusion": 32,
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_comfyui_passes_over_is_told(name, tmp_path):
    denoiser = get_family(name).denoiser
    pipe = PIPELINES[name]()
    paths = [path for path, m in getattr(pipe, denoiser).named_modules() if is_adaptable(m)]
    inject(getattr(pipe, denoiser), config(paths, r=4, gralora_k=2), "a")
    pipe.save_gralora_weights(tmp_path / "adapter")
    report = export_lora(tmp_path / "adapter", tmp_path / "lora.safetensors", style="diffusers")
    assert len(report.unread) == UNREAD[name]
    told = str(report).splitlines()[-1]
    assert told.startswith("for load_lora_weights of diffusers 0.36 and later")
    assert ("--style comfyui" in told) == bool(UNREAD[name])
    kohya = export_lora(tmp_path / "adapter", tmp_path / "kohya.safetensors", style="kohya")
    assert str(kohya).endswith("use --style diffusers for it")


def is_adaptable(module: nn.Module) -> bool:
    layers = isinstance(module, (nn.Linear, nn.Conv2d))
    return layers and not any(size % 2 for size in module.weight.shape[:2])


def updates_of_the_original(name: str, adapter: Path) -> dict[str, Tensor]:
    """Key of the original file -> what the adapter adds to it, by independent writers."""
    pipes = [PIPELINES[name](), merged([(adapter, 1.0)], PIPELINES[name]())]
    for pipe in pipes if name == "stable-diffusion-3" else ():
        torch.manual_seed(0)
        pipe.text_encoder = text_encoder_with_projection(32, 32)  # see tests/originals
        pipe.text_encoder.text_projection.weight.data.copy_(torch.eye(32))
    before, after = (ORIGINALS[name](pipe) for pipe in pipes)
    changed = [key for key in before if not torch.equal(after[key], before[key])]
    return {key: after[key].double() - before[key] for key in changed}


def updates_of_the_model(name: str, adapter: Path, components: list[str]) -> dict[str, Tensor]:
    """Component and key of the model -> what the adapter adds to it."""
    pipes = [PIPELINES[name](), merged([(adapter, 1.0)], PIPELINES[name]())]
    before, after = (weights(pipe, components) for pipe in pipes)
    changed = [key for key in before if not torch.equal(after[key], before[key])]
    return {key: after[key].double() - before[key] for key in changed}


@pytest.mark.parametrize("name", PIPELINES)
def test_kohya_names_and_rows_of_the_denoiser(name, tmp_path, saved_base):
    denoiser = get_family(name).denoiser
    adapter = saved(name, tmp_path / "adapter", [denoiser], **MIXED)
    base = saved_base(name)
    file = tmp_path / "lora.safetensors"
    export_lora(adapter, file, style="kohya", base=base)
    if name == "stable-diffusion":  # where sd-scripts has diffusers' names
        updates, prefix = updates_of_the_model(name, adapter, [denoiser]), "unet."
    else:
        updates, prefix = updates_of_the_original(name, adapter), "model.diffusion_model."
    paths = {key.removeprefix(prefix).removesuffix(".weight"): u for key, u in updates.items()}
    expected = {f"lora_unet_{path.replace('.', '_')}": u for path, u in paths.items()}
    found = products(file)
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert relative_error(found[key], value) < 1e-4, key


@pytest.mark.parametrize("kind", ["lora", "diff"])
@pytest.mark.parametrize("name", PIPELINES)
def test_comfyui_names_and_rows_of_the_denoiser(name, kind, tmp_path, saved_base):
    denoiser = get_family(name).denoiser
    adapter = saved(name, tmp_path / "adapter", [denoiser], **MIXED)
    base = saved_base(name)
    file = tmp_path / "lora.safetensors"
    if kind == "lora":
        export_lora(adapter, file, style="comfyui", base=base)
        found = products(file)
    else:
        export_diff(adapter, file, base=base, progress=False)
        found = {key.removesuffix(".diff"): tensor for key, tensor in load_file(file).items()}
    of_model = updates_of_the_model(name, adapter, [denoiser])
    of_original = {
        f"{key.removeprefix('model.').removesuffix('.weight')}": update
        for key, update in updates_of_the_original(name, adapter).items()
    }
    assert len(found) == len(of_model)
    for key, value in found.items():
        split = key.startswith("transformer.")
        expected = of_model[f"{key}.weight"] if split else of_original.pop(key)
        assert relative_error(value, expected) < 1e-4, key
    # the others are made of several layers of diffusers, which the file has one by one
    joined = ("qkv", "linear1") if name == "flux" else ("qkv",)
    assert all(key.endswith(joined) for key in of_original)


TEXT_ENCODERS = [  # names in sd-scripts, in ComfyUI
    ("stable-diffusion", "text_encoder", "lora_te", "clip_l"),
    ("stable-diffusion-xl", "text_encoder", "lora_te1", "clip_l"),
    ("stable-diffusion-xl", "text_encoder_2", "lora_te2", "clip_g"),
    ("stable-diffusion-3", "text_encoder", "lora_te1", "clip_l"),
    ("stable-diffusion-3", "text_encoder_2", "lora_te2", "clip_g"),
    ("stable-diffusion-3", "text_encoder_3", "lora_te3", "t5xxl"),
    ("flux", "text_encoder", "lora_te1", "clip_l"),
    ("flux", "text_encoder_2", "lora_te3", "t5xxl"),
]


@pytest.mark.parametrize(("name", "component", "kohya", "comfyui"), TEXT_ENCODERS)
def test_names_of_text_encoders(name, component, kohya, comfyui, tmp_path):
    adapter = saved(name, tmp_path / "adapter", [component], **MIXED)
    paths = {}
    for key, update in updates_of_the_model(name, adapter, [component]).items():
        path = key.removeprefix(f"{component}.").removesuffix(".weight")
        if "t5" not in comfyui and not path.startswith("text_model."):
            path = f"text_model.{path}"
        paths[path] = update
    names = {
        "kohya": lambda path: f"{kohya}_{path.replace('.', '_')}",
        "comfyui": lambda path: f"text_encoders.{comfyui}.transformer.{path}",
    }
    for style, named in names.items():
        export_lora(adapter, tmp_path / f"{style}.safetensors", style=style)
        found = products(tmp_path / f"{style}.safetensors")
        assert set(found) == {named(path) for path in paths}
        for path, update in paths.items():
            assert relative_error(found[named(path)], update) < 1e-4, path


@pytest.mark.parametrize(
    ("family", "width", "name"),
    [
        ("flux2", 5120, "mistral3_24b"),
        ("flux2-klein", 2560, "qwen3_4b"),
        ("flux2-klein", 4096, "qwen3_8b"),
    ],
)
def test_comfyui_names_of_language_models(family, width, name):
    shapes = {"layers.0.self_attn.q_proj.weight": (4096, width)}
    expected = f"text_encoders.{name}.transformer.model."
    assert get_family(family).comfyui_prefix("text_encoder", shapes) == expected
    names = find_names(get_family(family), "text_encoder", "comfyui", shapes)
    path = "layers.0.self_attn.q_proj"
    for own in (f"model.language_model.{path}", f"model.{path}", f"language_model.model.{path}"):
        assert names.name(get_family(family).canonical("text_encoder", own)) == expected + path


@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-xl"])
def test_kohya_names_read_by_diffusers(name, tmp_path, saved_base):
    components = read_by_diffusers(name)
    adapter = saved(name, tmp_path / "adapter", components, **MIXED)
    base = saved_base(name)
    file = tmp_path / "lora.safetensors"
    export_lora(adapter, file, style="kohya", base=base)
    pipe = PIPELINES[name]()
    pipe.load_lora_weights(file)
    pipe.fuse_lora(components=components)
    pipe.unload_lora_weights()
    expected = weights(merged([(adapter, 1.0)], PIPELINES[name]()), components)
    for key, value in weights(pipe, components).items():
        assert torch.allclose(value, expected[key], rtol=1e-6, atol=1e-7), key


def test_scale_dtype_truncation(tmp_path):
    adapter = saved("stable-diffusion", tmp_path / "adapter", ["text_encoder"], r=8, gralora_k=4)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("exact", "half", "cut", "energy")}
    export_lora(adapter, files["exact"])
    export_lora(adapter, files["half"], scale=0.5, dtype="fp16")
    cut = export_lora(adapter, files["cut"], rank=3)
    energy = export_lora(adapter, files["energy"], energy=0.9)
    exact = products(files["exact"])
    assert {t.dtype for k, t in load_file(files["half"]).items() if ".lora_" in k} == {torch.half}
    for name, update in products(files["half"]).items():
        assert relative_error(update, 0.5 * exact[name]) < 2e-3
    assert set(cut.ranks.values()) == {3}
    assert 3 < max(energy.ranks.values()) < 32
    for file, report in ((files["cut"], cut), (files["energy"], energy)):
        for name, update in products(file).items():
            path = name.removeprefix("text_encoders.clip_l.transformer.")
            left_out = torch.linalg.matrix_norm(exact[name] - update)
            error = left_out / torch.linalg.matrix_norm(exact[name])
            assert report.errors[f"text_encoder.{path}"] == pytest.approx(float(error), rel=1e-3)
            values = torch.linalg.svdvals(exact[name])
            best = values[report.ranks[name] :].square().sum().sqrt() / values.square().sum().sqrt()
            assert float(error) == pytest.approx(float(best), rel=1e-3)
            if file == files["energy"]:
                assert error**2 <= 0.1


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_an_adapter_stored_in_fp8(fp8, tmp_path):
    """Its values are those of fp8, but nothing is rounded to fp8 again."""
    folder = saved("stable-diffusion", tmp_path / "adapter", ["text_encoder"], hybrid_r=2)
    file = folder / WEIGHTS_NAME
    with safe_open(file, "pt") as held:
        metadata = held.metadata()
    stored = {key: tensor.to(fp8) for key, tensor in load_file(file).items()}
    save_file(stored, tmp_path / "fp8.safetensors", metadata)
    rounded = {key: tensor.float() for key, tensor in stored.items()}
    save_file(rounded, tmp_path / "fp32.safetensors", metadata)
    found = []
    for name in ("fp8", "fp32"):
        lora, diff = tmp_path / f"{name}.lora.safetensors", tmp_path / f"{name}.diff.safetensors"
        export_lora(tmp_path / f"{name}.safetensors", lora)
        export_diff(tmp_path / f"{name}.safetensors", diff, progress=False)
        found.append(load_file(lora) | load_file(diff))
    assert found[0].keys() == found[1].keys()
    for key, tensor in found[1].items():
        assert found[0][key].dtype == torch.float32
        assert torch.equal(found[0][key], tensor), key
    stored[next(iter(stored))].view(torch.uint8)[0] = 0x7F  # NaN in both
    save_file(stored, tmp_path / "fp8.safetensors", metadata)
    with pytest.raises(AdapterFileError, match="NaN or infinite values"):
        export_lora(tmp_path / "fp8.safetensors", tmp_path / "lora.safetensors")
    save_file({key: t.to(torch.complex64) for key, t in rounded.items()}, file, metadata)
    with pytest.raises(AdapterFileError, match=r"is torch\.complex64, which has no real numbers"):
        export_lora(file, tmp_path / "lora.safetensors")


def test_factors_of_several_dtypes_are_kept_in_one_that_holds_them_all(tmp_path):
    folder = saved("stable-diffusion", tmp_path / "adapter", ["text_encoder"])
    with safe_open(folder / WEIGHTS_NAME, "pt") as held:
        metadata = held.metadata()
    tensors = load_file(folder / WEIGHTS_NAME)
    for dtypes, kept in (
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.float64, torch.float64), torch.float32),
    ):
        mixed = {key: t.to(dtypes[n % 2]) for n, (key, t) in enumerate(tensors.items())}
        save_file(mixed, tmp_path / "mixed.safetensors", metadata)
        report = export_lora(
            tmp_path / "mixed.safetensors", tmp_path / "lora.safetensors", overwrite=True
        )
        assert report.dtype == kept


def test_what_a_style_cannot_hold_is_named_and_nothing_is_written(tmp_path):
    adapter = saved("stable-diffusion-3", tmp_path / "adapter", ["transformer", "text_encoder_3"])
    file = tmp_path / "lora.safetensors"
    with pytest.raises(StyleError, match="text_encoder_3: diffusers' load_lora"):
        export_lora(adapter, file, style="diffusers")
    pipe = PIPELINES["stable-diffusion"]()
    inject(pipe.unet, config(bias="all"), "a")
    pipe.save_gralora_weights(tmp_path / "biased")
    with pytest.raises(StyleError, match=r"biases or whole modules(.|\n)*a checkpoint"):
        export_lora(tmp_path / "biased", file)
    for option, value in (("style", "webui"), ("dtype", "fp8_e4m3"), ("scale", float("nan"))):
        with pytest.raises(ValueError, match=option):
            export_lora(adapter, file, **{option: value})
    with pytest.raises(
        AdapterFileError, match="was trained for stable-diffusion-3, but the base is flux"
    ):
        export_lora(adapter, file, family="flux")
    assert not file.exists()
