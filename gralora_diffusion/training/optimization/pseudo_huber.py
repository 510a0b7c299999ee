"""The pseudo-Huber loss with a schedule of its parameter (arXiv 2403.16728), as others compute it.

The formulas are those of ``conditional_loss`` and of the schedules in diffusers' training scripts
and in kohya's sd-scripts, so a value of ``huber_c`` means the same here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class PseudoHuber:
    """Errors that count as their square up to about c, and by their size from there on.

    Attributes:
        kind: "huber" is 2 c (sqrt(e^2 + c^2) - c), near e^2 for small errors e; "smooth_l1" is
            2 (sqrt(e^2 + c^2) - c), near 2 |e| for large ones.
        c: the parameter, at the highest timestep if it has a schedule.
        schedule: "constant"; "exponential", c^(t / T); "snr", (1 - c) / (1 + sigma)^2 + c, with
            sigma = sqrt((1 - alpha) / alpha) of the timestep.
    """

    kind: Literal["huber", "smooth_l1"]
    c: float
    schedule: Literal["constant", "exponential", "snr"]

    def thresholds(self, parts: Tensor, snr: Tensor | None) -> Tensor:
        """Return c of each sample.

        Args:
            parts: t / T of each sample, (batch,).
            snr: signal-to-noise ratio of each sample, alpha / (1 - alpha), which only "snr" needs.
        """
        if self.schedule == "constant":
            return parts.new_full(parts.shape, self.c)
        if self.schedule == "exponential":
            return self.c**parts
        assert snr is not None
        return (1 - self.c) / (1 + snr.rsqrt()) ** 2 + self.c

    def errors(self, difference: Tensor, thresholds: Tensor) -> Tensor:
        """Return the loss of each element, shaped as ``difference``, (batch, C, h, w).

        Args:
            thresholds: of :meth:`thresholds`, (batch,).
        """
        c = thresholds.view(-1, *[1] * (difference.dim() - 1))
        square = difference.square()
        # sqrt(e^2 + c^2) - c, without the difference of two numbers that are nearly the same
        error = 2 * square / ((square + c.square()).sqrt() + c)
        return error * c if self.kind == "huber" else error
