"""The images of a validation: generated, written as files, given to the trackers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import free_memory, offload_models
from PIL import Image, ImageOps
from torch import Tensor, nn

from gralora_diffusion.adapters.compatibility import gralora_layers
from gralora_diffusion.base_models.loading import existing_models
from gralora_diffusion.base_models.streaming import computing_on
from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.file_names import real_path
from gralora_diffusion.io.image_parameters import ImageParameters, save_png
from gralora_diffusion.pipelines.editing import editing_pipeline
from gralora_diffusion.pipelines.generation import generate, parameters_of, takes_negative_prompt
from gralora_diffusion.pipelines.grid import labelled_grid
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.config.validation_prompts import ValidationPrompt
from gralora_diffusion.training.data.truncation import reported_truncation
from gralora_diffusion.training.runtime.acceleration import without_fp16_autocast

from .published import GRID_NAME, PROMPTS_NAME, VALIDATION_NAME

logger = logging.getLogger(__name__)

#: Width of an image in the grid, in pixels, at most.
_CELL = 512


class _Stopped(Exception):
    """The images are not wanted any more."""


def generate_validation(
    pipe: Any,
    family: ModelFamily,
    config: TrainingConfig,
    prompts: Sequence[ValidationPrompt],
    step: int,
    accelerator: Accelerator,
    *,
    controls: Sequence[Sequence[Image.Image]] = (),
    stream_encoders: bool = False,
    stops: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Generate images for the prompts with the current weights; return the grid's path.

    Nothing that training depends on is changed. Only the first process writes files, if several
    generate the same images; the others return None. So does the first one if ``stops()`` becomes
    true before the images are complete.

    Args:
        controls: control images of each prompt.
    """
    if any(controls):
        pipe = editing_pipeline(pipe, family)
    adapter = config.hub_model_id or real_path(config.output_dir).name
    origin = {"base": config.pretrained_model_name_or_path, "adapter": adapter}
    encoders = existing_models(pipe, family.all_text_encoders)
    options = [_generation_options(pipe, family, config, entry) for entry in prompts]
    # guidance computes each image twice; a batch like that of a step fits, as it has no gradients
    size = config.validation_batch_size or max(1, config.train_batch_size // 2)
    images: list[list[Image.Image]] = []
    parameters: list[list[ImageParameters]] = []
    try:
        with accelerator.autocast(), _stopped_when(stops, getattr(pipe, family.denoiser)):
            for rows in _alike(prompts, options, bool(any(controls))):
                texts, scale = [prompts[row].prompt for row in rows], prompts[rows[0]].scale
                shared = options[rows[0]]
                own = [controls[row] for row in rows] if any(controls) else ()
                with (
                    _scaled(pipe, scale),  # of text encoders, too: outside of what is encoded
                    encoding_apart(pipe, encoders, accelerator.device, streamed=stream_encoders),
                ):
                    images += generate(pipe, texts, **shared, controls=own, batch_size=size)
                described: dict[str, Any] = {**origin, "scale": scale, **shared, "controls": own}
                parameters += parameters_of(pipe, texts, **described)
    except _Stopped:
        logger.info("the validation images of step %d are left out, because the run stops", step)
        return None
    finally:
        free_memory()
    if not accelerator.is_main_process:
        return None
    folder = Path(config.output_dir) / VALIDATION_NAME
    return save_and_track(images, parameters, folder, step, accelerator)


def _alike(
    prompts: Sequence[ValidationPrompt], options: Sequence[dict[str, Any]], have_controls: bool
) -> list[list[int]]:
    """Return the rows that can be generated together, one after the other."""

    def settings(row: int) -> tuple[Any, ...]:
        return prompts[row].scale, options[row], row if have_controls else None

    return [list(rows) for _, rows in groupby(range(len(prompts)), settings)]


def _generation_options(
    pipe: Any, family: ModelFamily, config: TrainingConfig, entry: ValidationPrompt
) -> dict[str, Any]:
    """Return how a prompt's images are generated: by its own settings, else by the options."""
    height = entry.height or config.validation_height or config.resolution
    width = entry.width or config.validation_width or config.resolution
    return {
        "images_per_prompt": _either(entry.images, config.num_validation_images),
        "seed": _either(entry.seed, config.seed),
        "size": (height, width) if height and width else None,
        "negative_prompt": negative_prompt_of(entry, config, type(pipe)),
        "guidance_scale": _either(entry.guidance_scale, config.validation_guidance_scale),
        "inference_steps": _either(entry.num_inference_steps, config.validation_inference_steps),
        "max_sequence_length": family.max_sequence_length and config.max_sequence_length,
        "clip_skip": config.clip_skip,
        "control_resolution": config.control_resolution,
    }


def negative_prompt_of(
    entry: ValidationPrompt, config: TrainingConfig, pipeline_class: type
) -> str | None:
    """Return the negative prompt of a validation prompt: its own, even if empty, or the options'.

    None if the pipeline takes none.
    """
    if not takes_negative_prompt(pipeline_class):
        return None
    negative: str | None = _either(entry.negative_prompt, config.validation_negative_prompt)
    return negative


def _either(own: Any, usual: Any) -> Any:
    return usual if own is None else own


@contextmanager
def _scaled(pipe: Any, scale: float) -> Iterator[None]:
    """Multiply the adapter's update by ``scale`` inside."""
    models = [model for model in pipe.components.values() if isinstance(model, nn.Module)]
    layers = [layer for model in models for layer in gralora_layers(model)]
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update({name: scale * value for name, value in layer.scaling.items()})
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


@contextmanager
def _stopped_when(stops: Callable[[], bool], denoiser: nn.Module) -> Iterator[None]:
    """Look before each step of the generation whether to stop."""

    def look(*_: Any) -> None:
        if stops():
            raise _Stopped

    hook = denoiser.register_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def encoding_apart(
    pipe: Any, encoders: Sequence[nn.Module], device: torch.device, *, streamed: bool = False
) -> Iterator[None]:
    """Move text encoders and VAE from the CPU to the device only while they compute, inside.

    With ``streamed``, of text encoders only the blocks that compute are there.
    Each prompt is encoded once. fp16 autocast is off for both.
    """
    # InstructPix2Pix's pipeline has no public one
    name = "encode_prompt" if hasattr(pipe, "encode_prompt") else "_encode_prompt"
    encode, encoded = getattr(pipe, name), {}
    decode, encode_image = pipe.vae.decode, pipe.vae.encode

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        key = repr((args, kwargs))
        if key not in encoded:
            with (
                computing_on(device, encoders, streamed=streamed),
                without_fp16_autocast(device),
                reported_truncation(pipe),
            ):
                encoded[key] = encode(*args, **kwargs)
        return encoded[key]

    def decode_latents(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        with offload_models(pipe.vae, device=device), without_fp16_autocast(device):
            # some pipelines have moved the latents to the CPU, where the VAE was
            return decode(latents.to(device, pipe.vae.dtype), *args, **kwargs)

    def encode_control(pixels: Tensor, *args: Any, **kwargs: Any) -> Any:
        with offload_models(pipe.vae, device=device), without_fp16_autocast(device):
            return encode_image(pixels.to(device, pipe.vae.dtype), *args, **kwargs)

    setattr(pipe, name, encode_prompt)
    pipe.vae.decode, pipe.vae.encode = decode_latents, encode_control
    slices, pipe.vae.use_slicing = pipe.vae.use_slicing, True  # images of a batch one by one
    try:
        yield
    finally:
        pipe.vae.use_slicing = slices
        delattr(pipe, name)
        del pipe.vae.decode, pipe.vae.encode


def image_name(row: int, column: int) -> str:
    """Return the file name of an image of the prompt ``row``."""
    return f"{row:02d}-{column:02d}.png"


def of_one_shape(rows: Sequence[Sequence[Image.Image]]) -> list[list[Image.Image]]:
    """Return the images of a grid with white margins where they differ in size, so none is cut."""
    sizes = {image.size for images in rows for image in images}
    whole = max(width for width, _ in sizes), max(height for _, height in sizes)

    def fitted(image: Image.Image) -> Image.Image:
        if image.size == whole:
            return image
        return ImageOps.pad(image.convert("RGB"), whole, color="white")

    return [[fitted(image) for image in images] for images in rows]


def save_and_track(
    rows: Sequence[Sequence[Image.Image]],
    parameters: Sequence[Sequence[ImageParameters]],
    folder: Path,
    step: int,
    accelerator: Accelerator,
) -> Path:
    """Write the images and their grid to ``folder/step-<step>`` and give them to the trackers.

    Args:
        rows: a row of images for each prompt.
        parameters: what each was generated with.

    Returns the path of the grid, which has a row per prompt.
    """
    prompts = [described[0].prompt for described in parameters]
    target = folder / f"step-{step:06d}"
    target.mkdir(parents=True, exist_ok=True)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            save_png(image, target / image_name(row, column), parameters[row][column])
    lines = [" ".join(prompt.split()) + "\n" for prompt in prompts]
    (target / PROMPTS_NAME).write_text("".join(lines), encoding="utf-8")
    grid, widest = target / GRID_NAME, max(image.width for images in rows for image in images)
    seeds = [[f"seed {described.seed}" for described in row] for row in parameters]
    alike = all(row == seeds[0] for row in seeds)
    labels = prompts if alike else [f"{p}\n{row[0]}" for p, row in zip(prompts, seeds, strict=True)]
    cell = min(max(widest, 128), _CELL)
    labelled = list(zip(labels, of_one_shape(rows), strict=True))
    labelled_grid(labelled, seeds[0] if alike else (), cell).save(grid)
    for tracker in accelerator.trackers:
        for row, (prompt, images) in enumerate(zip(prompts, rows, strict=True)):
            name = f"validation/{prompt}"
            if prompts.count(prompt) > 1:
                name += f" ({row})"
            stack = np.stack([np.asarray(image.convert("RGB")) for image in images])
            if tracker.name == "tensorboard":
                tracker.log_images({name: stack}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: stack}, step=step)
    return grid
