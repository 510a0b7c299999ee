"""Methods compared along a cost: curves over learning rates, and the gap between two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .statistics import Place

#: (cost, score)
Point = tuple[float, float]


def growing(points: Sequence[Point]) -> list[Point]:
    """Return the points of a curve, in the order of its rates, for as long as the cost grows.

    At high rates training breaks down, and the cost no longer tells how far the model has moved.
    """
    kept = list(points[:1])
    for point in points[1:]:
        if point[0] <= kept[-1][0]:
            break
        kept.append(point)
    return kept


def mean_gap(curve: Sequence[Point], reference: Sequence[Point]) -> float | None:
    """Return the mean of curve - reference over the costs that both reach; None if there are none.

    Both curves are straight between their points. Points as :func:`growing` gives them.
    """
    if len(curve) < 2 or len(reference) < 2:
        return None
    (x, y), (u, v) = np.array(curve).T, np.array(reference).T
    low, high = max(x[0], u[0]), min(x[-1], u[-1])
    if not low < high:
        return None
    inner = [cost for cost in (*x, *u) if low < cost < high]
    costs = np.array(sorted({low, high, *inner}))
    gaps = np.interp(costs, x, y) - np.interp(costs, u, v)
    return float(np.sum(np.diff(costs) * (gaps[1:] + gaps[:-1]) / 2) / (high - low))


def gaps(
    curves: Mapping[Place, Sequence[Point]], references: Mapping[Place, Sequence[Point]]
) -> dict[Place, float]:
    """Return the gap of each subject and seed whose two curves have costs in common."""
    found = {}
    for place in curves:
        if place in references:
            gap = mean_gap(growing(curves[place]), growing(references[place]))
            if gap is not None:
                found[place] = gap
    return found
