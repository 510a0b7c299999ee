"""GraLoRA around convolutions."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import functional
from .base import GraloraLayer


class GraloraConv2d(GraloraLayer):
    """GraLoRA around ``nn.Conv2d``. Input (batch, in, height, width), or without batch.

    A has the layer's kernel, (k, in / k, r, h, w); B is 1 x 1 and keeps its shape (k, r, out / k).
    """

    groups = 1  # PEFT's LoRA reads it when it wraps this layer

    def _update(self, x: Tensor, adapter: str) -> Tensor:
        conv: Any = self.get_base_layer()
        padding = conv.padding
        x = x.to(self._product_dtype(x, adapter))
        if conv.padding_mode != "zeros":
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = 0
        parts = [
            functional.conv2d_update(
                x, A, B, self.scaling[adapter], conv.stride, padding, conv.dilation
            )
            for A, B in self._factors(adapter)
        ]
        return sum(parts[1:], parts[0])
