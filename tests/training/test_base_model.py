"""Every kind of base that may be given, and those that may not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPImageProcessor

from gralora_diffusion.families import get_family
from gralora_diffusion.training.base_model import find_base_family, load_base
from gralora_diffusion.training.config_checks import ConfigError
from tests.models import stable_diffusion, vae
from tests.training.ldm import save_single_file
from tests.training.runs import assert_close, config, run

FAMILY = get_family("stable-diffusion")


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    parts = ("unet", "vae", "text_encoder")
    return {
        f"{part}.{name}": tensor
        for part in parts
        for name, tensor in getattr(pipe, part).state_dict().items()
    }


def assert_same_weights(first: Any, second: Any) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder(base: Path, dtype: torch.dtype) -> None:
    chosen = config(pretrained_model_name_or_path=base)
    assert find_base_family(chosen) is FAMILY
    pipe = load_base(chosen, FAMILY, dtype)
    assert (pipe.unet.dtype, pipe.text_encoder.dtype) == (dtype, dtype)
    assert pipe.vae.dtype == torch.float32
    expected = StableDiffusionPipeline.from_pretrained(base)
    expected.unet.to(dtype)
    expected.text_encoder.to(dtype)
    assert_same_weights(pipe, expected)
    assert not any(p.requires_grad for m in (pipe.unet, pipe.vae) for p in m.parameters())


def test_single_file_gives_the_folders_adapter(base: Path, pictures: Path, tmp_path: Path) -> None:
    file = save_single_file(
        StableDiffusionPipeline.from_pretrained(base), tmp_path / "sd.safetensors"
    )
    chosen = config(pretrained_model_name_or_path=file, base_config=base)
    assert find_base_family(chosen) is FAMILY
    pipe = load_base(chosen, FAMILY, torch.float32)
    assert_same_weights(pipe, StableDiffusionPipeline.from_pretrained(base))
    half = load_base(chosen, FAMILY, torch.bfloat16)
    assert (half.unet.dtype, half.text_encoder.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(half.vae.decoder.conv_in.weight, pipe.vae.decoder.conv_in.weight)
    shared = {"instance_data_dir": pictures, "train_text_encoder": True, "max_train_steps": 2}
    one = run(pretrained_model_name_or_path=base, output_dir=tmp_path / "folder", **shared)
    two = run(
        pretrained_model_name_or_path=file,
        base_config=base,
        output_dir=tmp_path / "file",
        **shared,
    )
    assert_close(one, two, 1e-4)  # the VAE's attention comes as convolutions of one pixel


def test_half_precision_variant_with_all_that_sd_ships(base: Path, tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "base", variant="fp16")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text(encoding="utf-8"))
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["requires_safety_checker"] = True
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    CLIPImageProcessor().save_pretrained(tmp_path / "base" / "feature_extractor")
    chosen = config(pretrained_model_name_or_path=tmp_path / "base", variant="fp16")
    loaded = load_base(chosen, find_base_family(chosen), torch.float32)
    assert loaded.safety_checker is None
    expected = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float16).to(torch.float32)
    assert_same_weights(loaded, expected)


def test_another_vae(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(9)
    other = vae()
    other.save_pretrained(tmp_path / "vae")
    chosen = config(
        pretrained_model_name_or_path=base, pretrained_vae_model_name_or_path=tmp_path / "vae"
    )
    pipe = load_base(chosen, FAMILY, torch.bfloat16)
    assert pipe.vae.dtype == torch.float32
    assert torch.equal(pipe.vae.encoder.conv_in.weight, other.encoder.conv_in.weight)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ConfigError, match=r"--pretrained_vae_model_name_or_path .* cannot be used"):
        load_base(chosen, FAMILY, torch.float32)


def problem_of(base: Path | str, **options: Any) -> str:
    chosen = config(pretrained_model_name_or_path=base, **options)
    with pytest.raises(ConfigError) as caught:
        load_base(chosen, find_base_family(chosen), torch.float32)
    return str(caught.value)


def test_bases_that_cannot_be_trained(base: Path, tmp_path: Path) -> None:
    assert "it must be one of" in problem_of(base, family="stable-difusion")
    assert "no diffusers pipeline there" in problem_of("nobody/has-this")

    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no safetensors")
    assert "not a whole .safetensors file" in problem_of(broken)
    save_file({"lora.up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    assert "this single file is of no supported family" in problem_of(tmp_path / "lora.safetensors")

    folder = shutil.copytree(base, tmp_path / "cut")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    assert "cannot be used" in problem_of(folder)
    index = folder / "model_index.json"
    text = index.read_text(encoding="utf-8")
    index.write_text(text.replace("StableDiffusionPipeline", "DiTPipeline"), encoding="utf-8")
    assert "DiTPipeline is of no supported family (stable-diffusion" in problem_of(folder)

    stable_diffusion(in_channels=9).save_pretrained(tmp_path / "inpainting")
    assert "the UNet takes 9 channels and the VAE makes 4" in problem_of(tmp_path / "inpainting")


def test_single_file_without_its_configuration_says_what_to_give(
    base: Path, tmp_path: Path
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(base)
    file = save_single_file(pipe, tmp_path / "sd.safetensors")
    assert "--base_config" in problem_of(file)
