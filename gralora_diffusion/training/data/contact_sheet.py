"""A contact sheet: crops as a run sees them, with their prompts below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gralora_diffusion.io.tensor_files import replacing

#: Width and height in pixels of a crop in the sheet, space around it, and lines of text below it.
_SIDE, _GAP, _LINES = 176, 10, 4
_COLUMNS, _TEXT, _LEADING = 6, 12, 15


def write_contact_sheet(path: Path, cells: Sequence[tuple[Image.Image, str, str]]) -> None:
    """Write a PNG file, whole or not at all.

    Args:
        cells: for each crop the image, its size and repeats as text, and its prompt.
    """
    columns = min(_COLUMNS, len(cells))
    width, height = _SIDE + _GAP, _SIDE + (1 + _LINES) * _LEADING + 2 * _GAP
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=_TEXT)
    for number, (image, label, prompt) in enumerate(cells):
        left = _GAP + number % columns * width
        top = _GAP + number // columns * height
        small = image.copy()
        small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        place = left + (_SIDE - small.width) // 2, top + (_SIDE - small.height) // 2
        sheet.paste(small, place)
        below = top + _SIDE + 4
        pen.text((left, below), _shortened(label, pen, font), fill="#777777", font=font)
        for line in wrapped(prompt, pen, font):
            below += _LEADING
            pen.text((left, below), line, fill="black", font=font)
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def as_image(pixels: Tensor) -> Image.Image:
    """Return the image of pixel values (3, height, width) in [-1, 1]."""
    values = (pixels.permute(1, 2, 0) * 127.5 + 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(values.numpy())


def wrapped(
    text: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[str]:
    """Return the lines of a text below a crop; what has no place is replaced by three dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font=font) <= _SIDE or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    shown = [_shortened(line, pen, font) for line in lines[:_LINES]]
    if len(lines) > _LINES:
        shown[-1] = _shortened(f"{shown[-1].removesuffix('...')}...", pen, font)
    return shown


def _shortened(
    line: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    if pen.textlength(line, font=font) <= _SIDE:
        return line
    whole = line.removesuffix("...")
    while whole and pen.textlength(f"{whole}...", font=font) > _SIDE:
        whole = whole[:-1]
    return f"{whole}..."
