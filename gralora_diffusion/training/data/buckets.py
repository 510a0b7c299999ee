"""Aspect-ratio buckets: the sizes that pictures are trained at when they are not all square.

Sizes are (height, width) in pixels, as diffusers has them; so are its rules, which are called here.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Buckets:
    """Which size a picture is trained at.

    One of the ``listed`` sizes; smaller pictures are enlarged to it. Without a list, one of eleven
    shapes from 1:2 to 2:1 of about ``resolution`` squared pixels, or of about as many pixels as the
    picture has if these are fewer: it gets a smaller bucket.

    Args:
        divisor: of the heights and widths of those that are not listed.
    """

    resolution: int
    divisor: int
    listed: tuple[tuple[int, int], ...] = ()

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """Return the bucket of a picture, by diffusers' measure of which is the nearest."""
        from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets

        sizes = list(self.listed)
        if not sizes:
            own = round((height * width) ** 0.5)
            sizes = generate_aspect_ratio_buckets(min(self.resolution, own), self.divisor)
        return sizes[find_nearest_bucket(height, width, sizes)]


def listed_buckets(text: str | None) -> tuple[tuple[int, int], ...]:
    """Read "height,width;height,width;...".

    Raises:
        ValueError: it is written otherwise.
    """
    if text is None:
        return ()
    from diffusers.training_utils import parse_buckets_string

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the sizes must be divisible by is checked below
        return tuple(parse_buckets_string(text))
