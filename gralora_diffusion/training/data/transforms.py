"""From a decoded picture to what is trained on: resizing, cropping, mirroring."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .buckets import Buckets
from .seeds import generator, seed_from

#: A picture is resized as a whole, before a part is cut out, unless that makes more pixels than it
#: has, and more than so many times those that are wanted.
_WHOLE = 2
#: Pixels on each side that the widest of Pillow's filters, Lanczos, looks at.
_SUPPORT = 3
#: By which share of what it looks at a filter with hard edges is moved, so that fp32 does not
#: decide which pixel it takes where it stands between two: the latter, as for the whole picture.
_NUDGE = 2.0**-22
#: Of more places for a crop than these, those that a latent cache keeps are drawn one by one.
_MANY_PLACES = 1 << 20


@dataclass(frozen=True)
class Variant:
    """One way to cut ``height`` times ``width`` pixels out of a picture resized to cover them.

    ``left`` and ``top`` are pixels in the resized picture, after mirroring it if ``flip`` is set.
    """

    left: int
    top: int
    height: int
    width: int
    flip: bool


@dataclass(frozen=True)
class CropPlan:
    """How pictures become squares of ``resolution`` pixels, or what their bucket wants.

    A picture is resized until it just covers its target size, smaller pictures upwards. What is
    left over on one of the axes is cut off on both sides alike (``center_crop``) or at random, and
    the rest is mirrored at random if ``random_flip`` is set. ``interpolation`` is a name of
    ``PIL.Image.Resampling`` in lower case.
    """

    resolution: int
    center_crop: bool = False
    random_flip: bool = False
    interpolation: str = "lanczos"
    buckets: Buckets | None = None

    def target_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that a picture of ``size`` (width, height) is trained at."""
        if self.buckets is None:
            return self.resolution, self.resolution
        width, height = size
        return self.buckets.nearest(height, width)

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of a picture of ``size`` (width, height) after resizing."""
        width, height = size
        target_height, target_width = self.target_size(size)
        if width * target_height >= height * target_width:  # the picture is the wider one
            return round(width * target_height / height), target_height
        return target_width, round(height * target_width / width)

    def enlarges(self, size: tuple[int, int]) -> bool:
        """Whether a picture of ``size`` (width, height) has fewer pixels than are trained on."""
        return any(after > before for after, before in zip(self.resized(size), size, strict=True))

    def shown(self, size: tuple[int, int]) -> float:
        """Which share of a picture of ``size`` (width, height) a crop shows."""
        (width, height), target = self.resized(size), self.target_size(size)
        return target[0] * target[1] / (width * height)

    def draw(self, size: tuple[int, int], random: torch.Generator) -> Variant:
        """Draw any variant of a picture of ``size`` (width, height)."""
        place = int(torch.randint(self._places(size), (), generator=random))
        flip = bool(torch.randint(2, (), generator=random)) and self.random_flip
        return self._variant(size, place, flip)

    def kept(
        self, size: tuple[int, int], content_key: str, count: int, seed: int
    ) -> tuple[Variant, ...]:
        """Return the variants of a picture that a latent cache keeps, none of them twice.

        With ``random_flip`` every other one is mirrored, and there are at least two. There are
        fewer than ``count`` if the picture has no more: a square one has one place to crop.

        Args:
            size: width and height of the picture.
            content_key: of the picture; each draws its own.
            count: how many. The first ones are the same for every count.
            seed: of the run.
        """
        places = self._places(size)
        random = generator(seed_from(seed, content_key), "kept variants", 0)
        if places <= _MANY_PLACES:
            order = torch.randperm(places, generator=random)[: max(count, 2)].tolist()
        else:  # a permutation of them would take gigabytes
            drawn: dict[int, None] = {}
            while len(drawn) < min(max(count, 2), places):
                drawn[int(torch.randint(places, (), generator=random))] = None
            order = list(drawn)
        if not self.random_flip:
            return tuple(self._variant(size, place, False) for place in order[:count])
        # every other one is mirrored; when all places are used, they come again the other way round
        return tuple(
            self._variant(size, order[i % places], (i % places + i // places) % 2 == 1)
            for i in range(min(max(count, 2), 2 * places))
        )

    def pixel_values(self, image: Image.Image, variant: Variant) -> Tensor:
        """Return the variant of an RGB picture as (3, height, width) floats in [-1, 1].

        Of a picture that is enlarged to many times the variant, only that part is computed: its
        pixels are those of the whole picture, but for a few in 10,000 that Pillow rounds to the
        next of the 256 levels. By "nearest", of two pixels that are equally near, it takes the
        latter, where Pillow takes either.
        """
        resampling = Image.Resampling[self.interpolation.upper()]
        width, height = self.resized(image.size)
        left = width - variant.left - variant.width if variant.flip else variant.left
        top, right = variant.top, left + variant.width
        bottom = top + variant.height
        largest = max(image.width * image.height, _WHOLE * variant.width * variant.height)
        if width * height <= largest:
            whole = image.resize((width, height), resampling)
            image = whole.crop((left, top, right, bottom))
        else:
            nudge = _NUDGE if self.interpolation in ("nearest", "box") else 0.0
            x0, x1, across = _source(left, right, width, image.width, nudge)
            y0, y1, down = _source(top, bottom, height, image.height, nudge)
            image = image.crop((x0, y0, x1, y1))
            # across and then down, as Pillow enlarges; of the part alone it may choose otherwise
            box: tuple[float, float, float, float] = (across[0], 0, across[1], image.height)
            image = image.resize((variant.width, image.height), resampling, box)
            box = (0, down[0], image.width, down[1])
            image = image.resize((variant.width, variant.height), resampling, box)
        if variant.flip:
            image = ImageOps.mirror(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0

    def _places(self, size: tuple[int, int]) -> int:
        """How many crops there are to choose from."""
        return 1 if self.center_crop else sum(self._left_over(size)) + 1

    def _variant(self, size: tuple[int, int], place: int, flip: bool) -> Variant:
        across, down = self._left_over(size)
        if self.center_crop:
            place = (across + down) // 2
        left, top = (place, 0) if across else (0, place)
        return Variant(left, top, *self.target_size(size), flip)

    def _left_over(self, size: tuple[int, int]) -> tuple[int, int]:
        """Pixels of the resized picture beyond its target, across and down; one of them is 0."""
        width, height = self.resized(size)
        target_height, target_width = self.target_size(size)
        return width - target_width, height - target_height


def _source(
    start: int, stop: int, resized: int, length: int, nudge: float
) -> tuple[int, int, tuple[float, float]]:
    """What some pixels of one axis are made of when ``length`` pixels are resized to ``resized``.

    Returns:
        First and last (exclusive) of the pixels that they depend on, and the place of the wanted
        pixels among these. Pillow knows that place in fp32, so it must not be a large number.
    """
    margin = math.ceil(_SUPPORT * max(1.0, length / resized)) + 1
    begin, end = start * length / resized, stop * length / resized
    first = max(0, math.floor(begin) - margin)
    last = min(length, math.ceil(end) + margin)
    more = nudge * (last - first)
    return first, last, (begin - first + more, min(end - first + more, last - first))
