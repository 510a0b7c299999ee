"""How a layer holds its adapters' factors, so that offloading and casting handle them correctly."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FactorDict(nn.ParameterDict):
    """Factors by adapter name; :meth:`read` returns one for computing.

    Indexing would return the parameter where it currently lies. Reading calls the module if it has
    hooks, so that offloading (accelerate's ``AlignDevicesHook``, diffusers'
    ``GroupOffloadingHook``) first moves the factor to the computing device.
    """

    def read(self, name: str) -> Tensor:
        """Return a factor where it can be computed with."""
        factor = self._parameters.get(name)
        if (
            factor is None  # but an attribute, as in a replica of DataParallel
            or "forward" in self.__dict__
            or self._forward_pre_hooks
            or self._forward_hooks
            or self._backward_hooks
        ):
            return self(name)
        return factor  # without a call of the module, which takes as long as a kernel

    __call__ = nn.Module.__call__  # ParameterDict forbids calling

    def forward(self, name: str) -> Tensor:
        return _outlasting_hooks(self, self[name])


class Projection(nn.Module):
    """One factor of the hybrid (plain LoRA) pair, with weight (out, in, *kernel).

    It is not an ``nn.Linear``, so that libraries that cast or quantize the linear layers of a model
    (layerwise fp8 casting, torchao, quanto) do not change the adapter.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return _outlasting_hooks(self, self.weight)


def _outlasting_hooks(holder: nn.Module, factor: Tensor) -> Tensor:
    """Return the factor, or an alias of it if ``holder`` has hooks.

    diffusers' group offloading resets the parameter's ``data`` at the end of the call, before the
    product has read it. An alias keeps the memory that the parameter had during the call.
    """
    if "forward" not in vars(holder):  # these hooks replace it
        return factor
    if factor.is_cuda:
        # memory allocated on a side stream returns to that stream when the alias is freed. Without
        # this, it could be overwritten there while the product is still waiting in this stream
        factor.record_stream(torch.cuda.current_stream(factor.device))
    return factor.view_as(factor)
