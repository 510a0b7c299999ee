"""LoRAs imported as GraLoRA: layer by layer against what they were made of, and as images."""

from __future__ import annotations

import json
import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from gralora_diffusion import AdapterFileError, cli, get_family
from gralora_diffusion.adapters.adapter_file import (
    WEIGHTS_NAME,
    Adapter,
    read_adapter,
    save_adapter,
)
from gralora_diffusion.adapters.layers import functional
from gralora_diffusion.adapters.placement.layer_config import layer_settings
from gralora_diffusion.export import export_lora
from gralora_diffusion.export.choices import STYLES
from gralora_diffusion.io.tensor_files import read_header
from gralora_diffusion.lora_files.low_rank import truncate
from gralora_diffusion.lora_import import gralora_from_lora, overall_error
from gralora_diffusion.lora_import.base import LoraBase
from gralora_diffusion.lora_import.main import main
from tests import models
from tests.lora_import.loras import KOHYA, dense, of_peft, pairs, peft_deltas, save
from tests.models import PIPELINES, adapt_everywhere, dense_updates
from tests.originals import ORIGINALS
from tests.reference import relative_error

TRANSFORMERS = ["flux", "flux2", "flux2-klein", "stable-diffusion-3"]
ENDINGS = ("to_q", "to_out.0", "ff.net.2", "proj_in", "conv1", "conv_shortcut", "time_emb_proj")
TEXT_ENDINGS = ("q_proj", "out_proj", "fc1")


def updates(adapter: Adapter) -> dict[str, Tensor]:
    """component.path -> dense update with its scaling, by the definition."""
    return {
        f"{component}.{path}": update
        for component, part in adapter.components.items()
        for path, update in dense_updates(part).items()
    }


def check(adapter: Adapter, expected: dict[str, Tensor], within: float = 1e-6) -> None:
    actual = updates(adapter)
    assert sorted(actual) == sorted(expected)
    for name, update in actual.items():
        assert relative_error(update, expected[name]) < within, name


def kohya(
    pipe: Any,
    rank: int = 3,
    names: tuple[str, ...] = ("unet", "text_encoder"),
    alphas: tuple[float | None, ...] = (1.0, 2.0, 3.7, None),
) -> Any:
    """A LoRA in the names of sd-scripts with two ranks and these alphas, and its updates."""
    tensors, expected = {}, {}
    for component in names:
        model = getattr(pipe, component)
        endings = ENDINGS if component == "unet" else TEXT_ENDINGS
        for i, (path, (down, up)) in enumerate(pairs(model, endings, rank).items()):
            level = "" if component == "unet" or path.startswith("text_model") else "text_model_"
            name = f"{KOHYA[component]}_{level}{path.replace('.', '_')}"
            alpha = alphas[i % len(alphas)]
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            if alpha:
                tensors[f"{name}.alpha"] = torch.tensor(alpha)
            scale = alpha / len(down) if alpha else 1.0
            place = f"{component}.{level.replace('model_', 'model.')}{path}"
            expected[place] = dense(down, up, scale)
    return tensors, expected


# -- exact -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "k", "hybrid", "alpha"),
    [(12, 4, 0, None), (16, 4, 0, 8), (8, 4, 3, None), (4, 4, 2, 16), (3, 1, 0, None)],
)
def test_kohya(rank, k, hybrid, alpha, tmp_path):
    """Where hybrid + rank / k has room for the LoRA's rank, 3, nothing is lost."""
    tensors, expected = kohya(models.stable_diffusion())
    path = save(tensors, tmp_path / "x.safetensors")
    adapter, layers = gralora_from_lora(path, "stable-diffusion", rank, k, hybrid, alpha)
    check(adapter, expected)
    assert {layer.error for layer in layers.values()} == {0.0}
    assert {layer.rank for layer in layers.values()} == {2, 3}
    assert overall_error(layers) == 0.0
    assert sorted(layers) == sorted(expected)
    for component, part in adapter.components.items():
        config = part.config
        assert (config.r, config.gralora_k, config.hybrid_r) == (rank, k, hybrid)
        assert config.alpha == (alpha or rank + hybrid)
        assert all(t.dtype == torch.float32 for t in part.tensors.values()), component


