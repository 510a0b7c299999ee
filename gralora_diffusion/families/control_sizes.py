"""The size of control images that are made smaller than an edit pipeline would make them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

#: Pixels per side of the largest control image, as an area: FLUX.2's pipelines make larger ones
#: smaller, and those of Kontext's training have this area.
LARGEST_CONTROL = 1024
#: What control images may be reduced to: FLUX.2's pipelines take none with sides below 64 pixels.
SMALLEST_CONTROL = 128


def reduced_size(size: tuple[int, int], resolution: int, divisor: int) -> tuple[int, int]:
    """Return width and height of a control image that has at most ``resolution`` squared pixels.

    A smaller one stays as it is. A larger one keeps its shape, except that its sides become
    multiples of ``divisor``, the pixels per side of a token.
    """
    scale = resolution / math.sqrt(size[0] * size[1])
    if scale >= 1:
        return size
    width, height = (max(divisor, int(side * scale) // divisor * divisor) for side in size)
    return width, height


def reduced(image: Image, resolution: int, divisor: int) -> Image:
    """Return an image of :func:`reduced_size`; what its shape does not have room for is cropped."""
    from PIL import Image as images
    from PIL import ImageOps

    size = reduced_size(image.size, resolution, divisor)
    return image if size == image.size else ImageOps.fit(image, size, images.Resampling.LANCZOS)
