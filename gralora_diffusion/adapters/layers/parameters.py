"""How a layer holds its adapters' factors, so that offloading and casting treat them right."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FactorDict(nn.ParameterDict):
    """Factors by adapter name. Call it to read one: ``factors(name)``.

    Indexing would read the parameter as it lies there. A call goes through the module's hooks, so
    that offloading (accelerate's ``AlignDevicesHook``, diffusers' ``GroupOffloadingHook``) first
    brings the factor to the computing device.
    """

    __call__ = nn.Module.__call__  # ParameterDict forbids calling

    def forward(self, name: str) -> Tensor:
        return _outlasting_hooks(self, self[name])


class Projection(nn.Module):
    """One factor of the hybrid (plain LoRA) pair, with weight (out, in, *kernel).

    Not an ``nn.Linear``, so that whatever casts or quantizes the linear layers of a model
    (layerwise fp8 casting, torchao, quanto) leaves the adapter alone.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return _outlasting_hooks(self, self.weight)


def _outlasting_hooks(holder: nn.Module, factor: Tensor) -> Tensor:
    """The factor; where hooks lie around ``holder``, as an alias.

    diffusers' group offloading sets the parameter's ``data`` when the call is over, that is before
    the product has read it. An alias keeps the memory that was there in the call.
    """
    if "forward" not in vars(holder):  # such hooks replace it
        return factor
    if factor.is_cuda:
        # what a side stream brought is given back to that stream once the alias is gone, and would
        # be overwritten there while the product may still be waiting in this one
        factor.record_stream(torch.cuda.current_stream(factor.device))
    return factor.view_as(factor)
