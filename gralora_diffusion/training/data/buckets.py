"""Aspect-ratio buckets: the sizes that images are trained at when they are not all square.

Sizes are (height, width) in pixels, as in diffusers, whose rules are called here.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Buckets:
    """Chooses the size that an image is trained at.

    It is one of the ``listed`` sizes, and smaller images are enlarged to it. Without a list, it is
    one of eleven shapes from 1:2 to 2:1 with about ``resolution`` squared pixels. An image with
    fewer pixels gets a smaller bucket, with about as many pixels as it has.

    Args:
        divisor: heights and widths that are not listed are multiples of it.
    """

    resolution: int
    divisor: int
    listed: tuple[tuple[int, int], ...] = ()

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """Return the bucket of an image that is nearest by diffusers' measure."""
        from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets

        sizes = list(self.listed)
        if not sizes:
            own = round((height * width) ** 0.5)
            sizes = generate_aspect_ratio_buckets(min(self.resolution, own), self.divisor)
        return sizes[find_nearest_bucket(height, width, sizes)]


def listed_buckets(text: str | None) -> tuple[tuple[int, int], ...]:
    """Read "height,width;height,width;...".

    Raises:
        ValueError: the text has another form.
    """
    if text is None:
        return ()
    from diffusers.training_utils import parse_buckets_string

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checks of options test divisibility
        return tuple(parse_buckets_string(text))
