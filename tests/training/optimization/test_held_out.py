"""The loss of held-out images, against diffusers' parts, and what a run remembers of it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from scipy import stats

from gralora_diffusion.base_models.loading import find_base_family
from gralora_diffusion.training.checkpoints.store import CheckpointStore
from gralora_diffusion.training.data.data_module import find_images
from gralora_diffusion.training.data.held_out import find_held_out_images
from gralora_diffusion.training.data.seeds import generator, seed_from
from gralora_diffusion.training.loop import Trainer
from gralora_diffusion.training.optimization.held_out import HeldOutRecord, Losses
from gralora_diffusion.training.optimization.objectives import DDPM, FlowMatching
from gralora_diffusion.training.runtime.acceleration import (
    accelerate_left_as_it_was,
    make_accelerator,
)
from tests.training.runs import config, make_shapes


def measuring(**options: Any) -> Trainer:
    """A trainer whose adapter has random values."""
    chosen = config(**options)
    trainer = Trainer(
        chosen,
        find_base_family(chosen),
        find_images(chosen),
        [],
        make_accelerator(chosen),
        CheckpointStore(chosen.output_dir),
        held_out=find_held_out_images(chosen, {}),
    )
    trainer.set_up()
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    return trainer


@pytest.mark.parametrize(
    "changes",
    [
        {"held_out_noises": 2, "lora_dropout": 0.5, "random_flip": True, "caption_dropout": 0.9},
        {"cache_latents": False, "train_text_encoder": True, "input_perturbation": 0.5},
        {"train_batch_size": 1, "snr_gamma": 3.0},
    ],
    ids=["noises", "text encoder", "weights"],
)
def test_losses_are_those_of_diffusers(
    base: Path, images: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    held_out = make_shapes(tmp_path / "held out", [(20, 16), (16, 16), (16, 24)], seed=7)
    with accelerate_left_as_it_was():
        trainer = measuring(
            pretrained_model_name_or_path=base,
            instance_data_dir=images,
            held_out_data_dir=held_out,
            output_dir=tmp_path / "out",
            seed=3,
            **changes,
        )
        state = torch.get_rng_state()
        modes = [module.training for module in trainer.step.modules()]
        adapted = trainer.held_out_loss.measure(adapted=True)
        bare = trainer.held_out_loss.measure(adapted=False)
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in trainer.step.modules()] == modes
    plain = StableDiffusionPipeline.from_pretrained(base)
    assert bare == expected(trainer, plain)
    trained = copy.copy(plain)
    trained.unet, trained.text_encoder = trainer.pipe.unet.eval(), trainer.pipe.text_encoder.eval()
    assert adapted == expected(trainer, trained)
    assert all(
        a != b
        for ours, theirs in zip(adapted, bare, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )


@torch.no_grad()
def expected(trainer: Trainer, pipe: Any) -> Any:
    """Each image's loss at each level, computed one by one."""
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    seed, gamma = seed_from(3, "held out"), trainer.config.snr_gamma
    embeds, _ = pipe.encode_prompt(["a sks dog"], "cpu", 1, False)
    losses = []
    for example in trainer.held_out:
        width, height = example.size
        left, top = (width - 16) // 2, (height - 16) // 2
        picture = example.load().crop((left, top, left + 16, top + 16))
        pixels = pipe.image_processor.preprocess(picture)
        posterior = pipe.vae.encode(pixels).latent_dist
        row = []
        for level, timestep in enumerate((833, 500, 166)):
            found = []
            for number in range(trainer.config.held_out_noises):
                position = 3 * seed_from(example.content_key, number) + level
                shape = posterior.mean.shape[1:]
                eps = torch.randn(shape, generator=generator(seed, "posterior", position))
                latents = (posterior.mean + posterior.std * eps) * pipe.vae.config.scaling_factor
                noise = torch.randn(shape, generator=generator(seed, "noise", position))[None]
                a = scheduler.alphas_cumprod[timestep]
                noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
                prediction = pipe.unet(noisy, torch.tensor([timestep]), embeds).sample
                snr = a / (1 - a)
                weight = 1.0 if gamma is None else float(min(snr, gamma) / snr)
                found.append(weight * float((prediction - noise).square().mean()))
            row.append(pytest.approx(fmean(found), rel=1e-4))
        losses.append(row)
    return losses


