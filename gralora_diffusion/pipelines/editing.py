"""A base as the pipeline that edits or fills images, and the images that it is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from gralora_diffusion.families import (
    LARGEST_CONTROL,
    SMALLEST_CONTROL,
    ControlCount,
    ModelFamily,
    find_pipeline_family,
    get_family,
    reduced,
    reduced_size,
)
from gralora_diffusion.io.file_names import nearby
from gralora_diffusion.io.image_files import ImageError, read_image, read_mask


def editing_pipeline(pipe: Any, family: ModelFamily) -> Any:
    """Return the family's pipeline for given images with the same models, or ``pipe`` itself.

    It is the one that fills for a base that does, and else the one for control images.
    """
    import diffusers

    fills = family.inpainting_pipeline if family.fills(pipe) else None
    names = [fills] if fills else list(family.edit_pipelines)
    # a pipeline that edits a masked part would need a mask, too
    whole = fills or "mask_image" not in inspect.signature(type(pipe).__call__).parameters
    if type(pipe).__name__ in names and whole:
        return pipe
    return _with_models_of(pipe, getattr(diffusers, names[0]))


def _with_models_of(pipe: Any, pipeline_class: Any) -> Any:
    taken = inspect.signature(pipeline_class.__init__).parameters
    settings = {name: value for name, value in pipe.config.items() if name in taken}
    parts = {name: part for name, part in pipe.components.items() if name in taken}
    return pipeline_class(**{**settings, **parts})


def generating_pipeline(
    pipe: Any, family: ModelFamily, declared: str | None = None
) -> tuple[Any, ControlCount | None]:
    """Return the family's pipeline that generates with this base, and the images that it is given.

    It generates from text, edits or fills, as the base was made to do, see ``check_base``.

    Args:
        declared: class of the base's own pipeline, if it is not that of ``pipe``.

    Returns:
        The pipeline with the same models, and the number of its control images; None if it fills an
        image under a mask.
    """
    import diffusers

    if family.fills(pipe):
        return editing_pipeline(pipe, family), None
    count = family.control_count(pipe)
    name = declared or type(pipe).__name__
    if count.least or (count.most != 0 and name in family.edit_pipelines):
        return editing_pipeline(pipe, family), count
    text_to_image = family.pipeline_classes[0]
    if type(pipe).__name__ != text_to_image:
        pipe = _with_models_of(pipe, getattr(diffusers, text_to_image))
    return pipe, ControlCount()


def control_arguments(
    pipe: Any,
    controls: Sequence[Image.Image],
    size: tuple[int, int] | None,
    resolution: int | None = None,
) -> dict[str, Any]:
    """Return the arguments of an edit pipeline's call for control images and a size.

    Args:
        controls: for a pipeline that fills, an image and its mask, see :func:`whole_fill`.
        size: height and width of the generated image; the pipeline's choice if None.
        resolution: control images have at most this number squared of pixels, for pipelines that
            take them at another size than the generated image. By the pipeline's own rules if None.
    """
    taken = inspect.signature(type(pipe).__call__).parameters
    arguments: dict[str, Any] = {}
    if "mask_image" in taken:
        image, mask = controls
        height, width = size or (_multiple(image.height), _multiple(image.width))
        fitted = [ImageOps.fit(part, (width, height), _LANCZOS) for part in (image, mask)]
        return {
            "image": fitted[0],
            "mask_image": fitted[1],
            "height": height,
            "width": width,
            **noise_alone(pipe, fitted[1]),
        }
    if _is_aligned(pipe):  # the size is that of the control image
        if size is None and "height" in taken:  # it would be distorted to the pipeline's own size
            unit = int(pipe.vae_scale_factor)
            size = controls[0].height // unit * unit, controls[0].width // unit * unit
        if size is not None:
            controls = [ImageOps.fit(image, (size[1], size[0]), _LANCZOS) for image in controls]
            if "height" in taken:
                arguments |= {"height": size[0], "width": size[1]}
    elif size is not None:
        arguments |= {"height": size[0], "width": size[1]}
        if "max_area" in taken:  # otherwise the size would be enlarged to a megapixel
            arguments["max_area"] = size[0] * size[1]
    if controls and resolution is not None and not _is_aligned(pipe):
        divisor = get_family(pipe).size_divisor(pipe)
        controls = [reduced(image, resolution, divisor) for image in controls]
        if "_auto_resize" in taken:  # Kontext's would be enlarged to a megapixel
            arguments["_auto_resize"] = False
    if controls:
        arguments["image"] = controls[0] if len(controls) == 1 else list(controls)
    return arguments


_LANCZOS = Image.Resampling.LANCZOS


def control_resolution_problem(resolution: int | None, count: ControlCount | None) -> str | None:
    """Return why control images cannot be reduced to a resolution.

    Args:
        count: of the base; None if it fills.
    """
    if resolution is None:
        return None
    what = f"--control_resolution is {resolution}"
    if not SMALLEST_CONTROL <= resolution <= LARGEST_CONTROL:
        return (
            f"{what}; it must be at least {SMALLEST_CONTROL} and at most {LARGEST_CONTROL}, "
            "which is the size that the pipelines give to larger control images"
        )
    if count is None or count.aligned or count.most == 0:
        why = "fills images" if count is None else "does not edit images"
        if count is not None and count.aligned:
            why = "edits pixel by pixel, so a control image has the size of its image"
        return f"{what}, but this base {why}. Leave it out"
    return None


def _is_aligned(pipe: Any) -> bool:
    """Whether the pipeline edits pixel by pixel, so that both images have one size."""
    name = type(pipe).__name__
    family = find_pipeline_family(name)
    return family is not None and family.edit_pipelines.get(name, ControlCount()).aligned


def _multiple(side: int) -> int:
    """Return the size that bases take which is nearest below."""
    return max(_SIDES, side // _SIDES * _SIDES)


#: Pixels that divide the sides of an image for every base that fills.
_SIDES = 16


def whole_fill(height: int, width: int) -> list[Image.Image]:
    """Return an image and a mask with which a base that fills generates a whole image."""
    size = width, height
    return [Image.new("RGB", size), Image.new("L", size, 255)]


def noise_alone(pipe: Any, mask: Image.Image) -> dict[str, Any]:
    """Return the argument with which a base that fills a whole image starts from noise alone.

    By default some pipelines, such as SDXL's, leave out a step and start from a little of the
    image, of which nothing is to remain under a mask that is white.
    """
    whole = mask.getextrema() == (255, 255)
    taken = inspect.signature(type(pipe).__call__).parameters
    return {"strength": 1.0} if whole and "strength" in taken else {}


def read_fills(
    options: tuple[str, str],
    images: Sequence[str] | None,
    masks: Sequence[str] | None,
    prompts: Sequence[str],
    size: tuple[int, int],
    problems: list[str],
) -> list[list[Image.Image]]:
    """Read the image of each prompt, and the mask of what to fill in it.

    Args:
        options: names of the options for images and masks, for problems.
        images, masks: one for all prompts or one for each; None to generate whole images.
        size: height and width of whole images.
        problems: problems are appended to it.
    """
    if not images and not masks:
        return [whole_fill(*size) for _ in prompts]
    if not images or not masks:
        problems.append(
            f"--{options[0]} and --{options[1]} belong together: this base fills the white part of "
            "a mask in an image. Give both, or none to generate whole images"
        )
        return []
    before = len(problems)
    read: list[list[Image.Image]] = []
    for option, entries, reader in zip(
        options, (images, masks), (read_image, read_mask), strict=True
    ):
        if len(entries) not in (1, len(prompts)):
            problems.append(_wrong_number(option, len(entries), len(prompts)))
        found = [part for file in entries for part in _read_file(option, file, reader, problems)]
        read.append(found * len(prompts) if len(entries) == 1 else found)
    if len(problems) > before:
        return []
    for image, mask in zip(*read, strict=True):
        if image.size != mask.size:
            problems.append(
                f"--{options[1]} has {mask.width} x {mask.height} pixels, but the image has "
                f"{image.width} x {image.height}. Give a mask of the image's size"
            )
    return [list(pair) for pair in zip(*read, strict=True)]


def _wrong_number(option: str, entries: int, prompts: int) -> str:
    return (
        f"--{option} names {entries} images for {prompts} prompts. Give one for all prompts or one "
        "for each"
    )


def read_controls(
    option: str,
    entries: Sequence[str] | None,
    prompts: Sequence[str],
    count: ControlCount,
    problems: list[str],
) -> list[list[Image.Image]]:
    """Read the control images of each prompt.

    Args:
        option: the option's name, for problems.
        entries: one for all prompts or one for each: a file, or several separated by commas.
        count: how many the base takes.
        problems: problems are appended to it.
    """
    if not entries:
        if count.least:
            problems.append(f"--{option} is missing: this base edits images. Give {count}")
        return [[] for _ in prompts]
    if len(entries) not in (1, len(prompts)):
        problems.append(_wrong_number(option, len(entries), len(prompts)))
        return [[] for _ in prompts]
    if count.most == 0:
        problems.append(
            f"--{option}: this base does not edit images. Leave it out, or give an editing base"
        )
        return [[] for _ in prompts]
    read = [list(_read(option, entry, problems)) for entry in entries]
    many = [e for e in entries if count.most is not None and len(_files(e)) > count.most]
    problems += [f"--{option} {entry}: this base takes {count} at once" for entry in many]
    return read * len(prompts) if len(read) == 1 else read


def control_size_problems(
    option: str,
    controls: Sequence[Sequence[Image.Image]],
    family: ModelFamily,
    resolution: int | None,
    divisor: int,
) -> Iterator[str]:
    """Yield which control images the edit pipeline does not take, because of their sizes.

    Args:
        option: the option's name.
        resolution, divisor: see :func:`control_arguments` and ``reduced_size``.
    """
    for size in dict.fromkeys(image.size for images in controls for image in images):
        small = size if resolution is None else reduced_size(size, resolution, divisor)
        if problem := family.control_problem(small):
            how = "" if small == size else ", reduced by --control_resolution"
            yield f"--{option}: an image of {size[0]} x {size[1]} pixels{how}: {problem}"


def _files(entry: str) -> list[str]:
    """Return the files of an entry; a file's own name may have commas."""
    return [entry] if Path(entry).exists() else [name.strip() for name in entry.split(",")]


def _read(option: str, entry: str, problems: list[str]) -> Iterator[Image.Image]:
    for file in _files(entry):
        yield from _read_file(option, file, read_image, problems)


def _read_file(
    option: str, file: str, reader: Callable[[Path], Image.Image], problems: list[str]
) -> Iterator[Image.Image]:
    path = Path(file).expanduser()
    if not path.is_file():
        problems.append(f"--{option} {file}: there is no such file{nearby(path)}")
        return
    try:
        yield reader(path)
    except ImageError as error:
        problems.append(f"--{option} {file} cannot be decoded: {error}")
