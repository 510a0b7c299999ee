"""GraLoRA around linear layers."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .base import GraloraLayer, autocasts
from .fused_linear import (
    Backend,
    Update,
    adapted_linear,
    fused_linear,
    select_backend,
    transforms_active,
)

#: Modules of the tensor classes that torch's own products can read.
_PLAIN = {"torch", "torch.nn.parameter", "torch._subclasses.fake_tensor"}


class Separate(Enum):
    """Why the base layer computes its product itself, separately from the updates."""

    BASE_LAYER = "the base layer is not torch's own Linear with its own forward"
    HOOKS = "the base layer has hooks"
    GLOBAL_HOOKS = "every module has a hook, and the base layer's would not be called"
    WEIGHT = "the base layer's weight is not a plain tensor"
    TRAINED = "the base layer is trained too"
    DROPOUT = "dropout gives the updates another input"
    DTYPE = "the factors have another dtype than the base layer, and nothing autocasts"
    TRANSFORMS = "torch.func or forward-mode AD transforms the products one by one"


class GraloraLinear(GraloraLayer):
    """GraLoRA around ``nn.Linear`` or transformers' ``Conv1D``: from (..., in) to (..., out).

    ``backend`` records how the last forward was computed. A ``Backend`` of :mod:`.fused_linear`
    also computes the base layer's product, with one buffer each for the output and the input's
    gradient. :class:`Separate` is the reason why this was not possible: the output then takes
    another pass, and the input's gradient is summed from parts.
    """

    backend: Backend | Separate | None = None

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        # the compiler fuses operations itself, and cannot look into an autograd function
        if torch.compiler.is_compiling():
            return super()._adapted(x, names, *args, **kwargs)
        base: Any = self.base_layer
        backend: Backend | Separate | None = self._why_separate(base, names)
        if backend is None:
            # read as _why_separate does; a module's attributes take a Python call each
            weight, bias = base._parameters["weight"], base._parameters["bias"]
            updates = [update for name in names for update in self._updates(name)]
            dtype: torch.dtype = weight.dtype
            if autocasts(x):
                dtype = torch.get_autocast_dtype(x.device.type)
                weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            elif x.dtype is not dtype or any(A.dtype is not dtype for A, _, _ in updates):
                backend = Separate.DTYPE
        if backend is None:
            tokens = x.numel() // x.shape[-1]
            backend = select_backend(tokens, updates, dtype, torch.is_grad_enabled())
        if self.backend is not backend:  # because setting an attribute of a module takes long
            self.backend = backend
        if isinstance(backend, Separate):
            return super()._adapted(x, names, *args, **kwargs)
        return fused_linear(x, updates, weight, bias, dtype, backend)

    def _update(self, x: Tensor, adapter: str) -> Tensor:
        return adapted_linear(x, self._updates(adapter), dtype=self._product_dtype(x, adapter))

    def _updates(self, adapter: str) -> list[Update]:
        scaling = self.scaling[adapter]
        return [Update(A, B, scaling) for A, B in self._factors(adapter)]

    def _why_separate(self, base: nn.Module, names: list[str]) -> Separate | None:
        """Return why the base layer must compute its product itself, whatever the dtypes are."""
        if type(base) is not nn.Linear or "forward" in base.__dict__:
            return Separate.BASE_LAYER
        if (
            base._forward_pre_hooks
            or base._forward_hooks
            or base._backward_pre_hooks
            or base._backward_hooks
        ):
            return Separate.HOOKS
        if _has_any_global_hook():
            return Separate.GLOBAL_HOOKS
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
        if weight is None or type(weight).__module__ not in _PLAIN or weight.dtype.itemsize < 2:
            return Separate.WEIGHT
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return Separate.TRAINED
        if self.training:
            for name in names:
                if type(self.gralora_dropout[name]) is nn.Dropout:
                    return Separate.DROPOUT
        return Separate.TRANSFORMS if transforms_active() else None
