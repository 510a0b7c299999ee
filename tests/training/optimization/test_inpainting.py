"""Bases that fill: what reaches their denoiser, loss and gradient, by their own pipelines."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image, ImageChops, ImageOps
from torch import Tensor

from gralora_diffusion.adapters.adapter_file import read_adapter
from gralora_diffusion.families import get_family
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.pipelines import generation, sample_command
from gralora_diffusion.pipelines.editing import editing_pipeline, whole_fill
from gralora_diffusion.training.data.class_images import generate_class_images
from gralora_diffusion.training.data.seeds import generator
from gralora_diffusion.training.loop import Trainer
from gralora_diffusion.training.optimization.step import mean_loss
from gralora_diffusion.training.runtime.acceleration import accelerate_left_as_it_was
from tests.models import PIPELINES
from tests.originals import ORIGINALS, write
from tests.pipeline_classes import FILLING, build_filling
from tests.training.cards import draw_by_card
from tests.training.optimization.test_masked_loss import write_mask
from tests.training.optimization.test_step import as_tokens, make_trainer, step_by_the_pipeline
from tests.training.runs import assert_close, assert_same_run, config, make_images, run, run_two


def save_filling(name: str, folder: Path) -> Path:
    build_filling(name).save_pretrained(folder)
    return folder


def inpainting(pipe: Any, name: str) -> Any:
    filling = editing_pipeline(pipe, get_family(name))
    filling.set_progress_bar_config(disable=True)
    return filling


@pytest.fixture(scope="module", params=sorted(FILLING))
def filling(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_filling(request.param, tmp_path_factory.mktemp("filling") / request.param)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, of which two have masks with gray levels."""
    folder = make_images(tmp_path_factory.mktemp("masked"))
    for number in range(2):
        path = folder / f"{number}.mask.png"
        write_mask(path, number)
        Image.open(path).point(lambda level: 40 + level * 3 // 4).save(path)
    return folder


def trainer_of(base: Path, images: Path, tmp_path: Path, **options: Any) -> Trainer:
    return make_trainer(
        pretrained_model_name_or_path=base,
        instance_data_dir=images,
        output_dir=tmp_path / "out",
        seed=7,
        weighting_scheme="cosmap" if base.name == "flux" else None,
        **options,
    )


def pictures(batch: dict[str, Any], row: int) -> tuple[Image.Image, Image.Image]:
    """Image and mask of a sample, as a user gives them to a pipeline."""
    pixels = ((batch["pixel_values"][row] + 1) * 127.5).round().byte().permute(1, 2, 0)
    mask = (batch["fill_mask"][row, 0] * 255).byte()
    return Image.fromarray(pixels.numpy()), Image.fromarray(mask.numpy())


def prepared(pipe: Any, batch: dict[str, Any], row: int) -> tuple[Tensor, Tensor]:
    """What the pipeline makes of a sample's mask, and of the rest of its image."""
    image, mask = pictures(batch, row)
    height, width = batch["target_sizes"][row].tolist()
    init = pipe.image_processor.preprocess(image, height=height, width=width)
    mask = pipe.mask_processor.preprocess(mask, height=height, width=width)
    rng = generator(7, "masked image", batch["positions"][row])
    rest: tuple[Any, ...] = (height, width, torch.float32, torch.device("cpu"), rng)
    if hasattr(pipe, "transformer"):
        channels = pipe.vae.config.latent_channels
        mask, masked = pipe.prepare_mask_latents(mask, init * (1 - mask), 1, channels, 1, *rest)
        return mask, masked
    return pipe.prepare_mask_latents(mask, init * (mask < 0.5), 1, *rest, False)


@pytest.mark.parametrize("given", [None, True], ids=["random", "given"])
def test_what_reaches_the_denoiser_is_what_the_pipeline_makes(
    filling: Path, masked: Path, tmp_path: Path, given: bool | None
) -> None:
    with accelerate_left_as_it_was():
        trainer = trainer_of(
            filling, masked, tmp_path, train_batch_size=1, inpaint_given_masks=given
        )
        pipe = inpainting(trainer.pipe, filling.name)
        values = set()
        for batch, _ in islice(trainer.data.steps(0, 6), 6):
            (rows,) = trainer.batch_builder.build(batch)
            ours = (rows.images[name] for name in ("fill_mask", "masked_image"))
            for own, theirs in zip(ours, prepared(pipe, batch, 0), strict=True):
                if hasattr(pipe, "transformer"):
                    own = pipe._pack_latents(own, *own.shape)
                tolerance = 1e-5 * float(theirs.abs().max())
                torch.testing.assert_close(own, theirs, rtol=0, atol=tolerance)
            values |= set(batch["fill_mask"].unique().tolist())
    assert values == {0.0, 1.0}
    if given:
        levels = [np.asarray(Image.open(masked / f"{n}.mask.png")) for n in range(2)]
        assert {int(level) for mask in levels for level in np.unique(mask)} == {40, 231}


def test_loss_and_gradient(filling: Path, masked: Path, tmp_path: Path) -> None:
    """With the loss inside of the images' masks, and random ones to fill: they are two things."""
    with accelerate_left_as_it_was():
        trainer = trainer_of(filling, masked, tmp_path, train_batch_size=3, masked_loss=True)
        batch, _ = next(trainer.data.steps(0, 1))
        groups = trainer.batch_builder.build(batch)
        loss = mean_loss(trainer.step(groups), groups)
        gradient = torch.autograd.grad(loss, trainer.parameters, materialize_grads=True)
        weights = groups[0].latent_weights
    pipe = inpainting(trainer.pipe, filling.name)
    losses = []
    for row in range(3):
        image, mask = pictures(batch, row)
        rng = generator(7, "masked image", batch["positions"][row])
        inputs = {"image": image, "mask_image": mask, "generator": rng}
        if not hasattr(pipe, "transformer"):
            inputs["strength"] = 1.0
        weight, prediction, target = step_by_the_pipeline(trainer, batch, row, 7, pipe, **inputs)
        inside = weights[row : row + 1].expand_as(groups[0].target[row : row + 1])
        errors = as_tokens(trainer, inside) * (prediction - target).square()
        losses.append(weight * errors.mean())
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    wanted = torch.autograd.grad(expected, trainer.parameters, materialize_grads=True)
    for ours, theirs in zip(gradient, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_images_of_every_base_that_fills(filling: Path, masked: Path, tmp_path: Path) -> None:
    """By `gralora sample`: image and masks, one of them for all prompts, and whole images."""
    grid = tmp_path / "grid.png"
    command = ["--base", filling, "--output", grid, "--num_inference_steps", 2]
    if filling.name == "flux":
        command += ["--size", 32]
    prompts = ["--prompt", "a dog", "a cat"]
    given = ["--image", masked / "0.png", "--mask", masked / "0.mask.png", masked / "1.mask.png"]
    sample_command.main([str(part) for part in (*command, *prompts, *given)])
    with_images = Image.open(grid).tobytes()
    sample_command.main([str(part) for part in (*command, "--size", 32, *prompts)])
    assert Image.open(grid).tobytes() != with_images


def test_whole_images_start_from_noise_alone(filling: Path) -> None:
    """The image under a white mask leaves no trace, and no step is left out."""
    pipe = inpainting(DiffusionPipeline.from_pretrained(filling), filling.name)
    black, mask = whole_fill(32, 32)
    white = Image.new("RGB", black.size, "white")
    rows = [[black, mask], [white, mask]]
    made = generation.generate(pipe, ["a dog"] * 2, size=32, controls=rows, inference_steps=2)
    given = {"image": black, "mask_image": mask, "height": 32, "width": 32, "strength": 1.0}
    rng = torch.Generator().manual_seed(0)
    expected = pipe("a dog", num_inference_steps=2, generator=rng, **given).images[0]
    assert made[0][0].tobytes() == made[1][0].tobytes() == expected.tobytes()


def test_class_images_start_from_noise_alone(tmp_path: Path) -> None:
    family = get_family("stable-diffusion-xl")
    options = config(
        pretrained_model_name_or_path=save_filling(family.name, tmp_path / "base"),
        with_prior_preservation=True,
        class_prompt="a dog",
        class_data_dir=tmp_path / "class",
        num_class_images=1,
        seed=3,
    )
    generate_class_images(options, family, Accelerator(cpu=True))
    pipe = inpainting(DiffusionPipeline.from_pretrained(tmp_path / "base"), family.name)
    side = family.native_resolution(pipe)
    image, mask = whole_fill(side, side)
    rng = generator(3, "class image", 0)
    given = {"image": image, "mask_image": mask, "strength": 1.0, "generator": rng}
    expected = pipe("a dog", **given).images[0]
    made = Image.open(tmp_path / "class" / "class-00000.png")
    assert ImageChops.difference(made, expected).getbbox() is None


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["--image", "0.png"],
            "--image and --mask belong together: this base fills the white",
        ),
        (["--mask", "0.mask.png"], "--image and --mask belong together"),
        (["--image", "0.png", "--mask", "gone.png"], "--mask {}gone.png: there is no such file"),
        (
            ["--image", "0.png", "--mask", "2.png"],
            "--mask {}2.png cannot be decoded: it has",
        ),
        (
            ["--image", "0.png", "--mask", "wide.png"],
            "--mask has 30 x 20 pixels, but the image",
        ),
        (
            ["--image", "0.png", "1.png", "2.png", "--mask", "0.mask.png"],
            "--image names 3 images for 2 prompts",
        ),
    ],
)
def test_images_and_masks_that_do_not_fit(
    masked: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    problem: str,
) -> None:
    folder = shutil.copytree(masked, tmp_path / "images")
    write_mask(folder / "wide.png", 0, (30, 20))
    line = [a if a.startswith("--") else str(folder / a) for a in arguments]
    base = save_filling("stable-diffusion", tmp_path / "base")
    line += ["--base", str(base), "--output", str(tmp_path / "grid.png"), "--prompt", "a", "b"]
    with pytest.raises(SystemExit):
        sample_command.main(line)
    assert problem.format(f"{folder}/") in capsys.readouterr().err