def test_a_revision_in_a_cache_of_its_own(tmp_path, capsys):
    """As huggingface_hub keeps repositories, without any network."""
    repository = tmp_path / "models--someone--lora"
    (repository / "refs").mkdir(parents=True)
    expected = {}
    for revision, commit in (("main", "1" * 40), ("v2", "2" * 40)):
        (repository / "refs" / revision).write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        tensors, _ = kohya(models.stable_diffusion(), names=("unet",))
        if revision == "v2":
            tensors = {k: 2 * t if "lora_up" in k else t for k, t in tensors.items()}
        save_file(tensors, repository / "snapshots" / commit / "lora.safetensors")
        expected[revision] = updates(gralora_from_lora(tensors, "stable-diffusion", 12, 4)[0])
    key = next(iter(expected["main"]))
    assert not torch.equal(expected["main"][key], expected["v2"][key])
    line = ["--lora", "someone/lora", "--family", "stable-diffusion", "--rank", "12"]
    line += ["--gralora_k", "4", "--revision", "v2", "--cache_dir", str(tmp_path)]
    main([*line, "--output", str(tmp_path / "out")])
    imported = updates(read_adapter(tmp_path / "out"))
    assert imported.keys() == expected["v2"].keys()
    assert all(torch.equal(imported[key], update) for key, update in expected["v2"].items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, tmp_path):
    tensors, _ = kohya(models.stable_diffusion(), names=("unet",))
    tensors = {key: t.to(dtype) for key, t in tensors.items() if not key.endswith("alpha")}
    expected = {
        key: dense(tensors[key], tensors[key.replace("lora_down", "lora_up")])
        for key in tensors
        if "lora_down" in key
    }
    adapter, _ = gralora_from_lora(tensors, "stable-diffusion", 12, 4)
    actual = {
        f"lora_unet_{k[5:].replace('.', '_')}.lora_down.weight": u
        for k, u in updates(adapter).items()
    }
    assert set(actual) == set(expected)
    assert all(relative_error(actual[key], expected[key]) < 1e-6 for key in expected)


def test_two_text_encoders(tmp_path):
    pipe = PIPELINES["stable-diffusion-xl"]()
    names = ("unet", "text_encoder", "text_encoder_2")
    tensors, expected = kohya(pipe, names=names)
    adapter, _ = gralora_from_lora(tensors, "stable-diffusion-xl", 12, 4)
    assert list(adapter.components) == list(names)
    check(adapter, expected)


@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-xl"])
def test_names_of_the_original_unet(name):
    """As sd-scripts names the layers of Stable Diffusion XL."""
    pipe = PIPELINES[name]()
    original = {t.data_ptr(): key for key, t in ORIGINALS[name](pipe).items() if t.is_contiguous()}
    tensors, expected = {}, {}
    for path, (down, up) in pairs(pipe.unet, ENDINGS, 3).items():
        key = original[pipe.unet.get_submodule(path).weight.data_ptr()]
        key = key.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_")
        tensors |= {f"lora_unet_{key}.lora_down.weight": down}
        tensors |= {f"lora_unet_{key}.lora_up.weight": up}
        expected[f"unet.{path}"] = dense(down, up)
    layers_per_block = pipe.unet.config.layers_per_block
    adapter, _ = gralora_from_lora(tensors, name, 12, 4, unet_config=pipe.unet.config)
    check(adapter, expected)
    if layers_per_block == 2:
        adapter, _ = gralora_from_lora(tensors, name, 12, 4)
        check(adapter, expected)


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("metadata", [False, True])
def test_diffusers_names(name, metadata, tmp_path):
    pipe = PIPELINES[name]()
    options: dict[str, Any] = {"r": 3, "lora_alpha": 3}
    if metadata:
        options = {
            "r": 3,
            "lora_alpha": 6,
            "rank_pattern": {"to_k": 2},
            "alpha_pattern": {"to_k": 5},
        }
    config = of_peft(pipe.transformer, ["to_q", "to_k", "to_out.0", "proj_out"], **options)
    state = get_peft_model_state_dict(pipe.transformer, adapter_name="default")
    told = {"transformer_lora_adapter_metadata": config.to_dict()} if metadata else {}
    if metadata and name == "stable-diffusion-3":  # diffusers does not write it there
        values = {f"transformer.{k}": v for k, v in config.to_dict().items()}
        values["transformer.target_modules"] = sorted(config.target_modules)
        tensors = {f"transformer.{k}": t for k, t in state.items()}
        path = save(
            tensors,
            tmp_path / "x.safetensors",
            lora_adapter_metadata=json.dumps(values, default=str),
        )
    else:
        type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=state, **told)
        (path,) = tmp_path.iterdir()
    expected = {f"transformer.{k}": u for k, u in peft_deltas(pipe.transformer).items()}
    adapter, layers = gralora_from_lora(path, name, 6, 2)
    check(adapter, expected)
    assert overall_error(layers) == 0.0
    fresh = PIPELINES[name]()
    save_adapter(adapter, tmp_path / "new" / WEIGHTS_NAME)
    report = fresh.load_gralora_weights(tmp_path / "new")
    assert "transformer" in str(report)


