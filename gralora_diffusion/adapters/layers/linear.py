"""GraLoRA around linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import functional
from .base import GraloraLayer, autocasts
from .fused_linear import Update, adapted_linear, choose_way

#: Modules of the tensor classes whose values torch's own products read.
_PLAIN = {"torch", "torch.nn.parameter", "torch._subclasses.fake_tensor"}


class GraloraLinear(GraloraLayer):
    """GraLoRA around ``nn.Linear`` or transformers' ``Conv1D``: from (..., in) to (..., out).

    ``way`` keeps how the last forward was computed. "added" and "merged" are those of
    :mod:`.fused_linear`, which compute the base layer's product too, with one
    buffer each for the output and the input's gradient. "separate: ..." gives the reason against
    them; it costs a pass over the output, and the input's gradient is summed from parts.
    """

    way: str | None = None

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return super()._adapted(x, names, *args, **kwargs)
        if reason := self._why_separate(x, names):
            self.way = f"separate: {reason}"
            return super()._adapted(x, names, *args, **kwargs)
        base: Any = self.base_layer
        updates = [update for name in names for update in self._updates(name)]
        dtype = self._product_dtype(x, names[0])
        self.way = way = choose_way(
            x.numel() // x.shape[-1], updates, dtype, torch.is_grad_enabled()
        )
        return adapted_linear(x, updates, base.weight, base.bias, dtype, way)

    def _update(self, x: Tensor, adapter: str) -> Tensor:
        dtype, updates = self._product_dtype(x, adapter), self._updates(adapter)
        if torch.compiler.is_compiling():  # the compiler fuses, and sees no functions in a function
            parts = [functional.linear_update(x.to(dtype), *update) for update in updates]
            return sum(parts[1:], parts[0])
        return adapted_linear(x, updates, dtype=dtype)

    def _updates(self, adapter: str) -> list[Update]:
        return [Update(A, B, self.scaling[adapter]) for A, B in self._factors(adapter)]

    def _why_separate(self, x: Tensor, names: list[str]) -> str | None:
        base = self.base_layer
        if type(base) is not nn.Linear or "forward" in vars(base):
            return "the base layer is not torch's own Linear with its own forward"
        if (
            base._forward_pre_hooks
            or base._forward_hooks
            or base._backward_pre_hooks
            or base._backward_hooks
        ):
            return "the base layer has hooks"
        if _has_any_global_hook():
            return "every module has a hook, and the base layer's would not be called"
        weight, bias = base.weight, base.bias
        if type(weight).__module__ not in _PLAIN or weight.dtype.itemsize < 2:
            return "the base layer's weight is not a plain tensor"
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return "the base layer is trained too"
        if self.training and any(type(self.gralora_dropout[n]) is nn.Dropout for n in names):
            return "dropout gives the updates another input"
        if not autocasts(x) and {x.dtype, *map(self._factor_dtype, names)} != {weight.dtype}:
            return "the factors have another dtype than the base layer, and nothing autocasts"
        return None
