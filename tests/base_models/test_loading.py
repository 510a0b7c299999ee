"""Every kind of base that may be given, and those that may not."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor

from gralora_diffusion.base_models.loading import find_base_family, load_base
from gralora_diffusion.base_models.meta_base import empty_base
from gralora_diffusion.families import get_family
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.pipelines.sample_command import main as sample
from gralora_diffusion.training.checks.family import check_family_options
from tests.models import PIPELINES, stable_diffusion, vae
from tests.training.runs import config

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
    vae_problem = problem_of(base, pretrained_vae_model_name_or_path="nobody/vae", cache_dir="c")
    assert "`hf download nobody/vae --cache-dir c`, or pass a folder" in vae_problem
    with pytest.raises(ConfigError, match=r"--pretrained_vae_model_name_or_path .* cannot be used"):
        load_base(chosen, FAMILY, torch.float32)


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_another_vae_of_every_family(
    name: str, tmp_path: Path, saved_base: Callable[[str], Path]
) -> None:
    """A VAE that was saved in half precision takes its place in fp32; of another kind, it is
    refused."""
    base = saved_base(name)
    other = PIPELINES[name](seed=9).vae.half()
    other.save_pretrained(tmp_path / "vae")
    options = {"pretrained_model_name_or_path": base}
    chosen = config(**options, pretrained_vae_model_name_or_path=tmp_path / "vae")
    pipe = load_base(chosen, get_family(name), torch.bfloat16)
    for key, tensor in pipe.vae.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key].to(tensor.dtype)), key
    assert pipe.vae.dtype == torch.float32
    wrong = "stable-diffusion" if type(other) is not AutoencoderKL else "flux2"
    PIPELINES[wrong]().vae.save_pretrained(tmp_path / "wrong")
    chosen = config(**options, pretrained_vae_model_name_or_path=tmp_path / "wrong")
    with pytest.raises(ConfigError, match=f"; the base needs {type(other).__name__}$"):
        load_base(chosen, get_family(name), torch.float32)


def test_text_encoders_left_out(tmp_path: Path) -> None:
    pipe = PIPELINES["stable-diffusion-3"]()
    pipe.save_pretrained(tmp_path)
    t5 = tmp_path / "text_encoder_3" / "model.safetensors"
    t5.unlink()  # what is left out is not read
    chosen = config(
        pretrained_model_name_or_path=tmp_path, leave_out_text_encoders=["text_encoder_3"]
    )
    loaded = load_base(chosen, find_base_family(chosen), torch.float32)
    assert (loaded.text_encoder_3, loaded.tokenizer_3) == (None, None)
    assert loaded.text_encoder_2 is not None
    assert loaded.tokenizer_2 is not None
    problem = problem_of(tmp_path, leave_out_text_encoders=["text_encoder_3", "text_encoder_2"])
    assert "--leave_out_text_encoders is text_encoder_2; stable-diffusion-3 can only do" in problem
    assert "without these text encoders: text_encoder_3" in problem


def test_text_encoders_of_a_family_that_needs_them_all(base: Path) -> None:
    problem = problem_of(base, leave_out_text_encoders=["text_encoder"])
    assert "stable-diffusion can only do without these text encoders: none" in problem


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed"
)
def test_a_library_that_is_not_there(tmp_path: Path) -> None:
    PIPELINES["flux2"]().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    index["tokenizer"] = ["transformers", "PixtralProcessor"]  # as in the published base
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    problem = problem_of(tmp_path)
    assert "the class of its tokenizer, PixtralProcessor, needs: pip install torchvision" in problem


def problem_of(base: Path | str, **options: Any) -> str:
    chosen = config(pretrained_model_name_or_path=base, **options)

    def load() -> None:
        family = find_base_family(chosen)
        check_family_options(chosen, family)
        load_base(chosen, family, torch.float32)

    with pytest.raises(ConfigError) as caught:
        load()
    return str(caught.value)


def test_bases_that_cannot_be_trained(base: Path, tmp_path: Path) -> None:
    assert "it must be one of" in problem_of(base, family="stable-difusion")
    problem = problem_of(base, family="flux")
    assert "--family flux, but --pretrained_model_name_or_path is stable-diffusion" in problem
    assert "no diffusers pipeline could be loaded" in problem_of("no one/has-this")
    fetch = "`hf download nobody/has-this --revision v1 --cache-dir c`, or pass a folder"
    assert fetch in problem_of("nobody/has-this", revision="v1", cache_dir="c")

    folder = shutil.copytree(base, tmp_path / "cut")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    assert "cannot be used" in problem_of(folder)
    index = folder / "model_index.json"
    text = index.read_text(encoding="utf-8")
    index.write_text(text.replace("StableDiffusionPipeline", "DiTPipeline"), encoding="utf-8")
    assert "DiTPipeline does not belong to a supported family (flux, flux2, " in problem_of(folder)

    stable_diffusion(in_channels=5).save_pretrained(tmp_path / "depth")
    problem = problem_of(tmp_path / "depth")
    assert "the denoiser takes 5 channels and the VAE makes 4: this is a base for depth" in problem


def test_pickles_in_place_of_a_text_encoder_are_not_read(base: Path, tmp_path: Path) -> None:
    """One is called what it is, the other a safetensors file."""
    shutil.copytree(base, tmp_path / "a")
    encoder = tmp_path / "a" / "text_encoder"
    weights = encoder / "model.safetensors"
    torch.save(load_file(weights), encoder / "pytorch_model.bin")
    weights.unlink()
    problem = problem_of(tmp_path / "a")
    assert "model.safetensors" in problem
    assert str(encoder) in problem
    (encoder / "pytorch_model.bin").rename(weights)
    assert "cannot be used" in problem_of(tmp_path / "a")


@pytest.mark.parametrize(
    ("component", "file", "key"),
    [
        ("unet", "diffusion_pytorch_model.safetensors", "conv_in.weight"),
        ("text_encoder", "model.safetensors", "encoder.layers.1.mlp.fc1.bias"),
    ],
)
def test_missing_weights_are_not_made_up(
    component: str,
    file: str,
    key: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(base, tmp_path / "a")
    path = tmp_path / "a" / component / file
    tensors = load_file(path)
    [name] = [name for name in tensors if name.endswith(key)]  # prefixes depend on the version
    tensors[f"{name}s"] = tensors.pop(name)
    save_file(tensors, path, {"format": "pt"})
    text = f"the files of its {component} do not contain {name}"
    assert text in problem_of(tmp_path / "a")
    with pytest.raises(SystemExit):
        sample(
            ["--base", str(tmp_path / "a"), "--prompt", "a", "--output", str(tmp_path / "a.png")]
        )
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "place", "value", "text"),
    [
        ("unet/config.json", "block_out_channels", None, "cannot be used"),
        ("text_encoder/config.json", "max_position_embeddings", "16", "cannot be used"),
        ("tokenizer/tokenizer_config.json", None, 3, "cannot be used"),
        ("model_index.json", "unet", ["diffusers", 3], "cannot be used"),
    ],
)
def test_configs_with_values_of_other_types(
    file: str, place: str | None, value: Any, text: str, base: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "a")
    path = tmp_path / "a" / file
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, place: value} if place else value))
    assert text in problem_of(tmp_path / "a")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3", "{"])
def test_an_index_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(text)
    assert "no diffusers pipeline could be loaded" in problem_of(tmp_path)


def test_a_base_in_the_hubs_cache_is_checked_as_a_folder_is(base: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    snapshot = shutil.copytree(base, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    chosen = config(pretrained_model_name_or_path="owner/name", cache_dir=tmp_path)
    loaded = load_base(chosen, find_base_family(chosen), torch.float32)
    assert_same_weights(loaded, StableDiffusionPipeline.from_pretrained(base))

    settings = json.loads((snapshot / "text_encoder/config.json").read_text())
    settings["num_hidden_layers"] = 10**9
    (snapshot / "text_encoder/config.json").write_text(json.dumps(settings))
    problem = problem_of("owner/name", cache_dir=tmp_path)
    assert "its num_hidden_layers is 1000000000; it must be from 0 to 1000" in problem


def test_a_vae_of_too_many_layers(base: Path, tmp_path: Path) -> None:
    vae().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"layers_per_block": 10**9}))
    problem = problem_of(base, pretrained_vae_model_name_or_path=tmp_path)
    assert "its layers_per_block is 1000000000; it must be from 0 to 1000" in problem


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"vocab": 500}, "the tokenizer of its text_encoder has a token 500, and text_encoder "),
        ({"model_max_length": 17}, "gives up to 17 tokens, and text_encoder reads from 2 to 16"),
        ({"model_max_length": 0}, "gives up to 0 tokens, and text_encoder reads from 2 to 16"),
        (
            {"model_max_length": 12.0},
            "gives up to 12.0 tokens, and text_encoder reads from 2 to 16",
        ),
        ({"model_max_length": None}, "and text_encoder reads from 2 to 16"),
    ],
)
def test_a_tokenizer_of_another_text_encoder(
    change: dict[str, float | None], text: str, base: Path, tmp_path: Path
) -> None:
    """Its tokens would only fail when the first prompt is encoded, or fill the memory."""
    folder = shutil.copytree(base, tmp_path / "base")
    key, value = next(iter(change.items()))
    name = "tokenizer.json" if key == "vocab" else "tokenizer_config.json"
    content = json.loads((folder / "tokenizer" / name).read_text())
    if key == "vocab":
        content["model"]["vocab"]["a"] = value
    else:
        content[key] = value
    (folder / "tokenizer" / name).write_text(json.dumps(content))
    assert text in problem_of(folder)
    chosen = config(pretrained_model_name_or_path=folder)
    with pytest.raises(ConfigError, match=re.escape(text)):
        empty_base(chosen, FAMILY, torch.float32)


@pytest.mark.parametrize("template", ["{% if %}", "x" * 100_001])
def test_a_chat_template_that_is_none(template: str, tmp_path: Path) -> None:
    PIPELINES["flux2-klein"]().save_pretrained(tmp_path)
    (tmp_path / "tokenizer/chat_template.jinja").write_text(template)
    assert "cannot be used: " in problem_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "most"),
    [("tokenizer.json", 64 << 20), ("additional_chat_templates/a.jinja", 1 << 20)],
)
def test_files_beside_the_weights_that_are_too_large(
    name: str, most: int, base: Path, tmp_path: Path
) -> None:
    """Their libraries would read them whole."""
    folder = shutil.copytree(base, tmp_path / "base")
    path = folder / "tokenizer" / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.truncate(path, 8 << 30)  # which takes no space
    text = f"{path} has more than {most:,} bytes. It is damaged"
    assert text in problem_of(folder)
    chosen = config(pretrained_model_name_or_path=folder)
    with pytest.raises(ConfigError, match=re.escape(text)):
        empty_base(chosen, FAMILY, torch.float32)


def test_a_tokenizer_that_would_make_very_many_tokens(tmp_path: Path) -> None:
    """T5's, which would fill the memory."""
    PIPELINES["stable-diffusion-3"]().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_3/tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"extra_ids": 10**9}))
    assert f"{path}: its extra_ids is 1000000000; it must be from 0 to 10000" in problem_of(
        tmp_path
    )


def test_a_vocabulary_without_letters_and_without_its_token_for_them(
    base: Path, tmp_path: Path
) -> None:
    """A prompt with such a letter would end the run."""
    folder = shutil.copytree(base, tmp_path / "base")
    path = folder / "tokenizer/tokenizer.json"
    content = json.loads(path.read_text())
    assert "\u00f4" not in content["model"]["vocab"]  # a byte that some letters begin with
    del content["model"]["vocab"]["<|endoftext|>"]
    path.write_text(json.dumps(content))
    assert "Unk token `<|endoftext|>` not found in the vocabulary" in problem_of(folder)


def test_a_tokenizer_that_cannot_pad(tmp_path: Path) -> None:
    PIPELINES["flux2-klein"]().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer/tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"pad_token": None}))
    assert "padding token" in problem_of(tmp_path)
