"""A base as the pipeline that fills a masked part of an image, and what that pipeline is given."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from PIL import Image

from gralora_diffusion.families import ModelFamily


class Fill(NamedTuple):
    """An image, and a mask of its size that is white where to fill."""

    image: Image.Image
    mask: Image.Image

    @classmethod
    def whole(cls, height: int, width: int) -> Fill:
        """Return what generates a whole image, as from text alone."""
        size = width, height
        return cls(Image.new("RGB", size), Image.new("L", size, 255))

    def arguments(self, height: int, width: int) -> dict[str, Any]:
        """Return arguments of a pipeline's call, for an image of this size."""
        sizes = {"height": height, "width": width}
        return {"image": self.image, "mask_image": self.mask, **sizes}


def inpainting_pipeline(pipe: Any, family: ModelFamily) -> Any:
    """Return the family's pipeline that fills with the same models, or ``pipe`` itself."""
    import diffusers

    if type(pipe).__name__ == family.inpainting_pipeline:
        return pipe
    pipeline_class = getattr(diffusers, str(family.inpainting_pipeline))
    taken = inspect.signature(pipeline_class.__init__).parameters
    settings = {name: value for name, value in pipe.config.items() if name in taken}
    parts = {name: part for name, part in pipe.components.items() if name in taken}
    return pipeline_class(**{**settings, **parts})