def test_peft_folder(tmp_path):
    pipe = models.stable_diffusion()
    config = of_peft(pipe.unet, ["to_q"], r=2, lora_alpha=5, use_rslora=True)
    state = get_peft_model_state_dict(pipe.unet, adapter_name="default")
    expected = {f"unet.{k}": u for k, u in peft_deltas(pipe.unet).items()}
    for folder in (tmp_path / "unet", tmp_path / "lone"):
        folder.mkdir()
        tensors = {f"base_model.model.{k}": t for k, t in state.items()}
        save(tensors, folder / "adapter_model.safetensors")
        config.save_pretrained(folder)
        adapter, _ = gralora_from_lora(folder, "stable-diffusion", 8, 4)
        check(adapter, expected)
    (tmp_path / "lone" / "adapter_model.safetensors").unlink()
    adapter, _ = gralora_from_lora(tmp_path / "unet", "stable-diffusion", 8, 4)
    check(adapter, expected)


# name in sd-scripts, its widths, paths in diffusers with rows; None: halves exchanged
FLUX: list[tuple[str, tuple[int, int], dict[str, Any]]] = [
    (
        "double_blocks_0_img_attn_qkv",
        (3072, 9216),
        {
            f"transformer_blocks.0.attn.to_{x}": (i * 3072, i * 3072 + 3072)
            for i, x in enumerate("qkv")
        },
    ),
    (
        "double_blocks_1_txt_mlp_2",
        (12288, 3072),
        {"transformer_blocks.1.ff_context.net.2": (0, 3072)},
    ),
    (
        "single_blocks_3_linear1",
        (3072, 21504),
        {
            "single_transformer_blocks.3.attn.to_q": (0, 3072),
            "single_transformer_blocks.3.attn.to_k": (3072, 6144),
            "single_transformer_blocks.3.attn.to_v": (6144, 9216),
            "single_transformer_blocks.3.proj_mlp": (9216, 21504),
        },
    ),
    ("final_layer_adaLN_modulation_1", (3072, 6144), {"norm_out.linear": None}),
    ("final_layer_linear", (3072, 64), {"proj_out": (0, 64)}),
]


@pytest.mark.parametrize("style", ["kohya", "comfyui"])
def test_flux(style):
    """Joined layers are taken apart; the last layer keeps its alpha, which diffusers drops."""
    tensors, expected, probes = {}, {}, {}
    for name, (width, height), parts in FLUX:
        down, up = torch.randn(2, width), torch.randn(height, 2)
        if style == "comfyui":
            dotted = name.replace("_blocks_", "_blocks.").replace("_attn_qkv", "_attn.qkv")
            for word in ("img", "txt", "linear"):
                dotted = dotted.replace(f"_{word}", f".{word}")
            dotted = dotted.replace("mlp_2", "mlp.2").replace("_adaLN", ".adaLN")
            dotted = dotted.replace("modulation_1", "modulation.1")
            name = f"diffusion_model.{dotted}"
        else:
            name = f"lora_unet_{name}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(3.0)
        x = probes.setdefault(width, torch.randn(5, width, dtype=torch.float64))
        y = 1.5 * x @ down.double().T @ up.double().T
        for path, rows in parts.items():
            halves = y.chunk(2, dim=1)
            expected[path] = y[:, slice(*rows)] if rows else torch.cat(halves[::-1], dim=1)
    adapter, layers = gralora_from_lora(tensors, "flux", 8, 4)
    part = adapter.components["transformer"]
    assert {layer.error for layer in layers.values()} == {0.0}
    assert {key.rpartition(".")[0] for key in part.tensors} == set(expected)
    for path, y in expected.items():
        A, B = (part.tensors[f"{path}.gralora_{x}"].double() for x in "AB")
        r, _, alpha = layer_settings(part.config, path)
        x = probes[A.shape[0] * A.shape[1]]
        assert relative_error(functional.linear_update(x, A, B, alpha / r), y) < 1e-6, path


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("style", STYLES)
def test_what_was_exported_comes_back(name, style, tmp_path):
    """The styles of three programs, with layers joined, halves exchanged and T5."""
    family = get_family(name)
    encoders = family.text_encoders
    if style == "diffusers":  # which reads no more
        loadable = getattr(diffusers, family.pipeline_classes[0])._lora_loadable_modules
        encoders = tuple(encoder for encoder in encoders if encoder in loadable)
    adapt_everywhere(PIPELINES[name](), [family.denoiser, *encoders]).save_gralora_weights(tmp_path)
    export_lora(tmp_path, tmp_path / "lora.safetensors", style=style)
    native = read_adapter(tmp_path)
    expected = {
        f"{c}.{family.canonical(c, p)}": update
        for (c, p), update in ((k.split(".", 1), u) for k, u in updates(native).items())
    }
    adapter, layers = gralora_from_lora(tmp_path / "lora.safetensors", name, 4, 4, 40)
    check(adapter, expected)
    assert overall_error(layers) == 0.0


