"""One training step against the same computation written with diffusers' own parts."""

from __future__ import annotations

import inspect
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor

from gralora_diffusion.base_models.loading import find_base_family
from gralora_diffusion.families import get_family
from gralora_diffusion.training.checkpoints.store import CheckpointStore
from gralora_diffusion.training.data.data_module import find_class_images, find_images
from gralora_diffusion.training.data.seeds import generator, seed_from
from gralora_diffusion.training.loop import Trainer
from gralora_diffusion.training.optimization.step import mean_loss
from gralora_diffusion.training.runtime.acceleration import (
    accelerate_left_as_it_was,
    make_accelerator,
)
from tests.models import PIPELINES, stable_diffusion
from tests.training.runs import config, make_shapes

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def make_trainer(**options: Any) -> Trainer:
    chosen = config(**options)
    store = CheckpointStore(chosen.output_dir)
    images, classes = find_images(chosen), find_class_images(chosen)
    family = find_base_family(chosen)
    trainer = Trainer(chosen, family, images, classes, make_accelerator(chosen), store)
    trainer.set_up()
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    return trainer


def expected_loss(
    trainer: Trainer, batch: dict[str, Any], seed: int, scheduler: Any, offset: float, gamma: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean weighted loss, noisy latents and timesteps of a batch of images."""
    pipe = trainer.pipe
    posterior = pipe.vae.encode(batch["pixel_values"]).latent_dist
    latents, noises, timesteps = [], [], []
    for row, t in enumerate(batch["positions"]):
        shape = posterior.mean.shape[1:]
        eps = torch.randn(shape, generator=generator(seed, "posterior", t))
        latents.append(posterior.mean[row] + posterior.std[row] * eps)
        rng = generator(seed, "noise", t)
        noise = torch.randn(shape, generator=rng)
        if offset:
            noise = noise + offset * torch.randn(4, 1, 1, generator=rng)
        noises.append(noise)
        timesteps.append(int(torch.randint(1000, (), generator=generator(seed, "timestep", t))))
    x = torch.stack(latents) * pipe.vae.config.scaling_factor
    noise, steps = torch.stack(noises), torch.tensor(timesteps)
    a = scheduler.alphas_cumprod[steps].view(-1, 1, 1, 1)
    noisy = a.sqrt() * x + (1 - a).sqrt() * noise
    embeds, _ = pipe.encode_prompt(batch["prompts"], "cpu", 1, False)
    prediction = pipe.unet(noisy, steps, embeds).sample
    kind = scheduler.config.prediction_type
    targets = {"epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x, "sample": x}
    errors = (prediction - targets[kind]).square().mean((1, 2, 3))
    if gamma is not None:
        snr = (a / (1 - a)).flatten()
        smaller = torch.minimum(snr, torch.tensor(float(gamma)))
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(())}[kind]
        errors = errors * smaller / divisor
    return errors.mean(), noisy, steps


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-xl", "flux"])
def test_the_next_rows_do_not_wait_for_the_gpu(
    name: str, tmp_path: Path, saved_base: Callable[[str], Path]
) -> None:
    base = saved_base(name)
    with accelerate_left_as_it_was():
        trainer = make_trainer(
            pretrained_model_name_or_path=base,
            instance_data_dir=make_shapes(tmp_path / "pictures", [(32, 32)] * 3),
            output_dir=tmp_path / "out",
            resolution=32,
            with_prior_preservation=True,
            class_prompt="a dog",
            class_data_dir=make_shapes(tmp_path / "class", [(32, 32)] * 2, seed=1),
            num_class_images=2,
        )
        batches = trainer.data.steps(0, 3)
        trainer.batch_builder.build(*next(batches))  # the scheduler's tables are copied once
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.batch_builder.build(*next(batches))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"snr_gamma": 3, "noise_offset": 0.2, "train_text_encoder": True},
        {"prior": "images", "snr_gamma": 3},
        {"prior": "teacher", "train_text_encoder": True},
        {"zero_terminal": True, "snr_gamma": 3},
        {"prior": "images", "aspect_ratio_buckets": "16,24;24,16", "train_text_encoder": True},
    ],
    ids=["plain", "snr-offset-text", "images", "teacher", "zero-terminal-snr", "two-shapes"],
)
def test_loss_and_gradient_of_a_step(
    base: Path, images: Path, tmp_path: Path, prediction: str, options: dict[str, Any]
) -> None:
    options = dict(options)
    prior, zero = options.pop("prior", None), options.pop("zero_terminal", False)
    if zero and prediction == "epsilon":
        pytest.skip("epsilon says nothing of the picture at zero terminal SNR")
    if zero:
        base = shutil.copytree(base, tmp_path / "base")
        DDPMScheduler(rescale_betas_zero_snr=True).save_pretrained(base / "scheduler")
    if prior:
        options |= {
            "with_prior_preservation": True,
            "prior_source": prior,
            "prior_loss_weight": 0.3,
        }
        options["class_prompt"] = "a dog"
    if prior == "images":
        options["class_data_dir"] = make_shapes(tmp_path / "class", [(20, 27)] * 3, seed=4)
        options["num_class_images"] = 3
    with accelerate_left_as_it_was():
        trainer = make_trainer(
            pretrained_model_name_or_path=base,
            instance_data_dir=images,
            output_dir=tmp_path / "out",
            prediction_type=prediction,
            cache_latents=False,
            seed=7,
            **options,
        )
        instance, classes = next(trainer.data.steps(0, 1))
        groups = trainer.batch_builder.build(instance, classes)
        two = "aspect_ratio_buckets" in options
        shapes = [(8, 12), (12, 8)] if two else [(8, 8)]
        assert [tuple(rows.noisy_latents.shape[2:]) for rows in groups] == shapes
        loss = mean_loss(trainer.step(groups), groups)
        gradient = torch.autograd.grad(loss, trainer.parameters)

    scheduler = DDPMScheduler.from_pretrained(
        base, subfolder="scheduler", prediction_type=prediction
    )
    values = (scheduler, options.get("noise_offset", 0.0), options.get("snr_gamma"))
    expected, noisy, steps = expected_loss(trainer, instance, 7, *values)
    if prior == "images":
        expected = (
            expected + 0.3 * expected_loss(trainer, classes, seed_from(7, "class"), *values)[0]
        )
    if prior == "teacher":
        fresh = StableDiffusionPipeline.from_pretrained(base)
        prompts = ["a dog"] * len(noisy)
        with torch.no_grad():
            embeds, _ = fresh.encode_prompt(prompts, "cpu", 1, False)
            taught = fresh.unet(noisy, steps, embeds).sample
        embeds, _ = trainer.pipe.encode_prompt(prompts, "cpu", 1, False)
        drift = (trainer.pipe.unet(noisy, steps, embeds).sample - taught).square()
        expected = expected + 0.3 * drift.mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    wanted = torch.autograd.grad(expected, trainer.parameters)
    for ours, theirs in zip(gradient, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    "options",
    [{}, {"train_text_encoder": True}, {"aspect_ratio_buckets": "16,32"}],
    ids=["plain", "text", "wide"],
)
@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_loss_and_gradient_of_every_family(
    images: Path,
    tmp_path: Path,
    name: str,
    options: dict[str, Any],
    saved_base: Callable[[str], Path],
) -> None:
    """Against the pipeline's own call, with its scheduler's noise, a sample at a time."""
    family = get_family(name)
    trains_text = "train_text_encoder" in options
    if trains_text and not family.text_encoders:
        pytest.skip("its text encoder stays frozen")
    base = saved_base(name)
    with accelerate_left_as_it_was():
        trainer = make_trainer(
            pretrained_model_name_or_path=base,
            instance_data_dir=images,
            output_dir=tmp_path / "out",
            cache_latents=False,
            seed=7,
            text_encoders=list(family.text_encoders) if trains_text else None,
            weighting_scheme="cosmap" if family.objective == "flow_matching" else None,
            **options,
        )
        (batch, _) = next(trainer.data.steps(0, 1))
        rows = trainer.batch_builder.build(batch)
        loss = trainer.step(rows).mean()
        gradient = torch.autograd.grad(loss, trainer.parameters, materialize_grads=True)
    losses = [loss_by_the_pipeline(trainer, batch, row, 7) for row in range(len(batch["prompts"]))]
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    wanted = torch.autograd.grad(expected, trainer.parameters, materialize_grads=True)
    # a few have no effect: of some encoders the last layer is not read, and text ends in SD 3's
    # last block
    assert sum(bool(g.any()) for g in wanted) > 0.85 * len(wanted)
    for ours, theirs in zip(gradient, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def loss_by_the_pipeline(trainer: Trainer, batch: dict[str, Any], row: int, seed: int) -> Tensor:
    """The loss of a sample: the pipeline called for one step from its noisy latents."""
    weight, prediction, target = step_by_the_pipeline(trainer, batch, row, seed)
    return weight * (prediction - target).square().mean()


def step_by_the_pipeline(
    trainer: Trainer, batch: dict[str, Any], row: int, seed: int, pipe: Any = None, **inputs: Any
) -> tuple[float, Tensor, Tensor]:
    """A sample's weight, prediction and target, as tokens if the denoiser takes tokens.

    Args:
        pipe: predicts in place of the trainer's.
        inputs: further arguments of its call.
    """
    pipe, position = pipe or trainer.pipe, batch["positions"][row]
    latents = encoded_by_the_pipeline(trainer, batch["pixel_values"][row : row + 1], position)
    noise = torch.randn(latents.shape[1:], generator=generator(seed, "noise", position))[None]
    height, width = batch["target_sizes"][row].tolist()
    rng = generator(seed, "timestep", position)
    distilled = getattr(getattr(pipe, trainer.family.denoiser).config, "guidance_embeds", False)
    call: dict[str, Any] = {"guidance_scale": 3.5 if distilled else 1.0, **inputs}
    if trainer.family.objective == "ddpm":
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        t = torch.randint(1000, (1,), generator=rng)
        call["timesteps"] = t.tolist()
        noisy = pipe.scheduler.add_noise(latents, noise, t)
        target, weight = noise, 1.0
    else:
        index = int(torch.rand((), generator=rng) * 1000)
        call["sigmas"] = [1 - index / 1000]
        # a first call, to see where the pipeline's own shift takes that noise level
        sigma = sigma_of_the_pipeline(pipe, call, height, width)
        noisy = (1 - sigma) * latents + sigma * noise
        target = noise - latents
        weight = 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    if "original_size" in inspect.signature(pipe.__call__).parameters:
        call["original_size"] = tuple(batch["original_sizes"][row].tolist())
        call["crops_coords_top_left"] = tuple(batch["crop_top_lefts"][row].tolist())
    target = as_tokens(trainer, target)
    if trainer.family.name == "flux":
        noisy = pipe._pack_latents(noisy, *noisy.shape)
    prediction = predicted(
        pipe,
        trainer.family.denoiser,
        batch["prompts"][row],
        noisy,
        {**call, "height": height, "width": width},
    )
    return weight, prediction, target


def as_tokens(trainer: Trainer, latents: Tensor) -> Tensor:
    """Latents as the pipeline gives them to a denoiser that takes tokens."""
    if trainer.family.name == "flux":
        return trainer.pipe._pack_latents(latents, *latents.shape)
    if trainer.family.name.startswith("flux2"):
        return trainer.pipe._pack_latents(latents)
    return latents


def encoded_by_the_pipeline(trainer: Trainer, pixels: Tensor, position: int) -> Tensor:
    pipe = trainer.pipe
    if hasattr(pipe, "_encode_vae_image"):
        return pipe._encode_vae_image(pixels, generator=None)
    posterior = pipe.vae.encode(pixels).latent_dist
    eps = torch.randn(posterior.mean.shape[1:], generator=generator(7, "posterior", position))
    shift = pipe.vae.config.shift_factor or 0.0
    return (posterior.mean + posterior.std * eps - shift) * pipe.vae.config.scaling_factor


def sigma_of_the_pipeline(pipe: Any, call: dict[str, Any], height: int, width: int) -> float:
    inputs = {name: value for name, value in call.items() if name != "generator"}
    pipe(prompt="", height=height, width=width, output_type="latent", **inputs)
    return float(pipe.scheduler.sigmas[0])


def predicted(pipe: Any, denoiser: str, prompt: str, latents: Tensor, call: dict[str, Any]) -> Any:
    """What the denoiser says when the pipeline is called for one step, with gradients."""
    seen: list[Tensor] = []
    hook = getattr(pipe, denoiser).register_forward_hook(
        lambda module, args, output: seen.append(output[0])
    )
    try:
        # undecorated, for the pipelines forbid gradients
        inspect.unwrap(type(pipe).__call__)(
            pipe, prompt=prompt, latents=latents, output_type="latent", **call
        )
    finally:
        hook.remove()
    (prediction,) = seen
    return prediction


def test_teacher_rows_are_the_bases_predictions_whatever_the_adapter(
    base: Path, images: Path, tmp_path: Path
) -> None:
    """Also under mixed precision, where both must round alike: else there is a loss at step 0."""
    with accelerate_left_as_it_was():
        trainer = make_trainer(
            pretrained_model_name_or_path=base,
            instance_data_dir=images,
            output_dir=tmp_path / "out",
            mixed_precision="bf16",
            with_prior_preservation=True,
            prior_source="teacher",
            class_prompt="a dog",
        )
        with torch.no_grad():
            for parameter in trainer.parameters:
                parameter.zero_()
            rows = trainer.batch_builder.build(*next(trainer.data.steps(0, 1)))
            assert torch.equal(trainer.step(rows)[rows[0].instances :], torch.zeros(2))


def test_stable_diffusion_2_trains(images: Path, tmp_path: Path) -> None:
    pipe = stable_diffusion(use_linear_projection=True, attention_head_dim=(2, 4))
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path / "base")
    with accelerate_left_as_it_was():
        trainer = make_trainer(
            pretrained_model_name_or_path=tmp_path / "base",
            instance_data_dir=images,
            output_dir=tmp_path / "out",
            target_preset="attention+ff+proj",
        )
        objective: Any = trainer.batch_builder.step.objective
        assert objective.prediction_type == "v_prediction"
        rows = trainer.batch_builder.build(*next(trainer.data.steps(0, 1)))
        assert trainer.step(rows).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prompts_are_not_encoded_under_fp16_autocast(
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saved_base: Callable[[str], Path],
) -> None:
    """For T5's sake, which overflows in fp16 wherever autocast takes its fp32 weights there."""
    base = saved_base("flux")
    make_shapes(tmp_path / "pictures", [(32, 32)])
    with accelerate_left_as_it_was():
        trainer = make_trainer(
            pretrained_model_name_or_path=base,
            instance_data_dir=tmp_path / "pictures",
            output_dir=tmp_path / "out",
            train_text_encoder=True,
            resolution=32,
        )
        autocasts, encode = [], trainer.family.encode_prompts

        def spy(_: Any, *args: Any, **options: Any) -> Any:
            autocasts.append(torch.is_autocast_enabled("cpu"))
            return encode(*args, **options)

        monkeypatch.setattr(type(trainer.family), "encode_prompts", spy)
        with torch.autocast("cpu", dtype=dtype):
            losses = trainer.step(trainer.batch_builder.build(*next(trainer.data.steps(0, 1))))
    assert losses.isfinite().all()
    assert autocasts == [dtype == torch.bfloat16]
