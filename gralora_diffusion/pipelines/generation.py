"""Images generated with a pipeline, and what they say of how they were generated."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from gralora_diffusion.families import find_pipeline_family, mend_clip_skip
from gralora_diffusion.io.file_names import WEIGHTS_NAME, public_name, real_path
from gralora_diffusion.io.image_parameters import ImageParameters

from .editing import control_arguments


def generate(
    pipe: Any,
    prompts: Sequence[str],
    images_per_prompt: int = 1,
    *,
    seed: int = 0,
    size: int | tuple[int, int] | None = None,
    negative_prompt: str | None = None,
    guidance_scale: float | None = None,
    inference_steps: int = 30,
    max_sequence_length: int | None = None,
    clip_skip: int | None = None,
    controls: Sequence[Sequence[Image.Image]] = (),
    control_resolution: int | None = None,
    image_guidance_scale: float | None = None,
    batch_size: int = 1,
    progress: bool = False,
) -> list[list[Image.Image]]:
    """Generate images, a list per prompt. Image i of each prompt starts from noise of ``seed + i``.

    The modules return to the mode they were in. The images use random generators of their own, so
    generating them in the middle of a training does not change the training.

    Args:
        size: pixels per side, or height and width; the pipeline's own if None.
        negative_prompt: what guidance steers away from, for pipelines that take it.
        guidance_scale: the pipeline's own if None.
        max_sequence_length: maximum number of tokens of a prompt, for pipelines that take it.
        clip_skip: layers to skip at the end of CLIP, for pipelines that take it.
        controls: control images of each prompt, for an edit pipeline.
        control_resolution: see :func:`control_arguments`.
        image_guidance_scale: guidance by the control image; the pipeline's own if None.
        batch_size: images to generate at once, for one prompt or several; one by one with
            ``controls``.
        progress: show bars for the images and for the steps of each.
    """
    import torch
    from tqdm.auto import tqdm

    options: dict[str, Any] = {"num_inference_steps": inference_steps}
    if guidance_scale is not None:
        options["guidance_scale"] = guidance_scale
    if max_sequence_length is not None:
        options["max_sequence_length"] = max_sequence_length
    if clip_skip is not None:
        mend_clip_skip(pipe)
        options["clip_skip"] = clip_skip
    if image_guidance_scale is not None:
        options["image_guidance_scale"] = image_guidance_scale
    sides = (size, size) if isinstance(size, int) else size
    if sides is not None and not controls:
        options["height"], options["width"] = sides
    batch_size = 1 if controls else batch_size
    wanted = [(prompt, seed + i) for prompt in prompts for i in range(images_per_prompt)]
    images: list[Image.Image] = []
    bar = tqdm(total=len(wanted), desc="generating", unit="image", disable=not progress)
    with generation_mode(pipe), bar:
        if progress:
            pipe.set_progress_bar_config(desc="steps", position=1, leave=False)
        for start in range(0, len(wanted), batch_size):
            batch, seeds = zip(*wanted[start : start + batch_size], strict=True)
            generators = [torch.Generator().manual_seed(s) for s in seeds]
            if negative_prompt:
                options["negative_prompt"] = [negative_prompt] * len(batch)
            if controls:
                own = controls[start // images_per_prompt]
                options |= control_arguments(pipe, own, sides, control_resolution)
            # by name, because some pipelines take an image before the prompt
            images += pipe(prompt=list(batch), generator=generators, **options).images
            bar.update(len(batch))
    starts = range(0, len(images), images_per_prompt)
    return [images[start : start + images_per_prompt] for start in starts]


def parameters_of(
    pipe: Any,
    prompts: Sequence[str],
    images_per_prompt: int = 1,
    *,
    base: str,
    adapter: str | None = None,
    scale: float | None = None,
    seed: int = 0,
    negative_prompt: str | None = None,
    guidance_scale: float | None = None,
    inference_steps: int = 30,
    clip_skip: int | None = None,
    **others: Any,
) -> list[list[ImageParameters]]:
    """Return what :func:`generate` generates with these arguments, in the same lists.

    Args:
        base, adapter: where they came from; of a local file or folder, only the name is kept.
        scale: the adapter's strength.
        others: further arguments of :func:`generate`, which the images show themselves.
    """
    taken = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    if guidance_scale is None and taken is not None:
        guidance_scale = taken.default
    if adapter and Path(adapter).name == WEIGHTS_NAME:  # says nothing, as all have it
        adapter = str(real_path(adapter).parent)
    family = find_pipeline_family(type(pipe).__name__)
    shared = ImageParameters(
        prompt="",
        seed=seed,
        steps=inference_steps,
        negative_prompt=negative_prompt or "",
        guidance_scale=guidance_scale,
        guidance_is_distilled=_takes_guidance(pipe),
        # the layer that is read, where the last is 1
        clip_skip=clip_skip and clip_skip + ((family and family.skipped_layers) or 0) + 1,
        scheduler=type(pipe.scheduler).__name__,
        base=public_name(base),
        adapter=public_name(adapter) if adapter else None,
        scale=scale if adapter else None,
    )
    return [
        [replace(shared, prompt=prompt, seed=seed + i) for i in range(images_per_prompt)]
        for prompt in prompts
    ]


def _takes_guidance(pipe: Any) -> bool:
    """Whether the denoiser was distilled to take the guidance scale as an input."""
    denoiser = getattr(pipe, "transformer", None)
    return bool(denoiser is not None and getattr(denoiser.config, "guidance_embeds", False))


def takes_negative_prompt(pipeline_class: type) -> bool:
    """Whether a negative prompt has an effect in pipelines of this class under :func:`generate`.

    Some pipelines, such as FLUX.1's, only use it with a guidance of its own (``true_cfg_scale``).
    """
    parameters = inspect.signature(pipeline_class.__call__).parameters
    return "negative_prompt" in parameters and "true_cfg_scale" not in parameters


@contextmanager
def generation_mode(pipe: Any) -> Iterator[None]:
    """Inside, every module is in evaluation mode and no progress bar is shown."""
    from torch import nn

    modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.train, module.training)
            module.eval()
        stack.callback(pipe.set_progress_bar_config, **getattr(pipe, "_progress_bar_config", {}))
        pipe.set_progress_bar_config(disable=True)
        yield
