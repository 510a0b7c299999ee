"""How a layer holds its adapters' factors, so that offloading and casting treat them right."""

from __future__ import annotations

from torch import Tensor, nn


class FactorDict(nn.ParameterDict):
    """Factors by adapter name. Call it to read one: ``factors(name)``.

    Indexing would read the parameter as it lies there. A call goes through the module's hooks, so
    that offloading (accelerate's ``AlignDevicesHook``) first brings the factor to the computing
    device.
    """

    __call__ = nn.Module.__call__  # ParameterDict forbids calling

    def forward(self, name: str) -> Tensor:
        return self[name]


class Projection(nn.Module):
    """One factor of the hybrid (plain LoRA) pair, with weight (out, in, *kernel).

    Not an ``nn.Linear``, so that whatever casts or quantizes the linear layers of a model
    (layerwise fp8 casting, torchao, quanto) leaves the adapter alone.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return self.weight
