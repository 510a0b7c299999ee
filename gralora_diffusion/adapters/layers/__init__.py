"""GraLoRA adapter layers, on PEFT's ``GraloraLayer``."""

from typing import TYPE_CHECKING

from gralora_diffusion.io.lazy import lazy_names

if TYPE_CHECKING:
    from .base import GraloraLayer
    from .conv2d import GraloraConv2d
    from .linear import GraloraLinear
else:  # the mathematics beside them does without PEFT
    __getattr__, __dir__ = lazy_names(
        __name__,
        {"base": ["GraloraLayer"], "conv2d": ["GraloraConv2d"], "linear": ["GraloraLinear"]},
    )

__all__ = ["GraloraConv2d", "GraloraLayer", "GraloraLinear"]
