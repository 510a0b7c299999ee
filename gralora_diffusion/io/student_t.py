"""Student's t distribution: its quantiles, and the interval of a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

#: Fewest values that have an interval.
MIN_VALUES = 2


class Interval(NamedTuple):
    """A mean and its 95% interval; ``low`` and ``high`` are None for a single value."""

    mean: float
    low: float | None
    high: float | None


def t_interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values and its 95% interval.

    Args:
        values: at least one, all finite.
    """
    mean = fmean(values)
    if len(values) < MIN_VALUES:
        return Interval(mean, None, None)
    half = t_quantile(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def t_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution, by bisection.

    The distribution function for whole degrees of freedom is given by 26.7.3 and 26.7.4 of M.
    Abramowitz and I. A. Stegun, Handbook of Mathematical Functions.
    """
    low, high = 0.0, math.pi / 2  # of the angle atan(t / sqrt(freedom))
    for _ in range(60):
        angle = (low + high) / 2
        if t_distribution(angle, freedom) < abs(2 * probability - 1):
            low = angle
        else:
            high = angle
    return math.copysign(math.tan(low) * math.sqrt(freedom), probability - 0.5)


def t_distribution(angle: float, freedom: int) -> float:
    """Return the probability that \\|t\\| is below sqrt(freedom) tan(angle)."""
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for j in range(3 if odd else 2, freedom + 1, 2):
        total += term
        term *= cosine**2 * (j - 1) / j
    series = math.sin(angle) * total
    return 2 / math.pi * (angle + series) if odd else series