@pytest.mark.parametrize(
    ("name", "style"), [("stable-diffusion", "comfyui"), ("stable-diffusion-xl", "kohya")]
)
def test_the_base_may_be_given_on_either_side(name, style, tmp_path):
    """A UNet whose blocks have fewer layers than published ones: the file says how it counts."""
    pipe = PIPELINES[name]()
    pipe.save_pretrained(tmp_path / "base")
    adapt_everywhere(pipe, ["unet"]).save_gralora_weights(tmp_path / "adapter")
    expected = updates(read_adapter(tmp_path / "adapter"))
    base = LoraBase(str(tmp_path / "base"))
    assert base.unet_config.layers_per_block == 1
    counted = {}
    for given in (None, tmp_path / "base"):
        path = tmp_path / "lora.safetensors"
        export_lora(tmp_path / "adapter", path, style=style, base=given, overwrite=True)
        source = json.loads(read_header(path)[1]["gralora_source"])
        counted[given] = source["layers_per_block"]
        for options in ({}, {"base": base, "unet_config": base.unet_config}):
            check(gralora_from_lora(path, name, 4, 4, 40, **options)[0], expected)
    assert list(counted.values()) == [2, 1]


@pytest.mark.parametrize("said", ["{", "[]", '{"layers_per_block": 0}', '{"layers_per_block": ""}'])
def test_a_damaged_statement_of_layers_is_refused(said, tmp_path):
    path = save(lora(), tmp_path / "x.safetensors", gralora_source=said)
    with pytest.raises(AdapterFileError, match="metadata gralora_source is damaged"):
        gralora_from_lora(path, "stable-diffusion", 8, 4)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "base_model.model."])
@pytest.mark.parametrize(
    "path", ["transformer_blocks.0.attn.to_q", "double_blocks.0.img_attn.proj"]
)
def test_other_beginnings_of_names(prefix, path):
    tensors = {
        f"{prefix}{path}.lora_A.weight": torch.randn(2, 16),
        f"{prefix}{path}.lora_B.weight": torch.randn(16, 2),
    }
    adapter, _ = gralora_from_lora(tensors, "flux", 8, 4)
    there = path.replace("double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.to_out.0")
    check(adapter, {f"transformer.{there}": dense(*tensors.values())})


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "k", "hybrid"), [(12, 4, 0), (8, 4, 3)])
def test_the_image_is_the_one_that_diffusers_draws_with_the_lora(rank, k, hybrid, tmp_path):
    # one alpha: of several, diffusers ignores those of attention layers (0.42.1)
    tensors, _ = kohya(models.stable_diffusion(), alphas=(2.0,))
    path = save(tensors, tmp_path / "x.safetensors")
    theirs, ours = models.stable_diffusion(), models.stable_diffusion()
    bare = models.draw(ours)
    theirs.load_lora_weights(path)
    adapter, _ = gralora_from_lora(path, "stable-diffusion", rank, k, hybrid)
    save_adapter(adapter, tmp_path / WEIGHTS_NAME)
    ours.load_gralora_weights(tmp_path / WEIGHTS_NAME)
    assert relative_error(models.draw(ours), models.draw(theirs)) < 1e-5
    assert relative_error(models.draw(ours), bare) > 0.01


