"""The images of a validation: generated, written as files, given to the trackers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import free_memory, offload_models
from PIL import Image
from torch import Tensor, nn

from gralora_diffusion.base_models.loading import existing_models
from gralora_diffusion.base_models.streaming import computing_on
from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.image_parameters import ImageParameters, save_png
from gralora_diffusion.pipelines.editing import editing_pipeline
from gralora_diffusion.pipelines.generation import (
    generate,
    labelled_grid,
    parameters_of,
    takes_negative_prompt,
)
from gralora_diffusion.training.config.training_config import TrainingConfig
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
    step: int,
    accelerator: Accelerator,
    *,
    controls: Sequence[Sequence[Image.Image]] = (),
    stream_encoders: bool = False,
    stops: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Generate images for the validation prompts with the current weights; return the grid's path.

    Nothing that training depends on is changed. Only the first process writes files, if several
    generate the same images; the others return None. So does the first one if ``stops()`` becomes
    true before the images are complete.

    Args:
        controls: control images of each prompt.
    """
    if any(controls):
        pipe = editing_pipeline(pipe, family)
    prompts, negative = config.validation_prompt or [], config.validation_negative_prompt
    height = config.validation_height or config.resolution
    width = config.validation_width or config.resolution
    encoders = existing_models(pipe, family.all_text_encoders)
    options: dict[str, Any] = {
        "images_per_prompt": config.num_validation_images,
        "seed": config.seed,
        "size": (height, width) if height and width else None,
        "negative_prompt": negative if takes_negative_prompt(type(pipe)) else None,
        "guidance_scale": config.validation_guidance_scale,
        "inference_steps": config.validation_inference_steps,
        "max_sequence_length": family.max_sequence_length and config.max_sequence_length,
        "clip_skip": config.clip_skip,
        "controls": controls if any(controls) else (),
    }
    try:
        with (
            accelerator.autocast(),
            encoding_apart(pipe, encoders, accelerator.device, streamed=stream_encoders),
            _stopped_when(stops, getattr(pipe, family.denoiser)),
        ):
            images = generate(pipe, prompts, **options)
    except _Stopped:
        logger.info("the validation images of step %d are left out, because the run stops", step)
        return None
    finally:
        free_memory()
    if not accelerator.is_main_process:
        return None
    adapter = config.hub_model_id or Path(config.output_dir).resolve().name
    base = config.pretrained_model_name_or_path
    parameters = parameters_of(pipe, prompts, base=base, adapter=adapter, scale=1.0, **options)
    folder = Path(config.output_dir) / VALIDATION_NAME
    return save_and_track(images, parameters, folder, step, accelerator)


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
    try:
        yield
    finally:
        delattr(pipe, name)
        del pipe.vae.decode, pipe.vae.encode


def image_name(row: int, column: int) -> str:
    """Return the file name of an image of the prompt ``row``."""
    return f"{row:02d}-{column:02d}.png"


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
    (target / PROMPTS_NAME).write_text("\n".join(prompts) + "\n", encoding="utf-8")
    grid, widest = target / GRID_NAME, max(image.width for images in rows for image in images)
    seeds = [f"seed {described.seed}" for described in parameters[0]]
    cell = min(max(widest, 128), _CELL)
    labelled_grid(list(zip(prompts, rows, strict=True)), seeds, cell).save(grid)
    for tracker in accelerator.trackers:
        for prompt, images in zip(prompts, rows, strict=True):
            stack = np.stack([np.asarray(image.convert("RGB")) for image in images])
            if tracker.name == "tensorboard":
                tracker.log_images({f"validation/{prompt}": stack}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({f"validation/{prompt}": stack}, step=step)
    return grid
