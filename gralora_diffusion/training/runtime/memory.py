"""Bytes of models, of an optimizer's state, and of a computation at its peak.

A computation is measured on fake tensors (``torch._subclasses.FakeTensorMode``), which have shape,
dtype and device but take no memory. The program itself runs, so nothing need be known about it.
torch's own ``MemTracker`` cannot be used here, since it puts hooks on weights without gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from gralora_diffusion.pipelines.placement import bytes_of

#: The allocator of a CUDA device rounds up to multiples of it.
_CUDA_BLOCK = 512


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device that are free, and all of them; for the CPU, with swap in ``total``."""

    free: int
    total: int


def device_memory(device: torch.device) -> DeviceMemory:
    """Return the memory that this process may use on a device; the CPU's is the machine's."""
    if device.type == "cuda":
        return DeviceMemory(*torch.cuda.mem_get_info(device))
    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total + psutil.swap_memory().total
    for limit, used in _limits_of_containers():
        free, total = min(free, limit - used), min(total, limit)
    return DeviceMemory(max(0, free), total)


def _limits_of_containers(root: Path = Path("/sys/fs/cgroup")) -> Iterator[tuple[int, int]]:
    """Yield limit and use of memory of the control groups that this process is in (Linux)."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    own = next((line.split("::", 1)[1] for line in lines if line.startswith("0::")), "/")
    folder = root / own.lstrip("/")
    for group in (folder, *folder.parents):
        if not group.is_relative_to(root):
            return
        try:
            limit = int((group / "memory.max").read_text())
            yield limit, int((group / "memory.current").read_text())
        except (OSError, ValueError):  # no limit ("max"), or no control groups
            continue


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