# -- not exact -------------------------------------------------------------------------------------


def test_a_higher_rank_leaves_out_what_is_said():
    pipe = models.stable_diffusion()
    tensors, expected = kohya(pipe, rank=9, names=("unet",))
    adapter, layers = gralora_from_lora(tensors, "stable-diffusion", 8, 4)
    actual, squares, whole = updates(adapter), 0.0, 0.0
    for name, update in expected.items():
        missing = float((actual[name] - update).norm())
        assert layers[name].error == pytest.approx(missing / float(update.norm()), rel=1e-4)
        assert layers[name].norm == pytest.approx(float(update.norm()), rel=1e-5)
        squares, whole = squares + missing**2, whole + float(update.norm()) ** 2
    assert overall_error(layers) == pytest.approx(math.sqrt(squares / whole), rel=1e-4)
    assert overall_error(layers) > 0.1


def test_with_a_general_pair_no_more_is_left_out_than_its_rank_alone_would():
    tensors, expected = kohya(models.stable_diffusion(), rank=9, names=("unet",))
    adapter, layers = gralora_from_lora(tensors, "stable-diffusion", 8, 4, hybrid_rank=4)
    _, without = gralora_from_lora(tensors, "stable-diffusion", 8, 4)
    actual = updates(adapter)
    for key in [key for key in tensors if "lora_down" in key]:
        name = next(n for n in expected if f"lora_unet_{n[5:].replace('.', '_')}." in key)
        missing = float((actual[name] - expected[name]).norm() / expected[name].norm())
        alone = truncate(
            tensors[key], tensors[key.replace("lora_down", "lora_up")].flatten(1), rank=4
        )[2]
        assert layers[name].error == pytest.approx(missing, rel=1e-4)
        assert layers[name].error < alone
    assert overall_error(layers) < overall_error(without)


def test_k_is_lowered_where_widths_ask_for_it():
    pipe = models.stable_diffusion()
    down, up = torch.randn(2, 4, 3, 3), torch.randn(16, 2, 1, 1)
    tensors = {"unet.conv_in.lora_A.weight": down, "unet.conv_in.lora_B.weight": up}
    q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors |= {f"unet.{q}.lora_A.weight": torch.randn(2, 32)}
    tensors |= {f"unet.{q}.lora_B.weight": torch.randn(32, 2)}
    assert pipe.unet.get_submodule(q).weight.shape == (32, 32)
    adapter, layers = gralora_from_lora(tensors, "stable-diffusion", 16, 8)
    assert {name: layer.k for name, layer in layers.items()} == {"unet.conv_in": 4, f"unet.{q}": 8}
    config = adapter.components["unet"].config
    assert layer_settings(config, "conv_in").k == 4
    check(
        adapter, {"unet.conv_in": dense(down, up), f"unet.{q}": dense(*list(tensors.values())[2:])}
    )
    assert config.target_modules == rf"conv_in|{q.replace('.', chr(92) + '.')}"


def test_room_that_is_left_can_be_trained():
    """A is random and B zero there, as in a new adapter. Nothing moves from where both are zero."""
    tensors, _ = kohya(models.stable_diffusion(), rank=2, names=("unet",))
    adapter, _ = gralora_from_lora(tensors, "stable-diffusion", 16, 4, hybrid_rank=0)
    again, _ = gralora_from_lora(tensors, "stable-diffusion", 16, 4, hybrid_rank=0)
    for key, tensor in adapter.components["unet"].tensors.items():
        assert torch.equal(tensor, again.components["unet"].tensors[key])
        columns = tensor.transpose(1, 2).flatten(2) if key.endswith("A") else tensor
        empty = ~columns.any(dim=2)
        assert empty.any() == key.endswith("B")
    general, _ = gralora_from_lora(tensors, "stable-diffusion", 4, 4, hybrid_rank=4)
    for key, tensor in general.components["unet"].tensors.items():
        if key.endswith("gralora_A_general.weight"):
            assert tensor.flatten(1).any(dim=1).all()
        elif key.endswith("gralora_B"):
            assert not tensor.any()
        elif key.endswith("gralora_A"):
            assert tensor.any(dim=1).all()


