"""The loss of images with masks against the same computed with the pipelines' own parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from gralora_diffusion.families import get_family
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.loop import Trainer
from gralora_diffusion.training.optimization.masked_loss import MaskedLoss
from gralora_diffusion.training.optimization.step import mean_loss
from gralora_diffusion.training.runtime.acceleration import accelerate_left_as_it_was
from tests.models import PIPELINES
from tests.training.optimization.test_step import (
    as_tokens,
    make_trainer,
    step_by_the_pipeline,
)
from tests.training.runs import make_images

SIZE = (27, 20)


def write_mask(path: Path, seed: int, size: tuple[int, int] = SIZE) -> None:
    """White spots on black: pixels of noise, enlarged."""
    spots = np.random.default_rng(seed).integers(0, 2, (3, 4), dtype=np.uint8) * 255
    spots[0, 0], spots[2, 3] = 0, 255
    Image.fromarray(spots).resize(size, Image.Resampling.NEAREST).save(path)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, of which the first two have masks."""
    folder = make_images(tmp_path_factory.mktemp("masked"))
    for number in range(2):
        write_mask(folder / f"{number}.mask.png", number)
    return folder


def loss_and_gradient(
    trainer: Trainer, batch: dict[str, Any], classes: dict[str, Any] | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    groups = trainer.batch_builder.build(batch, classes)
    loss = mean_loss(trainer.step(groups), groups)
    return loss, torch.autograd.grad(loss, trainer.parameters, materialize_grads=True)


def by_blocks(mask: Tensor, height: int, width: int) -> Tensor:
    """The mean of each block of pixels, (rows, 1, height, width)."""
    pixels = mask.numpy().astype(np.float64)
    rows, _, high, wide = pixels.shape
    blocks = pixels.reshape(rows, height, high // height, width, wide // width)
    return torch.from_numpy(blocks.mean((2, 4))[:, None]).float()


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_every_family_keeps_to_the_base_outside(
    masked: Path, tmp_path: Path, name: str, saved_base: Callable[[str], Path]
) -> None:
    """Two errors in each latent: towards the image inside, towards the bare pipeline outside."""
    base = saved_base(name)
    family = get_family(name)
    with accelerate_left_as_it_was():
        trainer = make_trainer(
            pretrained_model_name_or_path=base,
            instance_data_dir=masked,
            output_dir=tmp_path / "out",
            cache_latents=False,
            seed=7,
            weighting_scheme="cosmap" if family.objective == "flow_matching" else None,
            train_batch_size=3,
            masked_loss=True,
            mask_outside="base",
            mask_outside_weight=0.3,
        )
        (batch, _) = next(trainer.data.steps(0, 1))
        loss, gradient = loss_and_gradient(trainer, batch)
        latents = trainer.batch_builder.build(batch)[0].target
    masks = by_blocks(batch["mask"], *latents.shape[2:]).expand_as(latents)
    assert 0 < float(masks.mean()) < 1
    bare = DiffusionPipeline.from_pretrained(base)
    losses, constants = [], []
    for row in range(3):
        m = as_tokens(trainer, masks[row : row + 1])
        weight, p, t = step_by_the_pipeline(trainer, batch, row, 7)
        with torch.no_grad():
            _, b, _ = step_by_the_pipeline(trainer, batch, row, 7, bare)
        w = 0.3 * (1 - m)
        losses.append(weight * (m * (p - t).square() + w * (p - b).square()).mean())
        constants.append(weight * (m * w / (m + w) * (t - b).square()).mean())
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(loss, expected - torch.stack(constants).mean(), rtol=1e-5, atol=0)
    wanted = torch.autograd.grad(expected, trainer.parameters, materialize_grads=True)
    for ours, theirs in zip(gradient, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_the_target_outside_is_that_of_frozen_text_encoders(
    base: Path, masked: Path, tmp_path: Path
) -> None:
    with accelerate_left_as_it_was():
        trainer = make_trainer(
            pretrained_model_name_or_path=base,
            instance_data_dir=masked,
            output_dir=tmp_path / "out",
            train_text_encoder=True,
            masked_loss=True,
            mask_outside="base",
        )
        batch, _ = next(trainer.data.steps(0, 1))
        batch["mask"] = torch.zeros_like(batch["mask"])
        (rows,) = trainer.batch_builder.build(batch)
    bare = StableDiffusionPipeline.from_pretrained(base)
    with torch.no_grad():
        embeds, _ = bare.encode_prompt(rows.prompts, "cpu", 1, False)
        expected = bare.unet(rows.noisy_latents, rows.timesteps, embeds).sample
    torch.testing.assert_close(rows.target, expected)


@pytest.mark.parametrize(
    ("outside", "normalize", "prior"),
    [
        ("ignore", False, "images"),
        ("ignore", True, None),
        ("weight", False, None),
        ("weight", True, "teacher"),
    ],
)
def test_with_snr_weights_and_a_prior(
    base: Path,
    images: Path,
    masked: Path,
    tmp_path: Path,
    outside: str,
    normalize: bool,
    prior: str | None,
) -> None:
    """Class images and the teacher's rows count as a whole, images without a mask too."""
    options: dict[str, Any] = {}
    if prior:
        options = {"with_prior_preservation": True, "class_prompt": "a dog", "prior_source": prior}
    if prior == "images":
        options |= {"class_data_dir": images, "num_class_images": 3}
    with accelerate_left_as_it_was():
        trainer = make_trainer(
            pretrained_model_name_or_path=base,
            instance_data_dir=masked,
            output_dir=tmp_path / "out",
            snr_gamma=3,
            train_batch_size=3,
            masked_loss=True,
            mask_outside=outside,
            mask_outside_weight=0.25 if outside == "weight" else None,
            normalize_masked_area_loss=True if normalize else None,
            **options,
        )
        batch, classes = next(trainer.data.steps(0, 1))
        (rows,) = trainer.batch_builder.build(batch, classes)
        losses = trainer.step([rows])
        predictions = trainer.pipe.unet(
            rows.noisy_latents, rows.timesteps, rows.encoded["prompt_embeds"]
        ).sample
    errors = (predictions - rows.target).square()
    weights = batch["mask"] if outside == "ignore" else 0.25 + 0.75 * batch["mask"]
    if normalize:
        weights = torch.stack([row / row.mean() for row in weights])
    snr = trainer.step.objective.weights(rows.timesteps)
    assert rows.instances == 3
    assert sum(bool((row == 1).all()) for row in batch["mask"]) == 1  # the image without a mask
    masked_losses = (weights * errors[:3]).mean((1, 2, 3)) * snr[:3]
    torch.testing.assert_close(losses[:3], masked_losses)
    torch.testing.assert_close(losses[3:], errors[3:].mean((1, 2, 3)) * snr[3:])
    assert len(losses) == (6 if prior else 3)


def test_nothing_outside_has_an_influence_by_the_target(
    base: Path, masked: Path, tmp_path: Path
) -> None:
    """Bit for bit. By the denoiser's input it has one: that is the whole noisy image."""
    with accelerate_left_as_it_was():
        trainer = make_trainer(
            pretrained_model_name_or_path=base,
            instance_data_dir=masked,
            output_dir=tmp_path / "out",
            masked_loss=True,
            train_text_encoder=True,
        )
        batch, _ = next(trainer.data.steps(0, 1))
        (rows,) = trainer.batch_builder.build(batch)
        outside = (rows.latent_weights == 0).expand_as(rows.target)
        assert 0 < float(outside.float().mean()) < 1
        before = torch.autograd.grad(trainer.step([rows]).sum(), trainer.parameters)
        rows.target[outside] = 1e3
        after = torch.autograd.grad(trainer.step([rows]).sum(), trainer.parameters)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        rows.target[~outside] += 1.0
        changed = torch.autograd.grad(trainer.step([rows]).sum(), trainer.parameters)
        assert not all(torch.equal(a, b) for a, b in zip(before, changed, strict=True))
        rows.latent_weights = torch.zeros_like(rows.latent_weights)
        nothing = torch.autograd.grad(trainer.step([rows]).sum(), trainer.parameters)
        assert not any(gradient.any() for gradient in nothing)


def test_samples_without_anything_inside_do_not_become_nan() -> None:
    masks = torch.zeros(2, 1, 2, 2)
    masks[1, 0, 0, 0] = 1
    target, base = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    ignored = MaskedLoss(0.0, towards_base=False, normalize=True)
    assert torch.equal(ignored.weights(masks), 4 * masks)
    taught = MaskedLoss(0.5, towards_base=True, normalize=True)
    assert torch.equal(taught.target(masks, target, base), torch.where(masks > 0, target, base))
    assert torch.equal(taught.weights(masks)[0], torch.ones(1, 2, 2))
    nothing = MaskedLoss(0.0, towards_base=True, normalize=True)
    assert nothing.target(masks, target, base).isfinite().all()


@pytest.mark.parametrize(
    ("options", "weight", "text"),
    [
        ({}, 0.0, "outside the mask, the loss counts nothing"),
        ({"mask_outside_weight": 0.5}, 0.0, "outside the mask, the loss counts nothing"),
        ({"mask_outside": "weight"}, 0.1, "the loss counts the image with weight 0.1"),
        (
            {"mask_outside": "base", "mask_outside_weight": 2.0},
            2.0,
            "the target is the base's prediction, with weight 2",
        ),
        ({"mask_outside": "base"}, 1.0, "the target is the base's prediction, with weight 1"),
    ],
)
def test_options(options: dict[str, Any], weight: float, text: str) -> None:
    masked_loss = MaskedLoss.of(TrainingConfig(**options))
    assert masked_loss.outside == weight
    assert text in str(masked_loss)