def test_other_bases_take_no_masks(base: Path, masked: Path, tmp_path: Path) -> None:
    mask = masked / "0.mask.png"
    images = {"validation_prompt": "a dog", "validation_mask": mask}
    with pytest.raises(ConfigError, match="--validation_mask needs a base for inpainting"):
        run(
            pretrained_model_name_or_path=base,
            instance_data_dir=masked,
            output_dir=tmp_path / "out",
            **images,
        )
    line = ["--base", base, "--prompt", "a", "--output", tmp_path / "grid.png", "--mask", mask]
    with pytest.raises(SystemExit):
        sample_command.main([str(part) for part in line])


def test_other_bases_take_no_masks_to_fill(base: Path, masked: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--inpaint_given_masks needs a base for inpainting"):
        run(
            pretrained_model_name_or_path=base,
            instance_data_dir=masked,
            output_dir=tmp_path / "out",
            inpaint_given_masks=True,
        )


def test_a_base_that_fills_is_loaded_from_its_own_index(filling: Path) -> None:
    family = get_family(filling.name)
    pipe = DiffusionPipeline.from_pretrained(filling)
    assert type(pipe).__name__ == family.inpainting_pipeline
    assert family.fills(pipe)
    assert not family.fills(PIPELINES[filling.name]())


def test_a_run_is_resumed_and_shared_out(masked: Path, tmp_path: Path) -> None:
    """Class images are generated by the pipeline that fills, and have random masks themselves."""
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": save_filling("stable-diffusion", tmp_path / "base"),
        "instance_data_dir": masked,
        "inpaint_given_masks": True,
        "random_flip": True,
        "aspect_ratio_buckets": "16,24",
        "checkpointing_steps": 2,
        "max_train_steps": 4,
        "with_prior_preservation": True,
        "class_prompt": "a dog",
        "class_data_dir": tmp_path / "class",
        "num_class_images": 2,
        "adam_epsilon": 1e-4,
        "validation_prompt": "a dog",
        "validation_image": masked / "0.png",
        "validation_mask": masked / "0.mask.png",
        "validation_inference_steps": 2,
        "num_validation_images": 1,
        "validation_steps": 4,
    }
    whole = run(output_dir=tmp_path / "whole", **options)
    assert len(list((tmp_path / "class").glob("*.png"))) == 2
    parts = tmp_path / "parts"
    run(output_dir=parts, **{**options, "max_train_steps": 2})
    run(output_dir=parts, resume_from_checkpoint="latest", **options)
    assert_same_run(whole, parts)
    assert read_adapter(whole).metadata["gralora_fill_masks"] == "given"
    text = (whole / "README.md").read_text(encoding="utf-8")
    assert "| masks to fill | given |" in text
    places = {"path/to/base": tmp_path / "base", "path/to/this/folder": whole}
    places |= {"path/to/image.png": masked / "0.png", "path/to/mask.png": masked / "0.mask.png"}
    pipe = draw_by_card(text, places)
    assert type(pipe).__name__ == "StableDiffusionInpaintPipeline"
    # the last validation image, generated anew with image and mask of its size
    image = ImageOps.fit(Image.open(masked / "0.png"), (16, 16), Image.Resampling.LANCZOS)
    mask = ImageOps.fit(Image.open(masked / "0.mask.png"), (16, 16), Image.Resampling.LANCZOS)
    rng = torch.Generator().manual_seed(0)
    given = {"image": image, "mask_image": mask, "height": 16, "width": 16, "generator": rng}
    again = pipe("a dog", num_inference_steps=2, **given).images[0]
    last = Image.open(whole / "validation" / "step-000004" / "00-00.png")
    assert np.asarray(ImageChops.difference(again, last)).max() <= 1
    one = run(output_dir=tmp_path / "one", gradient_accumulation_steps=2, **options)
    assert_close(one, run_two(output_dir=tmp_path / "two", **options), 1e-3)


