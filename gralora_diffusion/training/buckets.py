"""Aspect-ratio buckets: the sizes that pictures are trained at when they are not all square.

Sizes are (height, width) in pixels, as diffusers has them; so are its rules, which are called here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import TrainingConfig


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


def size_problems(config: TrainingConfig, divisor: int = 8) -> Iterator[str]:
    """Tell which sizes a base cannot take whose heights and widths are multiples of ``divisor``."""
    wanted = "8, as the VAE shrinks by 8" if divisor == 8 else f"{divisor} for this base"
    for name in ("resolution", "validation_height", "validation_width"):
        side = getattr(config, name)
        if side is not None and side != (nearest := _multiple(side, divisor)):
            yield f"--{name} is {side}; it must be a multiple of {wanted}. The nearest is {nearest}"
    try:
        sizes = listed_buckets(config.aspect_ratio_buckets)
    except ValueError as error:
        yield (
            f"--aspect_ratio_buckets is {config.aspect_ratio_buckets!r}: {error} Give "
            "'height,width' with ; between, such as '512,512;640,384;384,640'"
        )
        return
    shapes: dict[float, tuple[int, int]] = {}
    for height, width in sizes:
        near = _multiple(height, divisor), _multiple(width, divisor)
        if (height, width) != near:
            yield (
                f"--aspect_ratio_buckets holds {height},{width}; height and width must be "
                f"multiples of {wanted}. The nearest is {near[0]},{near[1]}"
            )
        if earlier := shapes.get(height / width):
            yield (
                f"--aspect_ratio_buckets holds {earlier[0]},{earlier[1]} and {height},{width}, "
                "which are of one shape, and pictures are sorted by shape. Keep one of them"
            )
        shapes[height / width] = height, width


def _multiple(side: int, divisor: int) -> int:
    """Return the multiple of ``divisor`` that is nearest to ``side``, and not zero."""
    return max(divisor, round(side / divisor) * divisor)
