"""Images with labels, arranged in a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

#: Pixels from one line of a label to the next.
_LINE = 19


def labelled_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    captions: Sequence[str] = (),
    cell: int = 192,
) -> Image.Image:
    """Arrange images in rows, with labels on the left and captions below the last row.

    Args:
        rows: (label, images); rows may differ in length.
        captions: one per column.
        cell: width of an image in the grid, in pixels; smaller images are enlarged without
            blurring. The height follows from the first image of the last row.
    """
    gap, label_width, font = 8, 112, ImageFont.load_default(size=15)
    columns = max(len(images) for _, images in rows)
    caption_height = 44 if captions else 0
    shape = next(images[0].size for _, images in reversed(rows) if images)
    size = cell, round(cell * shape[1] / shape[0])
    width = label_width + columns * (cell + gap)
    height = gap + len(rows) * (size[1] + gap) + caption_height
    grid = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(grid)
    for row, (label, images) in enumerate(rows):
        top = gap + row * (size[1] + gap)
        shown = label[: size[1] // _LINE * label_width]  # no letter is narrower than a pixel
        parts = [_wrapped(part, font, label_width - gap) for part in shown.split("\n")]
        lines = "\n".join(parts).split("\n")[: size[1] // _LINE]
        middle = size[1] // 2 - 16 - max(0, len(lines) - 2) * _LINE // 2
        pen.multiline_text((gap, top + max(0, middle)), "\n".join(lines), "black", font)
        for column, image in enumerate(images):
            method = Image.Resampling.NEAREST if image.width < cell else Image.Resampling.LANCZOS
            fitted = ImageOps.fit(image.convert("RGB"), size, method)
            grid.paste(fitted, (label_width + column * (cell + gap), top))
    top = gap + len(rows) * (size[1] + gap)
    for column, caption in enumerate(captions):
        text = _wrapped(caption, font, cell)
        pen.multiline_text((label_width + column * (cell + gap), top), text, "black", font)
    return grid


def _wrapped(text: str, font: Any, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(line for line in lines if line)
