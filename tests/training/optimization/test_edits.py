"""What an editing base is trained on, against the call of its own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.pipelines.flux import pipeline_flux_kontext
from PIL import Image, ImageOps
from torch import Tensor

from gralora_diffusion.training.data.seeds import generator
from gralora_diffusion.training.loop import Trainer
from gralora_diffusion.training.optimization.step import mean_loss
from gralora_diffusion.training.runtime.acceleration import accelerate_left_as_it_was
from tests import pipeline_classes
from tests.training.optimization.test_step import make_trainer, predicted, sigma_of_the_pipeline
from tests.training.runs import make_shapes

CLASSES = {
    "StableDiffusionInstructPix2PixPipeline": 1,
    "StableDiffusionXLInstructPix2PixPipeline": 1,
    "FluxKontextPipeline": 1,
    "Flux2Pipeline": 2,
    "Flux2KleinPipeline": 2,
}
#: Training images have this size when they are resized, control images this many times more.
WIDTH, HEIGHT, TIMES = 22, 16, 5
SEED = 7


@pytest.fixture(autouse=True)
def _small_kontext(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kontext's sizes, (width, height), but small enough for tiny models; one is not square."""
    sizes = [(24, 40), (32, 32), (40, 24)]
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", sizes)


@pytest.fixture(scope="module", params=CLASSES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / request.param
    pipeline_classes.build(request.param).save_pretrained(folder)
    return folder


def edit_trainer(base: Path, folder: Path, times: int = TIMES, **options: Any) -> Trainer:
    make_shapes(folder / "images", [(WIDTH, HEIGHT)] * 3)
    count = CLASSES[base.name]
    for number in range(count):
        sizes = [(WIDTH * times, HEIGHT * times)] * 3
        make_shapes(folder / f"control {number}", sizes, seed=number + 1)
    given = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": folder / "images",
        "control_data_dir": [folder / f"control {number}" for number in range(count)],
        "output_dir": folder / "out",
        "random_flip": True,
        "cached_crops": 2,
        "seed": SEED,
    }
    return make_trainer(**(given | options))


