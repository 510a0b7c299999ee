"""GraLoRA adapter layers, on PEFT's ``GraloraLayer``."""

from .base import GraloraLayer
from .conv2d import GraloraConv2d
from .linear import GraloraLinear

__all__ = ["GraloraConv2d", "GraloraLayer", "GraloraLinear"]