# -- refused ---------------------------------------------------------------------------------------

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def lora(name: str = UNET, width: int = 16, height: int = 16) -> dict[str, Tensor]:
    down, up = torch.ones(2, width), torch.ones(height, 2)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}


def loha(name: str) -> dict[str, Tensor]:
    return {f"{name}.hada_w{n}_{side}": torch.ones(2, 2) for n in "12" for side in "ab"}


@pytest.mark.parametrize(
    ("tensors", "family", "text"),
    [
        (
            lora() | {f"{UNET}.dora_scale": torch.ones(1)},
            "stable-diffusion",
            "1 of 1 layers are DoRA",
        ),
        (
            lora() | loha("lora_unet_b"),
            "stable-diffusion",
            r"1 of 2 layers are LoHa, not LoRA .*lora_unet_b",
        ),
        (
            {"lora_unet_x.lokr_w1": torch.ones(2, 2), "lora_unet_x.lokr_w2": torch.ones(2, 2)},
            "stable-diffusion",
            "LoKr, not LoRA .*Extract a LoRA",
        ),
        (lora() | {"lora_unet_x.diff": torch.ones(2)}, "stable-diffusion", "1 of 2 .* difference"),
        (lora() | {"odd": torch.ones(1)}, "stable-diffusion", "1 keys do not belong to .*: odd"),
        (lora() | {f"{UNET}.diff_b": torch.ones(2)}, "stable-diffusion", f"{UNET}.diff_b"),
        ({"a.weight": torch.ones(1)}, "stable-diffusion", "is not a LoRA; its keys are a.weight"),
        ({f"{UNET}.lora_down.weight": torch.ones(2, 2)}, "stable-diffusion", "is not a LoRA"),
        (
            {k: t * math.nan for k, t in lora().items()},
            "stable-diffusion",
            f"{UNET}: down has NaN",
        ),
        (
            {k: t * 1j for k, t in lora().items()},
            "stable-diffusion",
            f"{UNET}: down has dtype complex64; expected",
        ),
        (
            {k: t.to(torch.int8) for k, t in lora().items()},
            "stable-diffusion",
            f"{UNET}: down has dtype int8; expected",
        ),
        (
            lora() | {f"{UNET}.alpha": torch.tensor(math.inf)},
            "stable-diffusion",
            f"{UNET}: alpha has NaN or infinite",
        ),
        (
            {**lora(), f"{UNET}.lora_up.weight": torch.ones(16, 3)},
            "stable-diffusion",
            f"{UNET}: rows of its down .* and columns of its up matrix differ: 2 and 3",
        ),
        (
            lora(UNET.replace("attn1_to_q", "attn2_to_k"), 2048),
            "stable-diffusion",
            "stable-diffusion-xl",
        ),
        (
            lora("lycoris_transformer_blocks_0_attn5"),
            "stable-diffusion-3",
            "1 of 1 layers do not exist in .*: lycoris_transformer_blocks_0_attn5",
        ),
        (
            lora("lora_te1_text_model_embeddings_token_embedding"),
            "flux",
            "these layers do not exist in flux: text_encoder.text_model.embeddings.token.embedding",
        ),
        (
            lora("unet.down_blocks.0.attentions.0.attn5"),
            "stable-diffusion-3",
            "these layers do not exist in stable-diffusion-3: transformer.unet.down_blocks",
        ),
        (
            lora("transformer.proj_out", 8, 8) | lora("diffusion_model.final_layer.linear", 8, 8),
            "flux",
            "two layers of the file stand for transformer.proj_out",
        ),
        (
            lora(UNET) | lora("lora_unet_input_blocks_1_1_proj_in"),
            "stable-diffusion",
            "ignores 1 of 2 layers .*: lora_unet_input_blocks_1_1_proj_in",
        ),
    ],
)
def test_refused(tensors, family, text):
    with pytest.raises(AdapterFileError, match=text):
        gralora_from_lora(tensors, family, 8, 4)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((6, 4), "rank 6 should be a multiple of k, which is 4"),
        ((8, 4, -1), "hybrid_rank should not be negative"),
        ((8, 4, 0, 0.0), "alpha should be a number other than zero"),
    ],
)
def test_numbers_that_cannot_be(numbers, text):
    with pytest.raises(ValueError, match=text):
        gralora_from_lora(lora(), "stable-diffusion", *numbers)