@pytest.mark.parametrize(
    ("name", "changes"), [("stable-diffusion", {}), ("stable-diffusion-xl", {"clip_g_layers": 10})]
)
def test_single_files(name: str, changes: dict[str, int], masked: Path, tmp_path: Path) -> None:
    """Recognized by their shapes, and completed from a pipeline of the same kind."""
    pipe = inpainting(PIPELINES[name](**FILLING[name], **changes), name)
    pipe.save_pretrained(tmp_path / "base")
    file = write(ORIGINALS[name](pipe), tmp_path / "base.safetensors")
    shared = {"instance_data_dir": masked, "max_train_steps": 2, "adam_epsilon": 1e-4}
    options = {"pretrained_model_name_or_path": file, "base_config": tmp_path / "base", **shared}
    alone = run(output_dir=tmp_path / "file", **options)
    options = {"pretrained_model_name_or_path": tmp_path / "base", **shared}
    # original files join the layers of some projections, which then round differently
    assert_close(alone, run(output_dir=tmp_path / "dir", **options), 1e-3)


def test_a_run_is_planned(
    filling: Path, masked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        pretrained_model_name_or_path=filling,
        instance_data_dir=masked,
        output_dir=tmp_path / "out",
        masked_loss=True,
        dry_run=True,
    )
    text = capsys.readouterr().out
    assert "for 2 images; outside the mask, the loss counts nothing" in text
    assert "vae" in text
