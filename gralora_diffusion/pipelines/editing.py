"""A base as the pipeline that edits images, and the images that it edits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from gralora_diffusion.families import ControlCount, ModelFamily
from gralora_diffusion.io.file_names import nearby
from gralora_diffusion.io.image_files import ImageError, read_image


def editing_pipeline(pipe: Any, family: ModelFamily) -> Any:
    """Return the family's pipeline for control images with the same models, or ``pipe`` itself."""
    import diffusers

    if type(pipe).__name__ in family.edit_pipelines:
        return pipe
    pipeline_class = getattr(diffusers, next(iter(family.edit_pipelines)))
    taken = inspect.signature(pipeline_class.__init__).parameters
    settings = {name: value for name, value in pipe.config.items() if name in taken}
    parts = {name: part for name, part in pipe.components.items() if name in taken}
    return pipeline_class(**{**settings, **parts})


def control_arguments(
    pipe: Any, controls: Sequence[Image.Image], size: tuple[int, int] | None
) -> dict[str, Any]:
    """Return the arguments of an edit pipeline's call for control images and a size.

    Args:
        size: height and width of the generated image; the pipeline's choice if None.
    """
    taken = inspect.signature(type(pipe).__call__).parameters
    arguments: dict[str, Any] = {}
    if size is not None and "height" not in taken:  # the size is that of the control image
        controls = [ImageOps.fit(image, (size[1], size[0]), _LANCZOS) for image in controls]
    elif size is not None:
        arguments |= {"height": size[0], "width": size[1]}
        if "max_area" in taken:  # otherwise the size would be enlarged to a megapixel
            arguments["max_area"] = size[0] * size[1]
    if controls:
        arguments["image"] = controls[0] if len(controls) == 1 else list(controls)
    return arguments


_LANCZOS = Image.Resampling.LANCZOS


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
        problems.append(
            f"--{option} names {len(entries)} images for {len(prompts)} prompts. Give one for all "
            "prompts or one for each"
        )
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


def _files(entry: str) -> list[str]:
    """Return the files of an entry; a file's own name may have commas."""
    return [entry] if Path(entry).exists() else [name.strip() for name in entry.split(",")]


def _read(option: str, entry: str, problems: list[str]) -> Iterator[Image.Image]:
    for file in _files(entry):
        path = Path(file).expanduser()
        if not path.is_file():
            problems.append(f"--{option} {file}: there is no such file{nearby(path)}")
            continue
        try:
            yield read_image(path)
        except ImageError as error:
            problems.append(f"--{option} {file} cannot be decoded: {error}")