def test_metadata_of_another_family(tmp_path):
    path = save(lora(), tmp_path / "x.safetensors", ss_base_model_version="sdxl_base_v1-0")
    with pytest.raises(
        AdapterFileError, match="for stable-diffusion-xl according to its ss_base_model_vers"
    ):
        gralora_from_lora(path, "stable-diffusion", 8, 4)


def test_our_own_file(tmp_path):
    models.adapt(models.stable_diffusion()).save_gralora_weights(tmp_path)
    with pytest.raises(AdapterFileError, match="a GraLoRA adapter already"):
        gralora_from_lora(tmp_path, "stable-diffusion", 8, 4)


# -- the command -----------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    tensors, expected = kohya(models.stable_diffusion())
    tags = {"modelspec.trigger_phrase": "sks dog", "ss_learning_rate": "1"}
    path = save(tensors, tmp_path / "x.safetensors", **tags)
    line = (
        f"--lora {path} --family stable-diffusion --rank 12 --gralora_k 4 --output {tmp_path}/new"
    )
    cli.main(["import", *line.split()])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{len(expected)} of {len(expected)} layers were converted exactly",
        "lost of the whole update: 0.000%",
        f"{tmp_path}/new/{WEIGHTS_NAME}",
    ]
    adapter = read_adapter(tmp_path / "new")
    check(adapter, expected)
    assert adapter.family == "stable-diffusion"
    assert adapter.metadata == {"modelspec.trigger_phrase": "sks dog"}
    before = path.read_bytes()
    for again in (line, line.replace(f"{tmp_path}/new", str(path)) + " --overwrite"):
        with pytest.raises(SystemExit):  # neither what was there nor the LoRA itself is lost
            cli.main(["import", *again.split()])
    told = capsys.readouterr().err
    assert "exists already" in told
    assert "which is read" in told
    assert path.read_bytes() == before
    cli.main(["import", *line.split(), "--overwrite"])


def test_the_command_never_replaces_a_part_of_the_base(tmp_path, capsys):
    pipe = models.stable_diffusion()
    pipe.save_pretrained(tmp_path / "base")
    weights = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    line = f"--lora {tmp_path}/lora.safetensors --base {tmp_path}/base --rank 4 --gralora_k 2"
    for output in (weights, tmp_path / "base" / "new.safetensors", tmp_path / "base"):
        with pytest.raises(SystemExit):
            cli.main(["import", *line.split(), "--output", str(output), "--overwrite"])
        assert "which is read" in capsys.readouterr().err
    assert weights.read_bytes() == before


def test_command_with_a_base_and_errors_by_layer(tmp_path, capsys):
    pipe = models.stable_diffusion()
    assert isinstance(pipe, StableDiffusionPipeline)
    pipe.save_pretrained(tmp_path / "base")
    tensors, expected = kohya(pipe, rank=9)
    path = save(tensors, tmp_path / "x.safetensors")
    main(
        f"--lora {path} --base {tmp_path}/base --rank 8 --gralora_k 4 --hybrid_rank 2 "
        f"--lora_alpha 4 --output {tmp_path}/new.safetensors".split()
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"0 of {len(expected)} layers were converted exactly"
    assert lines[1] == "    lost  rank  k  layer"
    assert lines[-3] == f"... and {len(expected) - 20} more"
    assert lines[-2].startswith("lost of the whole update: ")
    part = read_adapter(tmp_path / "new.safetensors").components["unet"]
    assert (part.config.alpha, part.config.hybrid_r) == (4, 2)
    assert load_file(tmp_path / "new.safetensors")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--lora absent.safetensors --family flux", "absent.safetensors: no such file or folder"),
        ("--lora absent.safetensors --base ./absent", "--base ./absent: no such file or folder"),
        (
            "--lora owner/x --base owner/absent",
            "--base owner/absent: there is no such folder, the Hub's cache does not contain",
        ),
        ("--lora x --family flux --hybrid_rank -1", "--hybrid_rank is -1; it must be at least 0"),
        ("--lora absent.safetensors", "one of --family and --base is required"),
    ],
)
def test_command_errors(line, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main([*line.split(), "--rank", "8", "--gralora_k", "4", "--output", "new"])
    assert caught.value.code == 2
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
