"""From a control image to pixel values: it shows the part of the scene that its target shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import diffusers
from PIL import Image, ImageOps
from torch import Tensor

from gralora_diffusion.families import ControlPreparation

from .transforms import CropPlan, Variant, covering

#: Shapes count as one if their aspect ratios differ by no more than this fraction.
_SAME_SHAPE = 0.01

Size = tuple[int, int]  # width and height


def same_shape(first: Size, second: Size) -> bool:
    """Return whether two images have the same aspect ratio, up to rounding of their sizes."""
    ratio = first[0] * second[1] / (first[1] * second[0])
    return max(ratio, 1 / ratio) <= 1 + _SAME_SHAPE


class Cut(NamedTuple):
    """A part of a control image, mirrored if ``flip`` is set."""

    box: tuple[int, int, int, int]  # left, top, right, bottom
    flip: bool


@dataclass(frozen=True)
class ControlPlan:
    """How control images become pixel values, given the size and the variant of their target.

    Without ``prepare``, a control image is resized and cropped to the pixels of its target. With
    it, the part that the target shows is cut out at the control image's own resolution, and
    prepared by the edit pipeline's rules. A control image of another shape than its target is used
    whole, because it shows something else. Both are mirrored with their target.

    Attributes:
        resolution: what ``prepare`` reduces them to.
    """

    crops: CropPlan
    prepare: ControlPreparation | None = None
    resolution: int | None = None

    def facts(self, size: Size, target: Size, variant: Variant) -> list[Any]:
        """Return what the pixels depend on besides the image, as JSON values.

        Args:
            size: of the control image.
            target: size of the target before resizing.
        """
        if self.prepare is not None:
            cut = self._cut(size, target, variant)
            reduced = [] if self.resolution is None else [self.resolution]
            return [cut.box, cut.flip, diffusers.__version__, *reduced]  # its rules may change
        return [
            [variant.left, variant.top, variant.height, variant.width, variant.flip],
            covering(target, (variant.height, variant.width)),
            self.crops.interpolation,
        ]

    def pixel_values(self, image: Image.Image, target: Size, variant: Variant) -> Tensor:
        """Return the pixels (3, height, width) in [-1, 1] of an RGB image; see :meth:`facts`."""
        if self.prepare is None:
            return self.crops.pixel_values(image, variant, target)
        cut = self._cut(image.size, target, variant)
        image = image.crop(cut.box)
        return self.prepare(ImageOps.mirror(image) if cut.flip else image)

    def _cut(self, size: Size, target: Size, variant: Variant) -> Cut:
        if not same_shape(size, target):
            return Cut((0, 0, *size), variant.flip)
        width, height = covering(target, (variant.height, variant.width))
        left = width - variant.left - variant.width if variant.flip else variant.left
        across, down = size[0] / width, size[1] / height
        # one size for all places, so that samples can be stacked
        width, height = (max(1, round(n)) for n in (variant.width * across, variant.height * down))
        left = min(round(left * across), size[0] - width)
        top = min(round(variant.top * down), size[1] - height)
        return Cut((left, top, left + width, top + height), variant.flip)
