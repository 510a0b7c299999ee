"""Drawing in the middle of a training: where the encoders are, and in which precision."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from gralora_diffusion.base_models.loading import existing_models
from gralora_diffusion.families import get_family
from gralora_diffusion.pipelines.generation import generate, takes_negative_prompt
from gralora_diffusion.training.outputs import validation
from gralora_diffusion.training.outputs.validation import encoding_apart, generate_validation
from tests.models import PIPELINES
from tests.training.runs import config

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_encoders_are_on_the_device_only_while_they_compute(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, events = PIPELINES[name](), []

    @contextmanager
    def moved(*models: nn.Module, device: Any) -> Iterator[None]:
        assert device == CPU
        events.append(models)
        yield

    monkeypatch.setattr(validation, "offload_models", moved)
    encoders = existing_models(pipe, get_family(name).all_text_encoders)
    options: dict[str, Any] = {"size": 32, "inference_steps": 2}
    expected = generate(pipe, ["a dog", "a cat"], 2, **options)
    with encoding_apart(pipe, encoders, CPU):
        drawn = generate(pipe, ["a dog", "a cat"], 2, **options)
    for ours, theirs in zip(chain(*drawn), chain(*expected), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    # each prompt once, klein's empty one too, and each picture
    assert events.count((pipe.vae,)) == 4
    assert events.count(tuple(encoders)) == (3 if name == "flux2-klein" else 2)
    assert "encode_prompt" not in vars(pipe)
    assert "decode" not in vars(pipe.vae)


def test_what_overflows_in_fp16_is_not_under_its_autocast() -> None:
    """T5's ``wo``, which transformers keeps in fp32 for that, and the VAE, which is fp32."""
    pipe = PIPELINES["flux"]()
    pipe.text_encoder.half()
    pipe.text_encoder_2.half()
    with torch.no_grad():
        for name, module in pipe.text_encoder_2.named_modules():
            if name.endswith(".wo"):
                module.float().weight.mul_(1e7)
        pipe.vae.decoder.conv_in.weight.mul_(1e6)
        latents = torch.randn(1, 4, 4, 4, dtype=torch.float16)
        prompts: dict[str, Any] = {"prompt": ["a dog"], "prompt_2": None, "max_sequence_length": 8}
        embeddings = pipe.encode_prompt(**prompts)[0]
        image = pipe.vae.decode(latents.float()).sample
        assert embeddings.isfinite().all()
        with torch.autocast("cpu", dtype=torch.float16):
            assert not torch.equal(pipe.encode_prompt(**prompts)[0], embeddings)
            assert not pipe.vae.decode(latents).sample.isfinite().all()
            with encoding_apart(pipe, [], CPU):
                assert torch.equal(pipe.encode_prompt(**prompts)[0], embeddings)
                assert torch.equal(pipe.vae.decode(latents).sample, image)


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_size_and_negative_prompt(name: str, tmp_path: Path) -> None:
    """As the pipeline draws when it is given them; where it takes no such prompt, without."""
    pipe, family = PIPELINES[name](), get_family(name)
    chosen = config(
        output_dir=tmp_path,
        validation_prompt=["a dog", "a cat"],
        validation_negative_prompt="snow",
        num_validation_images=1,
        validation_height=48,
        validation_inference_steps=2,
        resolution=32,
    )
    grid = generate_validation(pipe, family, chosen, 3, Accelerator(cpu=True))
    takes = name.startswith("stable-diffusion")
    assert takes_negative_prompt(type(pipe)) == takes
    for row, prompt in enumerate(("a dog", "a cat")):
        expected = pipe(
            prompt=prompt,
            height=48,
            width=32,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(chosen.seed),
            **({"negative_prompt": "snow"} if takes else {}),
        ).images[0]
        drawn = Image.open(grid.parent / f"{row:02d}-00.png")
        assert drawn.size == (32, 48)
        assert drawn.tobytes() == expected.tobytes()
        said = json.loads(drawn.info["gralora_diffusion"])
        assert said["prompt"] == prompt
        assert said["negative_prompt"] == ("snow" if takes else "")
        assert (said["seed"], said["steps"], said["scale"]) == (chosen.seed, 2, 1.0)
        assert said["adapter"] == tmp_path.name
    shown = Image.open(grid)  # a labelled row for each prompt
    assert shown.size == (112 + 128 + 8, 8 + 2 * (192 + 8) + 44)
    for row in range(2):
        top = 8 + row * 200
        cell = shown.crop((112, top, 240, top + 192))
        image = Image.open(grid.parent / f"{row:02d}-00.png")
        assert cell.tobytes() == image.resize((128, 192), Image.Resampling.NEAREST).tobytes()
        label = shown.crop((0, top, 112, top + 192))
        assert label.getextrema() == ((0, 255),) * 3  # black text on white
