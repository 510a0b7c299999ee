"""Bytes of models, of an optimizer's state, and of a computation at its peak.

A computation is measured on fake tensors (``torch._subclasses.FakeTensorMode``), which have shape,
dtype and device but take no memory. The program itself runs, so nothing need be known about it.
torch's own ``MemTracker`` cannot be used here, since it puts hooks on weights without gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from gralora_diffusion.pipelines.placement import bytes_of

#: The allocator of a CUDA device rounds up to multiples of it.
_CUDA_BLOCK = 512


class MemoryMeter(TorchDispatchMode):
    """Counts the storages that operations allocate while it is entered, until they are freed.

    Args:
        device: only storages on it count.
        known: tensors that existed before.

    Attributes:
        now: bytes that are allocated.
        peak: the maximum of ``now``.
        noted_at_peak: bytes of the gradients that :meth:`note` had recorded at the peak.
    """

    def __init__(self, device: torch.device, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.device, self.now, self.peak = device, 0, 0
        self._noted: set[Tensor] = set()
        self.noted = self.noted_at_peak = 0
        self._seen = WeakIdKeyDictionary({tensor.untyped_storage(): 0 for tensor in known})

    def __enter__(self) -> MemoryMeter:
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device.type:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        if self.device.type == "cuda":
            size += -size % _CUDA_BLOCK
        self._seen[storage] = size
        self.now += size
        if self.now > self.peak:
            self.peak, self.noted_at_peak = self.now, self.noted
        weakref.finalize(storage, self._free, size)

    def note(self, parameter: Tensor) -> None:
        """Record that a parameter has its gradient; a hook for after accumulation."""
        if parameter not in self._noted and parameter.grad is not None:
            self._noted.add(parameter)
            self.noted += bytes_of([parameter.grad])

    def _free(self, size: int) -> None:
        self.now -= size


def materialize(module: nn.Module, device: torch.device) -> None:
    """Give a module on the meta device fake tensors on ``device``; call it in a fake mode.

    ``Module.to_empty`` cannot do this, since it does not accept fake tensors as replacements.
    """
    made: dict[Tensor, Parameter] = {}  # a tied weight stays tied
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if parameter not in made:
                made[parameter] = Parameter(_empty(parameter, device), parameter.requires_grad)
            part._parameters[name] = made[parameter]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _empty(buffer, device)


def _empty(tensor: Any, device: torch.device) -> Tensor:
    if not hasattr(tensor, "__tensor_flatten__"):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    names, others = tensor.__tensor_flatten__()  # a quantized weight: each of its parts
    parts = {name: _empty(getattr(tensor, name), device) for name in names}
    return type(tensor).__tensor_unflatten__(parts, others, tensor.shape, tensor.stride())
