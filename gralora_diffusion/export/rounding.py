"""Round fused weights to nearest or stochastically, and measure the loss of the update.

A weight in half precision is a point of a grid. An update that is small compared with the distance
to the next point is lost completely or in part: at |dW| / |W| = 0.02, about 1% of the update is
lost in fp16, 8% in bf16, and most of it in fp8.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gralora_diffusion.io.dtypes import torch_dtype

from .choices import DTYPE_CHOICES

#: The dtypes that can be written, by name.
DTYPES = {name: torch_dtype(name) for name in DTYPE_CHOICES if name != "keep"}
_BITS = {1: torch.int8, 2: torch.int16}


class RoundingError(ValueError):
    """The dtype cannot represent a value."""


@dataclass(frozen=True)
class RoundingLoss:
    """How much of an update is in the output. Losses of tensors can be added.

    W is the base's value in the dtype of the output, O the written value and dW the update. O - W
    is the part of the update that was kept. The fields are sums over all values.

    Attributes:
        weight: |W|^2.
        update: |dW|^2.
        difference: |(O - W) - dW|^2.
        agreement: <O - W, dW>.
    """

    weight: float = 0.0
    update: float = 0.0
    difference: float = 0.0
    agreement: float = 0.0

    def __add__(self, other: RoundingLoss) -> RoundingLoss:
        return RoundingLoss(
            self.weight + other.weight,
            self.update + other.update,
            self.difference + other.difference,
            self.agreement + other.agreement,
        )

    @property
    def error(self) -> float:
        """|(O - W) - dW| / |dW|: the part of the update that is lost or replaced by noise."""
        return math.sqrt(self.difference / self.update) if self.update else 0.0

    @property
    def gain(self) -> float:
        """<O - W, dW> / |dW|^2: the strength of the remaining update; 1 if noise has no bias."""
        return self.agreement / self.update if self.update else 1.0

    def __str__(self) -> str:
        return f"{self.error:6.1%}, strength {self.gain:.3f}, |update| / |base| {self.ratio:.4f}"

    @property
    def ratio(self) -> float:
        """|dW| / |W|."""
        return math.sqrt(self.update / self.weight) if self.weight else math.inf


@dataclass(frozen=True)
class Rounding:
    """How values are rounded.

    Args:
        stochastic: round up or down at random, in proportion to the distances, so that the mean is
            exact.
        seed: seed of stochastic rounding. The same seed gives the same bytes.
    """

    stochastic: bool = False
    seed: int = 0

    def generator(self, key: str, block: int) -> torch.Generator | None:
        """Return the random generator for one block of rows of a tensor; None for nearest."""
        if not self.stochastic:
            return None
        digest = hashlib.sha256(f"{self.seed} {block} {key}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def round_to(values: Tensor, out: Tensor, generator: torch.Generator | None) -> None:
    """Round fp32 values to the dtype of ``out``: to nearest or, with a generator, stochastically.

    Values beyond the dtype's range become infinite or, in fp8, NaN.
    """
    nearest, dtype = out.copy_(values), out.dtype
    if generator is None or dtype.itemsize >= 4:
        return
    rounded, bits = nearest.float(), nearest.view(_BITS[dtype.itemsize])
    error = values - rounded
    # a float's bits are its magnitude: plus one is the next value away from zero, minus one the
    # next towards zero
    step = (torch.signbit(error) == torch.signbit(rounded)).to(bits.dtype).mul_(2).sub_(1)
    gap = (bits + step).view(dtype).float().sub_(rounded).abs_()
    chance = torch.rand(values.shape, generator=generator)
    bits += step.mul_(chance.mul_(gap) < error.abs_())


def measure(base: Tensor, base_rounded: Tensor, total: Tensor, rounded: Tensor) -> RoundingLoss:
    """Return the loss of a block of values by rounding, given as one row in fp32.

    Args:
        base: W before rounding.
        base_rounded: W; the same tensor if the base has the output's dtype.
        total: base + update. It is overwritten with the update.
        rounded: O. It is overwritten.
    """
    error = rounded.sub_(total)
    if base_rounded is not base:
        error += base - base_rounded
    update = total.sub_(base)
    squared = float(update.dot(update))
    return RoundingLoss(
        float(base_rounded.dot(base_rounded)),
        squared,
        float(error.dot(error)),
        squared + float(error.dot(update)),
    )
