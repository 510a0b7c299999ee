"""The validation images over the steps as one image: a row per prompt, a column per step."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from gralora_diffusion.io.image_files import ImageError, read_image
from gralora_diffusion.io.regular_files import read_regular
from gralora_diffusion.io.tensor_files import replacing
from gralora_diffusion.pipelines.grid import labelled_grid

from .published import HISTORY_NAME, PROMPTS_NAME, VALIDATION_NAME
from .validation import image_name, of_one_shape

_STEP = re.compile(r"step-(\d{1,12})")
#: Most columns and rows, and the width of an image in pixels.
_COLUMNS, _ROWS, _CELL = 12, 50, 192
_MOST_BYTES = 1 << 20
#: Sides of images that are kept until all of them have one shape, in pixels.
_SIDE = 2048


def write_history(folder: Path) -> Path | None:
    """Write the first image of each prompt at up to twelve steps, the first and last among them.

    Args:
        folder: output folder with the images of all validations.

    Returns the path, or None if there are fewer than two validations, or none with the last one's
    prompts.
    """
    steps = _chosen(_validations(folder / VALIDATION_NAME))
    if len(steps) < 2:
        return None
    prompts = _prompts(steps[-1][1])[:_ROWS]
    if not prompts:
        return None
    images = of_one_shape([_images(steps, row) for row in range(len(prompts))])
    path = folder / HISTORY_NAME
    with replacing(path) as temporary:
        captions = [f"step {step:,}" for step, _ in steps]
        labelled_grid(list(zip(prompts, images, strict=True)), captions, _CELL).save(
            temporary, format="PNG"
        )
    return path


def _validations(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of the validations with the same prompts as the last, in order."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if (match := _STEP.fullmatch(path.name)) and path.is_dir():
            found.append((int(match[1]), path))
    found.sort()
    return [(step, path) for step, path in found if _prompts(path) == _prompts(found[-1][1])]


def _chosen(steps: list[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """Return up to ``_COLUMNS`` of the steps, evenly spaced, with the first and the last."""
    last = len(steps) - 1
    if last < _COLUMNS:
        return steps
    return [steps[round(i * last / (_COLUMNS - 1))] for i in range(_COLUMNS)]


def _prompts(folder: Path) -> list[str]:
    try:
        text = read_regular(folder / PROMPTS_NAME, _MOST_BYTES).decode()
    except (OSError, UnicodeDecodeError):
        return []
    return text.splitlines()


def _images(steps: list[tuple[int, Path]], row: int) -> list[Image.Image]:
    """Return a prompt's first image at each step; an unreadable one is white."""
    images = []
    for _, folder in steps:
        try:
            image = read_image(folder / image_name(row, 0))
            if max(image.size) > _SIDE:
                image.thumbnail((_SIDE, _SIDE))
            images.append(image)
        except (OSError, ImageError):
            images.append(Image.new("RGB", (1, 1), "white"))
    return images