@pytest.mark.parametrize("options", [{}, {"cache_latents": False}, {"control_resolution": 128}])
def test_loss_and_gradient_are_those_of_the_pipeline(
    base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Sizes, order and ids of control images, their crops and flips, guidance: all in one call."""
    if "control_resolution" in options and "Pix2Pix" in base.name:
        pytest.skip("it edits pixel by pixel")
    rows, times = (1, 10) if "control_resolution" in options else (3, TIMES)
    with accelerate_left_as_it_was():
        trainer = edit_trainer(base, tmp_path, times, train_batch_size=rows, **options)
        (batch, _) = next(trainer.data.steps(0, 1))
        built = trainer.batch_builder.build(batch)
        loss = mean_loss(trainer.step(built), built)
        gradient = torch.autograd.grad(loss, trainer.parameters, materialize_grads=True)
        losses = [loss_by_the_pipeline(trainer, batch, row) for row in range(rows)]
    assert len(built) == 1
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    wanted = torch.autograd.grad(expected, trainer.parameters, materialize_grads=True)
    for ours, theirs in zip(gradient, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def loss_by_the_pipeline(trainer: Trainer, batch: dict[str, Any], row: int) -> Tensor:
    """The loss of a sample: the edit pipeline called for one step from its noisy latents."""
    position = batch["positions"][row]
    number, variant = drawn(trainer, position)
    images = [
        read(trainer, number, folder, variant)
        for folder in ("images", *(f"control {n}" for n in range(CLASSES[of(trainer)])))
    ]
    pipe = pipeline_classes.diffusers.__dict__[of(trainer)](**parts(trainer))
    target = 2 * torch.tensor(list(images[0].tobytes())).view(16, 16, 3).permute(2, 0, 1) / 255 - 1
    latents = encoded(pipe, target[None].float(), position)
    noise = torch.randn(latents.shape[1:], generator=generator(SEED, "noise", position))[None]
    rng = generator(SEED, "timestep", position)
    call: dict[str, Any] = {"guidance_scale": 3.5 if of(trainer) in GUIDED else 1.0}
    if side := trainer.config.control_resolution:  # of larger, square crops
        images[1:] = [image.resize((side, side), Image.Resampling.LANCZOS) for image in images[1:]]
        call |= {"_auto_resize": False} if trainer.family.name == "flux" else {}
    call["image"] = images[1:] if len(images) > 2 else images[1]
    prompt, denoiser = batch["prompts"][row], trainer.family.denoiser
    if trainer.family.objective == "ddpm":
        t = torch.randint(1000, (1,), generator=rng)
        pipe.scheduler = At.from_config(pipe.scheduler.config)
        pipe.scheduler.wanted = t.tolist()
        noisy = pipe.scheduler.add_noise(latents, noise, t)
        if "original_size" in pipeline_classes.inspect.signature(pipe.__call__).parameters:
            call |= {"height": 16, "width": 16, "original_size": (HEIGHT, WIDTH)}
            call["crops_coords_top_left"] = (variant.top, variant.left)
        prediction = predicted(pipe, denoiser, prompt, noisy, call)
        return (prediction - noise).square().mean()
    index = int(torch.rand((), generator=rng) * 1000)
    call |= {"sigmas": [1 - index / 1000]}
    if trainer.family.name == "flux":
        call["max_area"] = 16 * 16
    sigma = sigma_of_the_pipeline(pipe, call, 16, 16)
    noisy, wanted = (1 - sigma) * latents + sigma * noise, noise - latents
    if trainer.family.name == "flux":
        noisy = pipe._pack_latents(noisy, *noisy.shape)
        wanted = pipe._pack_latents(wanted, *wanted.shape)
    else:
        wanted = pipe._pack_latents(wanted)
    call |= {"height": 16, "width": 16}
    prediction = predicted(pipe, denoiser, prompt, noisy, call)[:, : wanted.shape[1]]
    return (prediction - wanted).square().mean()


GUIDED = ("FluxKontextPipeline", "Flux2Pipeline")


class At(DDPMScheduler):
    """Takes one step at a wanted timestep, since the pipeline does not take any."""

    wanted: list[int]

    def set_timesteps(self, *arguments: Any, **options: Any) -> None:
        super().set_timesteps(timesteps=self.wanted)


def of(trainer: Trainer) -> str:
    return Path(trainer.config.pretrained_model_name_or_path).name


def parts(trainer: Trainer) -> dict[str, Any]:
    cls = pipeline_classes.diffusers.__dict__[of(trainer)]
    wanted = pipeline_classes.inspect.signature(cls.__init__).parameters
    own = {key: part for key, part in trainer.pipe.components.items() if key in wanted}
    return own | {"requires_safety_checker": False} if "safety_checker" in wanted else own


def drawn(trainer: Trainer, position: int) -> tuple[int, Any]:
    """The number of the image at a position, and its variant."""
    data = trainer.data.instance
    ((plan,),) = (part.plans for part in data.parts)
    number = data.stream.index(position)
    example = data.examples[number]
    rng = generator(SEED, "variant of instance", position)
    if data.cache is None:
        return number, plan.draw(example.size, rng)
    kept = plan.kept(example.size, example.content_key, 2, SEED)
    return number, kept[int(torch.randint(len(kept), (), generator=rng))]


def read(trainer: Trainer, number: int, folder: str, variant: Any) -> Image.Image:
    """The part of an image that a variant shows, at the size that its pipeline gets."""
    path = Path(str(trainer.config.instance_data_dir)).parent / folder / f"{number}.png"
    image: Image.Image = Image.open(path)
    if folder != "images" and trainer.family.objective == "ddpm":
        image = image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    times = image.width // WIDTH
    left = WIDTH - variant.left - 16 if variant.flip else variant.left
    image = image.crop((times * left, 0, times * (left + 16), times * 16))
    return ImageOps.mirror(image) if variant.flip else image


def encoded(pipe: Any, pixels: Tensor, position: int) -> Tensor:
    if type(pipe).__name__.startswith("Flux2"):
        return pipe._encode_vae_image(pixels, generator=None)
    posterior = pipe.vae.encode(pixels).latent_dist
    eps = torch.randn(posterior.mean.shape[1:], generator=generator(SEED, "posterior", position))
    shift = pipe.vae.config.shift_factor or 0.0
    return (posterior.mean + posterior.std * eps - shift) * pipe.vae.config.scaling_factor


def test_samples_without_control_images(base: Path, tmp_path: Path) -> None:
    """Which ones they are depends on the position; the denoiser gets the pipeline's empty ones."""
    with accelerate_left_as_it_was():
        trainer = edit_trainer(base, tmp_path, control_dropout=0.5, train_batch_size=8)
        (batch, _) = next(trainer.data.steps(0, 1))
        rows = trainer.batch_builder.build(batch)
        losses = trainer.step(rows)
    purpose = "control dropout of instance"
    dropped = [
        float(torch.rand((), generator=generator(SEED, purpose, position))) < 0.5
        for position in batch["positions"]
    ]
    assert 0 < sum(dropped) < 8
    assert [not controls for controls in batch["controls"]] == dropped
    assert losses.shape == (8,)
    assert losses.isfinite().all()
    if trainer.family.objective == "ddpm":  # in place of the latents are zeros
        (group,) = rows
        assert [not bool(control.any()) for control in group.images["control_0"]] == dropped
        return
    without = next(group for group in rows if "control_0" not in group.images)
    assert without.instances == sum(dropped)
    assert sum(group.instances for group in rows) == 8


def test_the_teacher_sees_the_same_control_images(base: Path, tmp_path: Path) -> None:
    with accelerate_left_as_it_was():
        trainer = edit_trainer(
            base,
            tmp_path,
            with_prior_preservation=True,
            prior_source="teacher",
            class_prompt="a dog",
        )
        (rows,) = trainer.batch_builder.build(*next(trainer.data.steps(0, 1)))
        with torch.no_grad():
            for parameter in trainer.parameters:
                parameter.zero_()
            losses = trainer.step([rows])
    controls = rows.images["control_0"]
    assert torch.equal(controls[: rows.instances], controls[rows.instances :])
    # of twice as many rows at once, rounded differently
    assert float(losses[rows.instances :].max()) < 1e-10 < float(losses[: rows.instances].min())
