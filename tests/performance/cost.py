"""What an adapter must cost: operations and bytes, on the peaks that this machine shows.

Per adapted layer, with t tokens, from ``i`` to ``o`` at rank r, the least are two products forward
(2 t r (i + o) operations) and four backward: the hidden tensor's gradient and B's, then A's and the
input's. Two bounds follow:

    operations  the six products at the speed of a large plain product: as if all of them were made
                while the frozen layer's operands are in the processor's cache anyway
    passes      each product on its own, for the longer of its operations and its operands' way
                through memory: what a layer made of separate products can reach
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.performance.measuring import Run, timed


@dataclass(frozen=True)
class Peak:
    """Operations and bytes (read and written) per second."""

    operations: float
    bytes: float

    def seconds(self, operations: float, moved: float = 0.0) -> float:
        return max(operations / self.operations, moved / self.bytes)


def measure_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Time a plain product of 2048 x 2048 and a copy of 256 MiB (8192 and 1 GiB on a GPU).

    The product is smaller where one takes long, as on a CPU that emulates bf16.
    """
    largest, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    side = 128
    while True:
        a = torch.randn(side, side, device=device, dtype=dtype)
        out = torch.empty_like(a)
        product = min(timed(lambda a=a, out=out: torch.mm(a, a, out=out), device) for _ in range(5))
        if side == largest or product > 0.05:
            break
        side *= 2
    if side < largest:  # a slow machine
        size = min(size, 2**26)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(timed(lambda: target.copy_(source), device) for _ in range(5))
    return Peak(2 * side**3 / product, 2 * size / copy)


@dataclass(frozen=True)
class Use:
    """One call of an adapted layer."""

    tokens: int
    inputs: int
    outputs: int


def uses(module: nn.Module, paths: list[str], run: Run) -> list[Use]:
    """How ``run`` calls the layers at ``paths``."""
    found: list[Use] = []

    def note(layer: nn.Linear, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = args[0]
        found.append(Use(x.numel() // x.shape[-1], layer.in_features, layer.out_features))

    hooks = [module.get_submodule(path).register_forward_hook(note) for path in paths]
    run()
    for hook in hooks:
        hook.remove()
    return found


def operations_of(run: Run) -> int:
    """Operations of the products in ``run``, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _products(use: Use, r: int, backward: bool) -> Iterator[tuple[int, int]]:
    """(operations, elements read and written) of each product; the large ones count."""
    t, i, o = use.tokens, use.inputs, use.outputs
    yield 2 * t * i * r, t * i + i * r + t * r  # hidden
    yield 2 * t * o * r, t * r + o * r + 2 * t * o  # added to the output
    if backward:
        yield 2 * t * o * r, t * o + o * r + t * r  # the hidden tensor's gradient
        yield 2 * t * o * r, t * o + t * r + o * r  # B's
        yield 2 * t * i * r, t * i + t * r + i * r  # A's
        yield 2 * t * i * r, t * r + i * r + 2 * t * i  # added to the input's


def least_seconds(
    layers: list[Use], rank: int, peak: Peak, itemsize: int, backward: bool
) -> tuple[float, float]:
    """The bounds ``operations`` and ``passes`` of all layers together, in seconds."""
    products = [p for use in layers for p in _products(use, rank, backward)]
    operations = sum(peak.seconds(count) for count, _ in products)
    return operations, sum(peak.seconds(count, itemsize * moved) for count, moved in products)
