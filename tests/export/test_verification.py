"""What ``--verify`` draws with: the base in its dtype, the adapter where it belongs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_kontext
from safetensors.torch import load_file, save_file

from gralora_diffusion.adapters.adapter_file import Adapter, read_adapter
from gralora_diffusion.export import export_fused, verification
from gralora_diffusion.export.parity import ParityError
from gralora_diffusion.export.verification import Verification
from gralora_diffusion.families import get_family
from tests.models import adapt_everywhere, stable_diffusion
from tests.originals import ORIGINALS, transformer_alone, write
from tests.pipeline_classes import FILLING, build, build_filling


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there was one: all is as on one but for the last step, to the device."""

    def place(pipe: Any, device: torch.device) -> None:
        assert device.type == "cuda"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(verification, "place", place)


def opened_pipeline(base: Path, **options: Any) -> Any:
    check = Verification(Adapter({}), base, base / "never written", **options)
    return check._pipeline(verification.open_base(base))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("on_a_gpu")
def test_a_base_computes_in_its_own_dtype(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    diffusers.utils.logging.enable_propagation()
    stable_diffusion().save_pretrained(tmp_path / "fp32")
    pipe = stable_diffusion().to(dtype)
    pipe.save_pretrained(tmp_path / "folder")
    tensors = ORIGINALS["stable-diffusion"](pipe)
    file = write(tensors, tmp_path / "file.safetensors")
    caplog.clear()
    for loaded in (
        opened_pipeline(tmp_path / "folder"),
        opened_pipeline(file, base_config=str(tmp_path / "fp32")),
    ):
        assert loaded.unet.dtype == loaded.text_encoder.dtype == dtype
        expected = pipe.unet.state_dict()
        assert all(torch.equal(t, expected[k]) for k, t in loaded.unet.state_dict().items())
    assert "is not a `torch.dtype`" not in caplog.text


@pytest.mark.usefixtures("on_a_gpu")
def test_a_base_stored_in_fp8_computes_in_bf16(tmp_path: Path) -> None:
    stable_diffusion().save_pretrained(tmp_path / "config")
    whole = write(ORIGINALS["stable-diffusion"](stable_diffusion()), tmp_path / "whole.safetensors")
    tensors = {
        key: t.to(torch.float8_e4m3fn) if key.startswith("model.") and t.dim() > 1 else t
        for key, t in load_file(whole).items()
    }
    save_file(tensors, tmp_path / "fp8.safetensors")
    pipe = opened_pipeline(tmp_path / "fp8.safetensors", base_config=str(tmp_path / "config"))
    assert pipe.unet.dtype == torch.bfloat16


def test_on_a_cpu_it_computes_in_fp32(tmp_path: Path) -> None:
    stable_diffusion().to(torch.bfloat16).save_pretrained(tmp_path)
    assert opened_pipeline(tmp_path).unet.dtype == torch.float32


def test_a_lone_peft_folder_is_of_the_component_that_it_is_named_after(tmp_path: Path) -> None:
    """The name is the only evidence of the component; without it, the denoiser is assumed."""
    stable_diffusion().save_pretrained(tmp_path / "base")
    pipe = adapt_everywhere(stable_diffusion(), ["text_encoder"])
    pipe.save_gralora_weights(tmp_path / "adapter", peft_format=True)
    adapter = read_adapter(tmp_path / "adapter" / "text_encoder")
    output = tmp_path / "fused.safetensors"
    check = Verification(adapter, tmp_path / "base", output, steps=2, size=32)
    export_fused(adapter, tmp_path / "base", output, verify=check.check_fused)
    told = json.loads((tmp_path / "fused.safetensors.parity.json").read_text())
    assert {"fused weights", "LoRA by load_lora_weights"} == set(told["ways"])
    assert all(way["relative"] < 1e-4 for way in told["ways"].values())


#: Base -> its family, the pipeline that generates with it, and how many images that is given.
OTHER_BASES = {
    "stable-diffusion": ("stable-diffusion", "StableDiffusionInpaintPipeline", 2),
    "stable-diffusion-xl": ("stable-diffusion-xl", "StableDiffusionXLInpaintPipeline", 2),
    "flux": ("flux", "FluxFillPipeline", 2),
    "StableDiffusionInstructPix2PixPipeline": (
        "stable-diffusion",
        "StableDiffusionInstructPix2PixPipeline",
        1,
    ),
    "StableDiffusionXLInstructPix2PixPipeline": (
        "stable-diffusion-xl",
        "StableDiffusionXLInstructPix2PixPipeline",
        1,
    ),
    "FluxKontextPipeline": ("flux", "FluxKontextPipeline", 1),
    "FluxKontextInpaintPipeline": ("flux", "FluxKontextPipeline", 1),
    "Flux2KleinInpaintPipeline": ("flux2-klein", "Flux2KleinPipeline", 1),
    "StableDiffusionXLImg2ImgPipeline": ("stable-diffusion-xl", "StableDiffusionXLPipeline", 0),
}


def other_base(name: str) -> Any:
    return build_filling(name) if name in FILLING else build(name)


def export_verified(folder: Path, base: Path, output: Path, **options: Any) -> dict[str, Any]:
    """The report of an export that must pass."""
    adapter = read_adapter(folder / "adapter")
    check = Verification(adapter, base, output, steps=2, size=32, **options)
    kind = "checkpoint" if output.suffix else "diffusers"
    export_fused(adapter, base, output, format=kind, verify=check.check_fused)
    told: dict[str, Any] = json.loads((folder / f"{output.name}.parity.json").read_text())
    assert told["verdict"] == "passed"
    assert set(told["ways"]) == {"fused weights", "LoRA by load_lora_weights"}
    assert all(way["relative"] < 1e-3 for way in told["ways"].values())
    return told


@pytest.fixture
def small_kontext(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kontext enlarges every image to its own sizes."""
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(32, 32)])


@pytest.mark.parametrize("name", OTHER_BASES)
@pytest.mark.usefixtures("small_kontext")
def test_bases_that_edit_or_fill(name: str, tmp_path: Path) -> None:
    family, pipeline, images = OTHER_BASES[name]
    pipe = other_base(name)
    pipe.save_pretrained(tmp_path / "base")
    adapt_everywhere(pipe, [get_family(family).denoiser]).save_gralora_weights(tmp_path / "adapter")
    told = export_verified(tmp_path, tmp_path / "base", tmp_path / "fused")
    assert told["pipeline"] == pipeline
    assert told.get("images", 0) == images


@pytest.mark.parametrize(
    "name",
    ["stable-diffusion", "stable-diffusion-xl", "StableDiffusionInstructPix2PixPipeline"],
)
def test_single_files_that_edit_or_fill(name: str, tmp_path: Path) -> None:
    family, pipeline, images = OTHER_BASES[name]
    pipe = other_base(name)
    pipe.save_pretrained(tmp_path / "config")
    tensors = transformer_alone(ORIGINALS[family](pipe))
    file = write(tensors, tmp_path / "base.safetensors")
    adapt_everywhere(pipe, [get_family(family).denoiser]).save_gralora_weights(tmp_path / "adapter")
    options = {"base_config": str(tmp_path / "config")}
    told = export_verified(tmp_path, file, tmp_path / "fused.safetensors", **options)
    assert told["pipeline"] == pipeline
    assert told["images"] == images


def test_an_export_that_fills_otherwise_is_found(tmp_path: Path) -> None:
    pipe = build_filling("stable-diffusion")
    pipe.save_pretrained(tmp_path / "base")
    adapt_everywhere(pipe, ["unet"]).save_gralora_weights(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    check = Verification(adapter, tmp_path / "base", tmp_path / "same", steps=2, size=32)
    with pytest.raises(ParityError, match="does not generate the same latents"):
        check.check_fused(tmp_path / "base")  # the base without the adapter


def test_a_base_for_depth_is_not_verified(tmp_path: Path) -> None:
    pipe = build("StableDiffusionDepth2ImgPipeline")
    pipe.save_pretrained(tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"--verify cannot generate with the base\. --base .*the denoiser"
    ):
        opened_pipeline(tmp_path / "base")
