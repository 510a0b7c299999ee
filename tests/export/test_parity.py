"""Latents of exported files against the attached adapter's."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from gralora_diffusion import get_family, inject
from gralora_diffusion.adapters.adapter_file import DENOISER, Adapter, read_adapter
from gralora_diffusion.adapters.layers.functional import lora_factors
from gralora_diffusion.export.loaders import ArtifactLoader, fused_folder, fused_in_place, lora_file
from gralora_diffusion.export.parity import ParityError, compare
from gralora_diffusion.io.precision import exact_fp32
from tests.models import PIPELINES, adapt_everywhere, config, merged, structure
from tests.originals import ORIGINALS, write
from tests.tiny.parts import text_encoder_with_projection

PROMPTS = ["a cat", "a dog"]
HALVES = [torch.float16, torch.bfloat16]


def adapter_on(name: str, components: Iterable[str], folder: Path, **changes: Any) -> Path:
    adapt_everywhere(PIPELINES[name](), components, **changes).save_gralora_weights(folder)
    return folder


def exact_lora(adapter: Path, file: Path, scale: float = 1.0) -> Path:
    """A LoRA with the same update, in the keys that PEFT and diffusers have."""
    tensors = {}
    for component, part in read_adapter(adapter).components.items():
        scaling = scale * part.config.alpha / (part.config.r + part.config.hybrid_r)
        for key, A in part.tensors.items():
            if not key.endswith(".gralora_A"):
                continue
            path = key.removesuffix(".gralora_A")
            down, up = lora_factors(A, part.tensors[f"{path}.gralora_B"])
            if part.config.hybrid_r:
                down = torch.cat([down, part.tensors[f"{path}.gralora_A_general.weight"]])
                plain = part.tensors[f"{path}.gralora_B_general.weight"].flatten(1)
                up = torch.cat([up, plain], dim=1)
            tensors[f"{component}.{path}.lora_A.weight"] = down.contiguous()
            up = (up * scaling).reshape(*up.shape, *[1] * (down.dim() - 2))
            tensors[f"{component}.{path}.lora_B.weight"] = up.contiguous()
    save_file(tensors, file)
    return file


def state_of(pipe: Any) -> list[Any]:
    models = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    scheduler = {k: v for k, v in vars(pipe.scheduler).items() if not torch.is_tensor(v)}
    return [structure(*models), copy.deepcopy(scheduler), dict(pipe.components)]


@pytest.mark.parametrize("name", PIPELINES)
def test_stock_diffusers_draws_the_same(name: str, tmp_path: Path) -> None:
    """Every component that diffusers loads a LoRA into; and all of them fused."""
    family, pipe = get_family(name), PIPELINES[name]()
    loadable = [c for c in family.components if c in type(pipe)._lora_loadable_modules]
    adapter = adapter_on(name, loadable, tmp_path / "adapter")
    whole = adapter_on(name, (), tmp_path / "whole")
    for folder in (adapter, whole):
        fused = merged([(folder, 0.5)], PIPELINES[name]())
        fused.save_pretrained(tmp_path / f"fused {folder.name}")
    pipe(prompt="a", num_inference_steps=1, output_type="latent")  # transformers sets its hooks
    before = state_of(pipe)
    loaders = {
        "lora": lora_file(exact_lora(adapter, tmp_path / "a file of any name", 0.5)),
        "fused": fused_folder(tmp_path / "fused adapter"),
    }
    report = compare(pipe, adapter, loaders, prompts=["a cat"], scale=0.5, steps=2)
    assert state_of(pipe) == before
    assert report.effect.mean > 1e-3 * report.latents
    assert max(w.relative for w in report.loaders.values() if w.relative is not None) < 1e-4
    report.check()
    loaders = {"fused": fused_folder(tmp_path / "fused whole")}
    report = compare(pipe, whole, loaders, prompts=["a cat"], scale=0.5, steps=2)
    assert report.loaders["fused"].relative is not None
    assert report.loaders["fused"].relative < 1e-4


def fused_file(path: Path, config: Path, borrowed: Iterable[str], **options: Any) -> ArtifactLoader:
    """A fused original file, by diffusers' ``from_single_file``, with some of the base's models."""

    @contextmanager
    def way(pipe: Any) -> Iterator[Any]:
        models = {name: getattr(pipe, name) for name in borrowed}
        yield type(pipe).from_single_file(str(path), config=str(config), **models, **options)

    return way


@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3"])
def test_a_fused_single_file(name: str, tmp_path: Path) -> None:
    """Denoiser and VAE; text encoders of this size diffusers does not read from such a file."""
    family, pipe = get_family(name), PIPELINES[name]()
    adapter = adapter_on(name, [family.denoiser], tmp_path / "adapter")
    pipe.save_pretrained(tmp_path / "base")
    fused = merged([(adapter, 1.0)], PIPELINES[name]())
    if name == "stable-diffusion-3":  # see tests/originals
        fused.text_encoder = text_encoder_with_projection(32, 32)
        fused.text_encoder.text_projection.weight.data.copy_(torch.eye(32))
    file = write(ORIGINALS[name](fused), tmp_path / "fused.safetensors")
    options = family.load_options if name == "stable-diffusion" else {}
    loaders = {"file": fused_file(file, tmp_path / "base", family.text_encoders, **options)}
    report = compare(pipe, adapter, loaders, prompts=["a cat"], steps=2)
    assert report.loaders["file"].relative is not None
    assert report.loaders["file"].relative < 1e-5


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return adapter_on("stable-diffusion", (), tmp_path / "adapter")


@pytest.fixture
def pipe() -> Any:
    return PIPELINES["stable-diffusion"]()


def test_weights_set_in_place_are_taken_out_again(adapter: Path, pipe: Any) -> None:
    before = {k: t.clone() for k, t in pipe.unet.state_dict().items()}

    def load(pipe: Any) -> None:
        merged([(adapter, 1.0)], pipe)

    loaders = {"fused": fused_in_place(load, ["unet", "text_encoder"])}
    report = compare(pipe, adapter, loaders, prompts=PROMPTS)
    assert report.loaders["fused"].relative is not None
    assert report.loaders["fused"].relative < 1e-4
    assert all(torch.equal(t, before[k]) for k, t in pipe.unet.state_dict().items())

    def fail(pipe: Any) -> None:
        load(pipe)
        raise OSError("half-way")

    with pytest.raises(OSError, match="half-way"):
        compare(pipe, adapter, {"x": fused_in_place(fail, ["unet"])}, prompts=PROMPTS)
    assert all(torch.equal(t, before[k]) for k, t in pipe.unet.state_dict().items())
    assert not getattr(pipe.unet, "peft_config", {})


def rounded_to_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """To 10 bits of the mantissa, half away from zero or to even."""
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def convolutions_round() -> bool:
    """Whether they would on a GPU."""
    cudnn: Any = torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        return bool(cudnn.conv.fp32_precision == "tf32")
    return bool(cudnn.allow_tf32)


def test_convolutions_do_not_round_as_gpus_do_by_default(
    adapter: Path, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN's TF32, emulated, would make a correct export look wrong."""
    loaders = {"lora": lora_file(exact_lora(adapter, tmp_path / "lora"))}
    expected = compare(pipe, adapter, loaders, prompts=PROMPTS, steps=2)
    plain, rounded = torch.nn.functional.conv2d, []

    def conv2d(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        rounded.append(convolutions_round())
        if rounded[-1]:
            x, weight = rounded_to_tf32(x), rounded_to_tf32(weight)
        return plain(x, weight, *rest, **named)

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    monkeypatch.setattr("gralora_diffusion.export.parity.exact_fp32", nullcontext)
    differs = compare(pipe, adapter, loaders, prompts=PROMPTS, steps=2)
    assert differs.loaders["lora"].largest > 10 * expected.loaders["lora"].largest
    assert all(rounded)
    monkeypatch.setattr("gralora_diffusion.export.parity.exact_fp32", exact_fp32)
    rounded.clear()
    assert compare(pipe, adapter, loaders, prompts=PROMPTS, steps=2) == expected
    assert rounded
    assert not any(rounded)


def test_differences_are_those_of_the_latents(adapter: Path, pipe: Any, tmp_path: Path) -> None:
    wrong = lora_file(exact_lora(adapter, tmp_path / "lora", scale=0.9))
    report = compare(
        pipe, adapter, {"wrong": wrong}, prompts=PROMPTS, seed=3, steps=2, size=16, guidance_scale=2
    )

    def latents(drawing: Any) -> torch.Tensor:
        drawn = [
            drawing(
                prompt,
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(3 + i),
                height=16,
                width=16,
                guidance_scale=2,
                output_type="latent",
            ).images
            for i, prompt in enumerate(PROMPTS)
        ]
        return torch.cat(drawn).double()

    base, weak, true = (
        latents(merged([(adapter, s)], PIPELINES["stable-diffusion"]())) for s in (0.0, 0.9, 1.0)
    )
    apart, effect = (weak - true).abs(), (true - base).abs()
    way = report.loaders["wrong"]
    assert way.largest == pytest.approx(float(apart.max()), rel=1e-3)
    assert way.mean == pytest.approx(float(apart.mean()), rel=1e-3)
    assert report.effect.largest == pytest.approx(float(effect.max()), rel=1e-3)
    assert report.effect.mean == pytest.approx(float(effect.mean()), rel=1e-3)
    assert report.latents == pytest.approx(float(base.abs().mean()), rel=1e-3)
    relative = max(apart.max() / effect.max(), apart.mean() / effect.mean())
    assert way.relative == pytest.approx(float(relative), rel=1e-3)
    assert report.failed == ["wrong"]
    with pytest.raises(
        ParityError, match=r"does not generate.*\n.*\nwrong: mean diff.*bound 0.001"
    ) as e:
        report.check()
    assert e.value.report is report


def test_a_file_without_the_adapter_fails_in_every_dtype(adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    PIPELINES["stable-diffusion"]().save_pretrained(base)
    for dtype in (torch.float32, *HALVES):
        pipe = DiffusionPipeline.from_pretrained(base, dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        report = compare(pipe, adapter, {"base": fused_folder(base)}, prompts=["a cat"])
        assert report.failed == ["base"]
        assert report.loaders["base"].relative == 1.0


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_within_its_bounds(dtype: torch.dtype, tmp_path: Path) -> None:
    """Fused weights that were rounded once, computed with in fp32 and in half precision."""
    name = "stable-diffusion-xl"
    adapter = adapter_on(name, [get_family(name).denoiser], tmp_path / "adapter")
    PIPELINES[name]().to(dtype).save_pretrained(tmp_path / "base")

    def base(dtype: torch.dtype) -> Any:
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "base", dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    merged([(adapter, 1.0)], base(torch.float32)).to(dtype).save_pretrained(tmp_path / "fused")
    loaders = {"fused": fused_folder(tmp_path / "fused")}
    exact = compare(base(torch.float32), adapter, loaders, prompts=PROMPTS, stored=dtype)
    half = compare(base(dtype), adapter, loaders, prompts=PROMPTS)
    for report in (exact, half):
        report.check()
    assert exact.bound < half.bound < 1
    eps = torch.finfo(dtype).eps
    relative = exact.loaders["fused"].relative
    assert relative is not None
    assert 0.1 * eps < relative < exact.bound
    assert (exact.settings["dtype"], exact.settings["stored_dtype"]) == ("float32", str(dtype)[6:])
    assert half.settings["dtype"] == str(dtype)[6:]


def test_an_adapter_without_effect_is_told(pipe: Any, tmp_path: Path) -> None:
    new = PIPELINES["stable-diffusion"]()
    inject(new.unet, config(init_weights=True), "a")  # its update is zero
    new.save_gralora_weights(tmp_path / "adapter")
    pipe.save_pretrained(tmp_path / "same")
    other = PIPELINES["stable-diffusion"](seed=1)
    other.save_pretrained(tmp_path / "other")
    loaders = {"same": fused_folder(tmp_path / "same"), "other": fused_folder(tmp_path / "other")}
    report = compare(pipe, tmp_path / "adapter", loaders, prompts=PROMPTS)
    assert report.effect.mean == 0
    assert report.without_effect
    assert report.loaders["same"].relative is None
    assert report.failed == ["other"]
    report = compare(pipe, tmp_path / "adapter", {"same": loaders["same"]}, prompts=PROMPTS)
    report.check()
    assert report.verdict == (
        "passed, but the adapter has no effect on these latents, so this shows little"
    )


def test_latents_that_are_no_numbers_fail(adapter: Path, pipe: Any) -> None:
    def load(pipe: Any) -> None:
        pipe.unet.conv_out.bias.data.fill_(float("nan"))

    report = compare(pipe, adapter, {"nan": fused_in_place(load, ["unet"])}, prompts=PROMPTS)
    assert report.failed == ["nan"]
    assert not report.without_effect


def test_the_report_beside_the_file(adapter: Path, pipe: Any, tmp_path: Path) -> None:
    file = exact_lora(adapter, tmp_path / "lora.safetensors")
    report = compare(pipe, adapter, {"lora": lora_file(file)}, prompts=PROMPTS, bound=0.5)
    target = tmp_path / "lora.safetensors.parity.json"
    report.write(target, file, base="tiny", adapter="rex")
    told = json.loads(target.read_text())
    assert set(told.pop("versions")) == {
        *("python", "torch", "diffusers", "transformers", "peft", "safetensors"),
    }
    way = report.loaders["lora"]
    assert told == {
        "verdict": "passed",
        "base": "tiny",
        "adapter": "rex",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "bound": 0.5,
        "effect": {"largest": report.effect.largest, "mean": report.effect.mean},
        "ways": {"lora": {"largest": way.largest, "mean": way.mean, "relative": way.relative}},
        "latents": report.latents,
        "noise": report.noise,
        "prompts": PROMPTS,
        "seed": 0,
        "steps": 4,
        "size": None,
        "guidance_scale": None,
        "scale": 1.0,
        "pipeline": "StableDiffusionPipeline",
        "dtype": "float32",
        "stored_dtype": "float32",
        "device": "cpu",
    }
    pipe.save_pretrained(tmp_path / "folder")
    report.write(target, tmp_path / "folder")
    assert json.loads(target.read_text())["sha256"] == {
        str(path.relative_to(tmp_path / "folder")): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "folder").rglob("*.safetensors")
    }
    assert sorted(p.name for p in tmp_path.glob("*.json*")) == [target.name]


def test_adapters_in_memory(pipe: Any, tmp_path: Path) -> None:
    """Of several components, and of a PEFT folder, which does not say of which it is."""
    folder = adapter_on("stable-diffusion", ["unet"], tmp_path / "adapter")
    read = read_adapter(folder)
    bare = Adapter({DENOISER: read.components["unet"]})
    lora = {"lora": lora_file(exact_lora(folder, tmp_path / "lora"))}
    reports = [compare(pipe, a, lora, prompts=["a cat"]) for a in (folder, read, bare)]
    assert reports[0] == reports[1] == reports[2]


def test_a_pipeline_that_will_not_do(adapter: Path, pipe: Any) -> None:
    pipe.load_gralora_weights(adapter, "mine")
    with pytest.raises(ValueError, match=r"has adapters \(mine\); pass the base alone"):
        compare(pipe, adapter, {}, prompts=PROMPTS)
    pipe.unload_gralora_weights()
    pipe.unet.double()
    with pytest.raises(ValueError, match="is in float64; load it in one of float32, float16"):
        compare(pipe, adapter, {}, prompts=PROMPTS)
