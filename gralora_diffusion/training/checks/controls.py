"""Whether the control images of a run fit its base, before it is loaded and once it is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import diffusers
from PIL import Image

from gralora_diffusion.families import ControlCount, ModelFamily, reduced_size
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.pipelines.editing import (
    control_resolution_problem,
    control_size_problems,
    read_controls,
    read_fills,
)
from gralora_diffusion.training.config.data_options import ImageOptions
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.config.validation_prompts import (
    ValidationPrompt,
    validation_prompts,
)
from gralora_diffusion.training.data.control_crops import same_shape
from gralora_diffusion.training.data.image_folder import Example
from gralora_diffusion.training.data.sets import by_set

#: ``size_divisor`` of all published bases with control images of sizes of their own.
_USUAL_DIVISOR = 16
_PLACES = "--control_data_dir, --control_column or the column 'control' of a metadata file"


def check_controls(
    config: TrainingConfig,
    family: ModelFamily,
    pipeline_class: str | None,
    images: Sequence[Example],
) -> list[str]:
    """Check control images before the base is loaded.

    Args:
        pipeline_class: see ``find_pipeline_class``.

    Returns:
        Warnings about what the base will and will not learn.

    Raises:
        ConfigError: the base takes other control images than there are, or an option contradicts
            them. The error lists every problem.
    """
    given = any(image.controls for image in images)
    count = family.edit_pipelines.get(pipeline_class or "")
    problems: list[str] = []
    if config.control_dropout and not given:
        problems.append(
            f"--control_dropout is {config.control_dropout}, but {_no_controls()}. Leave it out, "
            f"or give them with {_PLACES}"
        )
    if config.control_resolution and not given:
        problems.append(
            f"--control_resolution is {config.control_resolution}, but {_no_controls()}. Leave it "
            f"out, or give them with {_PLACES}"
        )
    usual = next(iter(family.edit_pipelines.values()), ControlCount())
    if pipeline_class is None and not given:
        if problems:
            raise ConfigError(problems)
        return list(_unclear(family, given))  # the base is checked once it is loaded
    # a single file may be any base of the family. A folder may be an editing base under another
    # class if its denoiser looks like any other
    if pipeline_class is None or (count is None and given and not usual.aligned):
        count = usual
    problems += _misfits(count or ControlCount(), config, family, pipeline_class, images)
    if given and config.with_prior_preservation and config.prior_source == "images":
        problems.append(
            "--prior_source is 'images', but class images are generated from text alone and have "
            "no control images, so they would not preserve what the base does to those. Give "
            "--prior_source teacher"
        )
    fills = pipeline_class is not None and pipeline_class == family.inpainting_pipeline
    prompts = validation_prompts(config)
    _read_validation(config, prompts, count or ControlCount(), family, fills, problems)
    problems += _not_taken(config, family, count)
    if problems:
        raise ConfigError(problems)
    unclear = _unclear(family, given) if pipeline_class is None else ()
    return [*unclear, *_remarks(family, pipeline_class, images, count)]


def check_controls_of_base(
    config: TrainingConfig,
    family: ModelFamily,
    pipe: Any,
    images: Sequence[Example],
    prompts: Sequence[ValidationPrompt] | None = None,
) -> list[list[Image.Image]]:
    """Check control images again, now that the base is known.

    Args:
        prompts: for validation; by default they are read as the options say.

    Returns:
        The control images of each validation prompt, or its image and mask to fill.

    Raises:
        ConfigError: the base takes other control images than there are.
    """
    count = family.control_count(pipe)
    divisor = family.size_divisor(pipe)
    problems = list(_misfits(count, config, family, None, images, divisor))
    prompts = validation_prompts(config) if prompts is None else prompts
    controls = _read_validation(
        config, prompts, count, family, family.fills(pipe), problems, divisor
    )
    problems += _not_taken(config, family, count)
    if problems:
        raise ConfigError(problems)
    return controls


def check_sharded_controls(
    config: TrainingConfig, count: ControlCount, images: Sequence[Example]
) -> None:
    """Check that all processes of a sharded run compute the same number of passes.

    Samples whose prepared control images differ in number or size need a pass of their own, and in
    each pass the processes gather the base's parts together.

    Raises:
        ConfigError: they would not.
    """
    if count.aligned or not any(image.controls for image in images):
        return
    if len({tuple(control.size for control in image.controls) for image in images}) > 1:
        raise ConfigError(
            [
                "with FSDP, all images must have equally many control images of the same sizes, "
                "because the processes compute together. Resize them, or train without FSDP"
            ]
        )
    shapes = {
        _decides_shapes(own, image) for _, own, group in by_set(config, images) for image in group
    }
    if len(shapes) > 1:
        raise ConfigError(
            [
                "with FSDP, all images must have one shape if control images are cropped with "
                "them, because the processes compute together. Crop the images to one size, or "
                "train without FSDP"
            ]
        )
    if config.control_dropout:
        raise ConfigError(
            [
                f"--control_dropout is {config.control_dropout}, but with FSDP every sample of "
                "such a base needs its control images. Leave it out, or train without FSDP"
            ]
        )


def _decides_shapes(options: ImageOptions, image: Example) -> tuple[Any, ...]:
    """Return what the shapes of an image's prepared control images follow from.

    Those with the image's own shape are cropped with it, see ``ControlPlan``. So they follow from
    its aspect ratio too, and with buckets, from its number of pixels if these are few.
    """
    sizes = tuple(control.size for control in image.controls)
    cropped = tuple(same_shape(size, image.size) for size in sizes)
    if not any(cropped):
        return sizes, cropped
    assert options.resolution is not None
    (width, height), most = image.size, options.resolution**2
    pixels = min(width * height, most) if options.use_aspect_ratio_buckets else None
    return sizes, cropped, Fraction(width, height), pixels


def _read_validation(
    config: TrainingConfig,
    entries: Sequence[ValidationPrompt],
    count: ControlCount,
    family: ModelFamily,
    fills: bool,
    problems: list[str],
    divisor: int = _USUAL_DIVISOR,
) -> list[list[Image.Image]]:
    """Read what each validation prompt is generated from, besides its text."""
    prompts = [entry.prompt for entry in entries]
    if not prompts:
        return []
    if fills:
        side = config.resolution or 64  # which a run knows by the time it generates
        size = config.validation_height or side, config.validation_width or side
        options = ("validation_image", "validation_mask")
        images, masks = config.validation_image, config.validation_mask
        return read_fills(options, images, masks, prompts, size, problems)
    if config.validation_mask:
        problems.append(
            "--validation_mask needs a base for inpainting, which this base is not. Leave it out"
        )
    option = "validation_image"
    controls = read_controls(option, config.validation_image, prompts, count, problems)
    reduced = config.control_resolution
    problems += control_size_problems(option, controls, family, reduced, divisor)
    return controls


def _not_taken(
    config: TrainingConfig, family: ModelFamily, count: ControlCount | None
) -> Iterator[str]:
    """Yield options that the edit pipeline does not take, although others of the family do."""
    if config.clip_skip is None or not (count and count.most):
        return
    pipeline = next(iter(family.edit_pipelines))
    if "clip_skip" not in inspect.signature(getattr(diffusers, pipeline).__call__).parameters:
        yield f"--clip_skip is {config.clip_skip}, but {pipeline} does not take it. Leave it out"


def _misfits(
    count: ControlCount,
    config: TrainingConfig,
    family: ModelFamily,
    pipeline_class: str | None,
    images: Sequence[Example],
    divisor: int = _USUAL_DIVISOR,
) -> Iterator[str]:
    """Yield how the control images differ from those that a base takes.

    Args:
        divisor: the base's ``size_divisor``, once it is known.
    """
    base = f"this {family.name} base" + (f" ({pipeline_class})" if pipeline_class else "")
    names = [image.name for image in images]
    numbers = [len(image.controls) for image in images]
    if count.most == 0 and any(numbers):
        yield (
            f"{base} does not edit images, but there are control images for "
            f"{_some(names, numbers)}. Give an editing base such as FLUX.1 Kontext, FLUX.2 or "
            f"InstructPix2Pix, or leave out {_PLACES}"
        )
        return
    if any(numbers) and (problem := control_resolution_problem(config.control_resolution, count)):
        yield problem
    few = [name for name, number in zip(names, numbers, strict=True) if number < count.least]
    if len(few) == len(names):
        yield (
            f"{base} edits images: a sample needs {count}, and {_no_controls()}. Give the images "
            "before the edit with --control_data_dir"
        )
    elif few:
        yield f"{base} needs {count} for each image, and there is none for {first_few(few)}"
    many = [
        f"{name} ({number})"
        for name, number in zip(names, numbers, strict=True)
        if count.most is not None and number > count.most
    ]
    if many:
        yield f"{base} takes {count} for each image, and there are more for {first_few(many)}"
    for image, name in zip(images, names, strict=True):
        for control in image.controls:
            if count.aligned and not same_shape(control.size, image.size):
                yield (
                    f"{name} has {_shape(image.size)} pixels and its control image "
                    f"{_shape(control.size)}: this base needs both in one shape, because it edits "
                    "pixel by pixel. Crop one of them"
                )
            size = control.size
            # one of the same shape is cropped first, to a shape that all pipelines take
            if config.control_resolution and not same_shape(size, image.size):
                size = reduced_size(size, config.control_resolution, divisor)
            if problem := family.control_problem(size):
                small = "" if size == control.size else ", reduced by --control_resolution"
                yield f"the control image of {name}{small}: {problem}"


def _remarks(
    family: ModelFamily,
    pipeline_class: str | None,
    images: Sequence[Example],
    count: ControlCount | None,
) -> Iterator[str]:
    """Yield warnings about control images that can be trained on."""
    given = any(image.controls for image in images)
    if (
        pipeline_class in family.edit_pipelines
        and pipeline_class not in family.pipeline_classes[:1]
    ):
        if not given:
            yield (
                f"this base edits images ({pipeline_class}), but {_no_controls()}. It is trained "
                "to generate images from text alone, which can weaken its editing. To train an "
                "edit, give the images before it with --control_data_dir"
            )
    elif given and pipeline_class and pipeline_class not in family.edit_pipelines:
        yield (
            f"this base generates images from text ({pipeline_class}) and is trained as an editing "
            f"base, as {next(iter(family.edit_pipelines))} uses it. Load the adapter there"
        )
    whole = [
        image.name
        for image in images
        if any(not same_shape(control.size, image.size) for control in image.controls)
    ]
    if whole and count is not None and not count.aligned:
        yield (
            "control images of another shape than their training image are used whole, while "
            f"those of its shape are cropped with it ({len(whole)}): {first_few(whole)}"
        )


def _unclear(family: ModelFamily, given: bool) -> Iterator[str]:
    """Yield what a single file is taken for if its layers do not show what it is.

    Args:
        given: whether there are control images.
    """
    if not family.ambiguous_file_types:
        return
    edits, generates = next(iter(family.edit_pipelines)), family.pipeline_classes[0]
    there = "there are control images" if given else _no_controls()
    yield (
        f"a single file of {family.name} does not show whether it edits images ({edits}) or "
        f"generates them from text ({generates}), because both have the same layers. It is trained "
        f"to {'edit' if given else 'generate'} images, because {there}. To say what it is, give "
        "its own pipeline as --base_config: a folder or a Hub id"
    )


def _no_controls() -> str:
    return "there are no control images"


def _some(names: Sequence[str], numbers: Sequence[int]) -> str:
    return first_few([name for name, number in zip(names, numbers, strict=True) if number])


def _shape(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
