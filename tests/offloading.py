"""Group offloading between two memories, where there is but one: what lies outside reads as NaN."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers.hooks.group_offloading import (
    GroupOffloadingConfig,
    GroupOffloadingType,
    ModuleGroup,
    _apply_group_offloading,
)
from torch import Tensor, nn

CPU = torch.device("cpu")


@contextmanager
def two_memories() -> Iterator[None]:
    """While a model computes, have what diffusers' groups offload read as NaN.

    Between a GPU and its host, too, the ``data`` of a parameter is replaced in place, and a product
    with what lies on the host fails. Afterwards, all values can be read again.
    """
    outside: dict[Tensor, Tensor] = {}

    def offload(group: ModuleGroup) -> None:
        for tensor in _tensors(group):
            if tensor not in outside and tensor.is_floating_point():
                outside[tensor] = tensor.data
                tensor.data = torch.full_like(tensor, torch.nan)

    def onload(group: ModuleGroup) -> None:
        for tensor in _tensors(group):
            if tensor in outside:
                tensor.data = outside.pop(tensor)

    with (
        patch.object(ModuleGroup, "_offload_to_memory", offload),
        patch.object(ModuleGroup, "_onload_from_memory", onload),
    ):
        yield
    for tensor, values in outside.items():
        tensor.data = values


def _tensors(group: ModuleGroup) -> list[Tensor]:
    held = [t for m in group.modules for t in (*m.parameters(), *m.buffers())]
    return [*held, *group.parameters, *group.buffers]


class Stream:
    """In place of a stream, which a CPU has none of: all is done at once."""

    def synchronize(self) -> None:
        pass


def offload_groups(
    model: nn.Module, level: str, stream: bool = False, disk: Path | None = None
) -> None:
    """As ``apply_group_offloading``, which refuses streams on a CPU.

    With one, diffusers notes the order of the first pass; from then on each group brings the next.
    """
    config = GroupOffloadingConfig(
        CPU,
        CPU,
        GroupOffloadingType(level),
        non_blocking=False,
        record_stream=stream,  # else it would ask the device for its current stream
        low_cpu_mem_usage=True,
        num_blocks_per_group=1,
        stream=Stream() if stream else None,
        offload_to_disk_path=str(disk) if disk else None,
    )
    _apply_group_offloading(model, config)
