"""From a decoded image or mask to pixel values: resizing, cropping, mirroring."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .buckets import Buckets
from .seeds import generator, seed_from

#: An image is resized as a whole before it is cropped, unless the resized image has more pixels
#: than the original and more than this many times those of the crop.
_WHOLE = 2
#: Pixels on each side that Lanczos, the widest of Pillow's filters, reads.
_SUPPORT = 3
#: A filter with hard edges is moved by this fraction of its input. Between two pixels it then takes
#: the latter, as for the whole image, instead of one that depends on rounding in fp32.
_NUDGE = 2.0**-22
#: If there are more places for a crop than this, the cached ones are sampled one by one.
_MANY_PLACES = 1 << 20


@dataclass(frozen=True, slots=True)  # a set may have 100,000 of them
class Variant:
    """One way to cut ``height`` times ``width`` pixels out of an image resized to cover them.

    ``left`` and ``top`` are pixels in the resized image, after mirroring it if ``flip`` is set.
    """

    left: int
    top: int
    height: int
    width: int
    flip: bool


def covering(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return the width and height of a resized image that just covers a crop.

    Args:
        size: width and height of the image.
        target: height and width of the crop.
    """
    width, height = size
    target_height, target_width = target
    if width * target_height >= height * target_width:  # the image is the wider one
        return round(width * target_height / height), target_height
    return target_width, round(height * target_width / width)