def test_levels_are_within_the_trained_ones() -> None:
    ddpm = DDPM(DDPMScheduler().config, timestep_range=(200, 500))
    assert ddpm.levels((4, 8, 8)).tolist() == [450, 350, 250]
    scheduler = {"shift": 1.0, "num_train_timesteps": 1000, "use_dynamic_shifting": False}
    plain = FlowMatching(scheduler, lambda shape: 0.0)
    assert plain.levels((4, 8, 8)).tolist() == pytest.approx([834, 500, 167], abs=1)
    # the shift by resolution moves them as it moves what is trained
    shifted = FlowMatching(scheduler | {"use_dynamic_shifting": True}, lambda shape: math.log(3))
    sigmas = [3 * s / (1 + 2 * s) for s in (0.834, 0.5, 0.167)]
    assert shifted.levels((4, 8, 8)).tolist() == pytest.approx([1000 * s for s in sigmas], abs=2)


# -- the record ------------------------------------------------------------------------------------


def rows(*losses: float) -> Losses:
    """Losses of images that differ between levels."""
    return [[loss - 0.5, loss, loss + 0.5] for loss in losses]


BASE = rows(1.0, 2.0, 3.0, 4.0)


def test_differences_and_their_interval_are_paired_over_images() -> None:
    record = HeldOutRecord("digest", BASE)
    assert record.of_best() is None
    measured = record.add(10, rows(0.9, 1.8, 2.9, 3.6))
    assert measured is not None
    low, high = stats.t.interval(0.95, 3, -0.2, stats.sem([-0.1, -0.2, -0.1, -0.4]))
    assert measured.difference == pytest.approx((-0.2, low, high))
    assert (measured.loss, measured.base) == pytest.approx((2.3, 2.5))
    assert measured.levels == pytest.approx({"early": -0.2, "middle": -0.2, "late": -0.2})
    assert record.of_best() == measured
    assert measured.to_log()["held_out/low"] == pytest.approx(low)
    json.dumps(measured.to_dict(), allow_nan=False)


def test_worse_in_a_row_by_more_than_the_interval() -> None:
    record, counts = HeldOutRecord("digest", BASE), []
    for step, losses in enumerate(
        [
            rows(0.9, 1.9, 2.9, 3.9),
            rows(0.5, 1.5, 2.5, 3.6),  # the best
            rows(0.6, 1.6, 2.6, 3.7),  # worse, and all alike
            rows(0.5, 1.5, 2.6, 3.9),  # worse in the mean, but not by the interval
            rows(0.7, 1.7, 2.7, 3.8),
            rows(0.7, 1.8, 2.8, 3.8),
            rows(0.5, 1.5, 2.5, 3.5),  # the best again
        ]
    ):
        record.add(step, losses)
        counts.append((record.best_step, record.worse))
    assert counts == [(0, 0), (1, 0), (1, 1), (1, 0), (1, 1), (1, 2), (6, 0)]


def test_one_image_has_no_interval_and_never_counts_as_worse() -> None:
    record = HeldOutRecord("digest", rows(1.0))
    record.add(0, rows(0.5))
    measured = record.add(1, rows(0.9))
    assert measured is not None
    assert measured.difference == pytest.approx((-0.1, None, None))
    assert "low" not in " ".join(measured.to_log())
    assert record.worse == 0


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_left_out(wrong: float) -> None:
    record = HeldOutRecord("digest", BASE)
    record.add(0, rows(0.5, 1.5, 2.5, 3.5))
    before = record.to_dict()
    assert record.add(1, [*BASE[:3], [1.0, wrong, 1.0]]) is None
    assert record.to_dict() == before


def test_a_record_is_resumed_exactly_or_not_at_all() -> None:
    record = HeldOutRecord("digest", BASE)
    for step in range(3):
        record.add(step, rows(*(0.1 * step + number / 3 for number in range(4))))
    kept = json.loads(json.dumps(record.to_dict()))
    again = HeldOutRecord("digest")
    assert again.resume(kept)
    assert again.to_dict() == record.to_dict()
    assert not HeldOutRecord("another").resume(kept)
    assert not HeldOutRecord("digest").resume(None)
    assert HeldOutRecord("digest").resume(HeldOutRecord("digest").to_dict())  # nothing measured yet


@pytest.mark.parametrize(
    "damage",
    [
        {"base": None},
        {"base": [[1.0, 2.0]]},
        {"base": [[1.0, 2.0, math.inf]]},
        {"base": [[1.0, 2.0, 1e308]]},
        {"base": BASE[:2]},
        {"best": {"a": 1}},
        {"best_step": -1},
        {"best_step": None},
        {"worse": True},
        {"worse": "3"},
    ],
    ids=str,
)
def test_a_damaged_record_is_refused(damage: dict[str, Any]) -> None:
    values = HeldOutRecord("digest", BASE, 3, BASE, 1).to_dict()
    for broken in ({**values, **damage}, {k: v for k, v in values.items() if k not in damage}):
        with pytest.raises(ValueError, match="held-out losses are damaged"):
            HeldOutRecord("digest").resume(broken)
