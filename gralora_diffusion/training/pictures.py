"""From a picture file to pixels: decoding whatever Pillow reads, resizing, cropping, mirroring."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .buckets import Buckets
from .streams import generator, seed_from

WHITE = (255, 255, 255, 255)


def is_picture(path: Path) -> bool:
    """Whether a file is taken for a picture, by its name; hidden ones are not."""
    return path.suffix.lower() in picture_extensions() and not path.name.startswith(".")


@cache
def picture_extensions() -> frozenset[str]:
    """Endings, lower case and with the dot, of the files that are taken for pictures.

    Those of Pillow's formats, without the videos and documents among them (.mpg, .pdf, .eps).
    """
    extensions = Image.registered_extensions()
    return frozenset(
        ending
        for ending, file_format in extensions.items()
        if Image.MIME.get(file_format, "image/").startswith("image/")
    )


def decode(data: bytes) -> Image.Image:
    """Decode the bytes of a picture file as an upright RGB picture.

    Transparency is laid on white, 16 bits per channel become 8, of an animation the first frame is
    taken, and the camera's orientation (EXIF) is applied.

    Raises:
        Exception: whatever Pillow raises on a file that is broken, cut off, or no picture;
            ValueError for pixels without a fixed range.
    """
    with Image.open(io.BytesIO(data)) as file:
        file.load()
        return upright_rgb(file)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an opened picture as ``decode`` does. Raises ValueError for pixels without a range."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError(
            "its pixels are floating-point numbers without a fixed range; save it as PNG"
        )
    if image.mode.startswith("I"):  # one channel of 16 bits, or such a channel kept in 32 bits
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(
                f"its pixels range from {values.min()} to {values.max()}, which is neither 8 nor "
                "16 bits; save it as PNG"
            )
        # Pillow's own conversion would cut off all above 255
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image.convert("RGB")


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
        order = torch.randperm(
            places, generator=generator(seed_from(seed, content_key), "kept variants", 0)
        ).tolist()
        if not self.random_flip:
            return tuple(self._variant(size, place, False) for place in order[:count])
        # every other one is mirrored; when all places are used, they come again the other way round
        return tuple(
            self._variant(size, order[i % places], (i % places + i // places) % 2 == 1)
            for i in range(min(max(count, 2), 2 * places))
        )

    def pixel_values(self, image: Image.Image, variant: Variant) -> Tensor:
        """Return the variant of an RGB picture as (3, height, width) floats in [-1, 1]."""
        image = image.resize(self.resized(image.size), Image.Resampling[self.interpolation.upper()])
        if variant.flip:
            image = ImageOps.mirror(image)
        right, bottom = variant.left + variant.width, variant.top + variant.height
        pixels = np.array(image.crop((variant.left, variant.top, right, bottom)))
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1.0

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
