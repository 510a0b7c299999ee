"""Gaps between curves, against integrals by fine sums and closed forms."""

import numpy as np
import pytest

from gralora_diffusion.benchmark.evaluation.curves import gaps, growing, mean_gap


def test_the_gap_of_straight_lines_is_that_at_the_middle():
    curve = [(0.0, 1.0), (4.0, 5.0)]  # 1 + x
    reference = [(2.0, 0.0), (6.0, 2.0)]  # (x - 2) / 2
    assert mean_gap(curve, reference) == pytest.approx((1 + 3) - (3 - 2) / 2)
    assert mean_gap(reference, curve) == pytest.approx(-3.5)
    assert mean_gap(curve, curve) == 0


def test_the_gap_by_a_fine_sum():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, u = (np.sort(rng.uniform(0, 1, n)) for n in (4, 5))
        y, v = rng.normal(size=4), rng.normal(size=5)
        found = mean_gap(list(zip(x, y, strict=True)), list(zip(u, v, strict=True)))
        low, high = max(x[0], u[0]), min(x[-1], u[-1])
        if low >= high:
            assert found is None
            continue
        fine = low + (high - low) * (np.arange(200_000) + 0.5) / 200_000
        expected = np.mean(np.interp(fine, x, y) - np.interp(fine, u, v))
        assert found == pytest.approx(expected, abs=1e-6)


def test_curves_without_a_common_range_have_no_gap():
    line = [(0.0, 1.0), (1.0, 2.0)]
    assert mean_gap(line, [(1.0, 0.0), (2.0, 0.0)]) is None
    assert mean_gap(line, [(3.0, 0.0), (4.0, 0.0)]) is None
    assert mean_gap(line, [(0.5, 0.0)]) is None


def test_points_count_while_the_cost_grows():
    points = [(0.1, 1.0), (0.3, 2.0), (0.3, 9.0), (0.5, 9.0)]
    assert growing(points) == points[:2]
    assert growing(points[:1]) == points[:1]
    assert growing([]) == []


def test_gaps_are_those_of_the_places_that_both_have():
    line, lower = [(0.0, 1.0), (1.0, 2.0)], [(0.0, 0.5), (1.0, 1.0)]
    broken = [(1.0, 0.0), (0.0, 0.0)]
    ours = {("a", 0): line, ("b", 0): line, ("c", 0): line}
    theirs = {("a", 0): lower, ("b", 0): broken, ("d", 0): lower}
    assert gaps(ours, theirs) == {("a", 0): pytest.approx(0.75)}
