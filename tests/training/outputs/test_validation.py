"""Drawing in the middle of a training: where the encoders are, and in which precision."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageOps
from torch import nn

from gralora_diffusion.base_models.loading import existing_models
from gralora_diffusion.families import get_family
from gralora_diffusion.pipelines.generation import generate, takes_negative_prompt
from gralora_diffusion.training.config.validation_prompts import (
    ValidationPrompt,
    validation_prompts,
)
from gralora_diffusion.training.outputs import validation
from gralora_diffusion.training.outputs.validation import (
    encoding_apart,
    generate_validation,
    of_one_shape,
)
from gralora_diffusion.training.outputs.validation_history import write_history
from tests.models import PIPELINES
from tests.training.runs import config, make_images, run

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

    @contextmanager
    def computing(device: Any, models: list[nn.Module], *, streamed: bool) -> Iterator[None]:
        with moved(*models, device=device):
            yield

    monkeypatch.setattr(validation, "offload_models", moved)
    monkeypatch.setattr(validation, "computing_on", computing)
    encoders = existing_models(pipe, get_family(name).all_text_encoders)
    options: dict[str, Any] = {"size": 32, "inference_steps": 2}
    expected = generate(pipe, ["a dog", "a cat"], 2, **options)
    with encoding_apart(pipe, encoders, CPU):
        drawn = generate(pipe, ["a dog", "a cat"], 2, **options)
    for ours, theirs in zip(chain(*drawn), chain(*expected), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    # each prompt once, klein's empty one too, and each image
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
    grid = generate_validation(
        pipe, family, chosen, validation_prompts(chosen), 3, Accelerator(cpu=True)
    )
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


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_images_with_the_same_settings_are_generated_together(name: str, tmp_path: Path) -> None:
    """Up to the batch size, over prompts; the images are those generated one by one."""
    pipe, family = PIPELINES[name](), get_family(name)
    entries = [ValidationPrompt(prompt=text) for text in ("a dog", "a cat", "a bird")]
    entries.append(ValidationPrompt(prompt="a fish", scale=0.5))
    shared = config(
        validation_prompt="-", num_validation_images=2, validation_inference_steps=2, resolution=32
    )
    images, batches = [], []
    for size in (1, 4):
        sizes: list[int] = []
        hook = getattr(pipe, family.denoiser).register_forward_pre_hook(
            lambda _, given, named, sizes=sizes: sizes.append(
                len(given[0] if given else named["hidden_states"])
            ),
            with_kwargs=True,
        )
        chosen = replace(shared, output_dir=str(tmp_path / str(size)), validation_batch_size=size)
        grid = generate_validation(pipe, family, chosen, entries, 0, Accelerator(cpu=True))
        hook.remove()
        paths = sorted(grid.parent.glob("??-??.png"))
        images.append([np.asarray(Image.open(path), dtype=int) for path in paths])
        batches.append(sizes)
        said = [json.loads(Image.open(path).info["gralora_diffusion"]) for path in paths]
        assert [(i["prompt"], i["seed"], i["scale"]) for i in said] == [
            (entry.prompt, chosen.seed + number, entry.scale)
            for entry in entries
            for number in range(2)
        ]
    assert not pipe.vae.use_slicing
    assert sum(batches[0]) == sum(batches[1])
    assert len(batches[0]) * 3 == len(batches[1]) * 8  # 4 and 2 of one strength, 2 of another
    for alone, together in zip(*images, strict=True):
        assert abs(alone - together).max() <= 1


def test_strength_0_is_the_base_alone_with_a_trained_text_encoder(
    base: Path, tmp_path: Path
) -> None:
    """The same prompt is encoded at each strength."""
    entry = "- {prompt: a cat, seed: 7, num_inference_steps: 2"
    (tmp_path / "prompts.yaml").write_text(f"{entry}}}\n{entry}, scale: 0}}\n")
    out = run(
        output_dir=tmp_path / "out",
        pretrained_model_name_or_path=base,
        instance_data_dir=make_images(tmp_path / "images"),
        train_text_encoder=True,
        text_encoder_lr=0.1,
        validation_prompts_file=tmp_path / "prompts.yaml",
        num_validation_images=1,
    )
    pipe = StableDiffusionPipeline.from_pretrained(base)
    rows = []
    for load in (False, True):
        if load:
            pipe.load_gralora_weights(out)
        rng = torch.Generator().manual_seed(7)
        made = pipe("a cat", generator=rng, width=16, height=16, num_inference_steps=2)
        rows.insert(0, made.images[0].tobytes())
    (folder,) = (out / "validation").glob("step-*6")
    found = [Image.open(folder / f"{row:02d}-00.png").tobytes() for row in range(2)]
    assert found == rows
    assert rows[0] != rows[1]


def test_each_prompt_of_a_file_has_its_own_settings(base: Path, tmp_path: Path) -> None:
    """As diffusers generates with them; strength 0 is the base alone."""
    (tmp_path / "prompts.yaml").write_text(
        "- {prompt: a cat, seed: 7, width: 32, height: 24, guidance_scale: 2, "
        "num_inference_steps: 3, negative_prompt: snow, scale: 0}\n"
        "- {prompt: a cat, seed: 7, width: 32, height: 24, guidance_scale: 2, "
        "num_inference_steps: 3, negative_prompt: snow, scale: 0.5}\n"
    )
    out = run(
        output_dir=tmp_path / "out",
        pretrained_model_name_or_path=base,
        instance_data_dir=make_images(tmp_path / "images"),
        validation_prompt="a dog",
        validation_prompts_file=tmp_path / "prompts.yaml",
        num_validation_images=1,
        validation_inference_steps=2,
        validation_steps=3,
    )
    pipe = StableDiffusionPipeline.from_pretrained(base)

    def generated() -> bytes:
        rng = torch.Generator().manual_seed(7)
        size: dict[str, Any] = {"width": 32, "height": 24, "num_inference_steps": 3}
        return (
            pipe("a cat", generator=rng, guidance_scale=2.0, negative_prompt="snow", **size)
            .images[0]
            .tobytes()
        )

    folder = out / "validation" / "step-000006"
    found = [Image.open(folder / f"{row:02d}-00.png") for row in range(3)]
    assert found[0].size == (16, 16)
    assert found[1].tobytes() == generated()
    pipe.load_gralora_weights(out)
    assert found[2].tobytes() != generated()
    pipe.set_adapters("default", 0.5)
    assert found[2].tobytes() == generated()
    assert json.loads(found[2].info["gralora_diffusion"])["scale"] == 0.5

    # the images over the steps, beside the curve: prompts below each other, steps side by side
    history = Image.open(out / "validation_over_time.png").convert("RGB")
    for column, step in enumerate((0, 3, 6)):
        image = Image.open(out / "validation" / f"step-{step:06d}" / "02-00.png")
        height = round(192 * 24 / 32)
        box = (112 + column * 200, 8 + 2 * (height + 8))
        shown = history.crop((*box, box[0] + 192, box[1] + height))
        fitted = ImageOps.fit(image, shown.size, Image.Resampling.NEAREST)
        assert shown.tobytes() == fitted.tobytes()


def test_images_of_several_sizes_are_whole_in_a_grid() -> None:
    small, wide = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (12, 8), "blue")
    ((first,), (second,)) = of_one_shape([[small], [wide]])
    assert second is wide
    assert first.size == wide.size
    assert [first.getpixel((x, 0)) for x in (1, 2, 9, 10)] == [
        *((255, 255, 255), (255, 0, 0)),
        *((255, 0, 0), (255, 255, 255)),
    ]


def test_images_over_time_of_damaged_files(tmp_path: Path) -> None:
    """What cannot be read is white; validations with other prompts are left out."""
    assert write_history(tmp_path) is None
    for step, prompts in ((0, "old\n"), (5, "a\nb\n"), (7, "a\nb\n")):
        folder = tmp_path / "validation" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "prompts.txt").write_text(prompts)
        Image.new("RGB", (8, 8), "red").save(folder / "00-00.png")
        (folder / "01-00.png").write_bytes(b"no image")
    path = write_history(tmp_path)
    assert path is not None
    history = Image.open(path).convert("RGB")
    colors = [history.getpixel((112 + c * 200 + 9, 9 + r * 200)) for r in (0, 1) for c in (0, 1)]
    assert colors == [(255, 0, 0)] * 2 + [(255, 255, 255)] * 2
    assert history.width == 112 + 2 * 200