@dataclass(frozen=True)
class CropPlan:
    """How images become squares of ``resolution`` pixels, or get the size of their bucket.

    An image is resized until it just covers its target size; smaller images are enlarged. The
    excess on one of the axes is cut off equally on both sides (``center_crop``) or at random, and
    the rest is mirrored at random if ``random_flip`` is set. ``interpolation`` is the name of one
    of ``PIL.Image.Resampling`` in lower case.
    """

    resolution: int
    center_crop: bool = False
    random_flip: bool = False
    interpolation: str = "lanczos"
    buckets: Buckets | None = None

    def target_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width that an image of ``size`` (width, height) is trained at."""
        if self.buckets is None:
            return self.resolution, self.resolution
        width, height = size
        return self.buckets.nearest(height, width)

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return width and height of an image of ``size`` (width, height) after resizing."""
        return covering(size, self.target_size(size))

    def enlarges(self, size: tuple[int, int]) -> bool:
        """Return whether an image of ``size`` (width, height) has to be enlarged."""
        return any(after > before for after, before in zip(self.resized(size), size, strict=True))

    def shown(self, size: tuple[int, int]) -> float:
        """Return which fraction of an image of ``size`` (width, height) a crop shows."""
        (width, height), target = self.resized(size), self.target_size(size)
        return target[0] * target[1] / (width * height)

    def may_miss(self, size: tuple[int, int], box: tuple[int, int, int, int]) -> bool:
        """Return whether a crop of an image of ``size`` (width, height) may show nothing of a part.

        Args:
            box: left, top, right and bottom of that part.
        """
        (left, top), resized = self._left_over(size), self.resized(size)
        ends = [(left // 2, left // 2), (top // 2, top // 2)] if self.center_crop else None
        starts = ends or [(0, left), (0, top)]
        for axis, (first, last) in enumerate(starts):
            length = self.target_size(size)[1 - axis]
            scale = resized[axis] / size[axis]
            begin, end = box[axis] * scale, box[axis + 2] * scale
            if end <= last or begin >= first + length:
                return True
        return False

    def draw(self, size: tuple[int, int], random: torch.Generator) -> Variant:
        """Sample any variant of an image of ``size`` (width, height)."""
        place = int(torch.randint(self._places(size), (), generator=random))
        flip = bool(torch.randint(2, (), generator=random)) and self.random_flip
        return self._variant(size, place, flip)

    def kept(
        self, size: tuple[int, int], content_key: str, count: int, seed: int
    ) -> tuple[Variant, ...]:
        """Return the variants of an image that a latent cache keeps, all of them different.

        With ``random_flip``, every other one is mirrored, and there are at least two. There are
        fewer than ``count`` if the image has fewer: a square one has one place to crop.

        Args:
            size: width and height of the image.
            content_key: of the image; each image has its own variants.
            count: how many. The first ones are the same for every count.
            seed: of the run.
        """
        places = self._places(size)
        random = generator(seed_from(seed, content_key), "kept variants", 0) if places > 1 else None
        if random is None:
            order = [0]
        elif places <= _MANY_PLACES:
            order = torch.randperm(places, generator=random)[: max(count, 2)].tolist()
        else:  # a permutation of all places would take gigabytes
            drawn: dict[int, None] = {}
            while len(drawn) < min(max(count, 2), places):
                drawn[int(torch.randint(places, (), generator=random))] = None
            order = list(drawn)
        if not self.random_flip:
            return tuple(self._variant(size, place, False) for place in order[:count])
        # every other one is mirrored; when all places are used, they repeat with the other flip
        return tuple(
            self._variant(size, order[i % places], (i % places + i // places) % 2 == 1)
            for i in range(min(max(count, 2), 2 * places))
        )

    def pixel_values(
        self, image: Image.Image, variant: Variant, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Return the variant of an RGB image as (3, height, width) floats in [-1, 1].

        The variant may be of a plan of another resolution.

        If an image is enlarged to many times the variant, only that part is computed. Its pixels
        are those of the whole image, except for a few in 10,000 that Pillow rounds to the next of
        the 256 levels. Between two pixels that are equally near, "nearest" takes the latter here,
        while Pillow takes either.

        Args:
            size: width and height of the image that the variant was made for; this one's by
                default. This one is resized like that one.
        """
        cut = self._cut(image, variant, Image.Resampling[self.interpolation.upper()], size)
        return torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 127.5 - 1.0

    def mask_values(self, mask: Image.Image, variant: Variant) -> Tensor:
        """Return the variant of a mask of mode L as (1, height, width) floats in [0, 1].

        It is resized by area ("box"), whatever images are resized by, so that a value is the part
        of a pixel that is white.
        """
        cut = self._cut(mask, variant, Image.Resampling.BOX)
        return torch.from_numpy(np.array(cut))[None].float() / 255

    def _cut(
        self,
        image: Image.Image,
        variant: Variant,
        resampling: Image.Resampling,
        size: tuple[int, int] | None = None,
    ) -> Image.Image:
        width, height = covering(size or image.size, (variant.height, variant.width))
        left = width - variant.left - variant.width if variant.flip else variant.left
        top, right = variant.top, left + variant.width
        bottom = top + variant.height
        largest = max(image.width * image.height, _WHOLE * variant.width * variant.height)
        if width * height <= largest:
            whole = image.resize((width, height), resampling)
            image = whole.crop((left, top, right, bottom))
        else:
            hard = resampling in (Image.Resampling.NEAREST, Image.Resampling.BOX)
            nudge = _NUDGE if hard else 0.0
            x0, x1, across = _source(left, right, width, image.width, nudge)
            y0, y1, down = _source(top, bottom, height, image.height, nudge)
            image = image.crop((x0, y0, x1, y1))
            # across and then down, as Pillow does; for the part alone it may use another order
            box: tuple[float, float, float, float] = (across[0], 0, across[1], image.height)
            image = image.resize((variant.width, image.height), resampling, box)
            box = (0, down[0], image.width, down[1])
            image = image.resize((variant.width, variant.height), resampling, box)
        return ImageOps.mirror(image) if variant.flip else image

    def _places(self, size: tuple[int, int]) -> int:
        """Return how many crops there are to choose from."""
        return 1 if self.center_crop else sum(self._left_over(size)) + 1

    def _variant(self, size: tuple[int, int], place: int, flip: bool) -> Variant:
        across, down = self._left_over(size)
        if self.center_crop:
            place = (across + down) // 2
        left, top = (place, 0) if across else (0, place)
        return Variant(left, top, *self.target_size(size), flip)

    def _left_over(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the resized image's excess pixels, across and down; one of them is 0."""
        width, height = self.resized(size)
        target_height, target_width = self.target_size(size)
        return width - target_width, height - target_height


def _source(
    start: int, stop: int, resized: int, length: int, nudge: float
) -> tuple[int, int, tuple[float, float]]:
    """Return the source of some pixels of one axis when ``length`` is resized to ``resized``.

    Returns:
        First and last (exclusive) of the pixels that they depend on, and the place of the wanted
        pixels among these. Pillow stores that place in fp32, so it must not be a large number.
    """
    margin = math.ceil(_SUPPORT * max(1.0, length / resized)) + 1
    begin, end = start * length / resized, stop * length / resized
    first = max(0, math.floor(begin) - margin)
    last = min(length, math.ceil(end) + margin)
    more = nudge * (last - first)
    return first, last, (begin - first + more, min(end - first + more, last - first))
