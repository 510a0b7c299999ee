"""Shares of choices: whose they are, and intervals that cover the truth when choices are alike."""

import numpy as np
import pytest
from scipy import stats

from gralora_diffusion.benchmark.evaluation.choices import analyse, cluster_interval


def test_interval_of_independent_choices_is_wilsons():
    """With as many clusters as choices, and a normal quantile in the limit of many."""
    values = [[1.0]] * 600 + [[0.0]] * 400
    effective, low, high = cluster_interval(values)
    expected = stats.binomtest(600, 1000).proportion_ci(method="wilson")
    assert effective == pytest.approx(999)  # the variance divides by one less
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=2e-4)


def test_interval_of_dependent_choices_is_wider():
    _, low, high = cluster_interval([[1.0] * 10] * 6 + [[0.0] * 10] * 4)
    _, alone_low, alone_high = cluster_interval([[1.0]] * 6 + [[0.0]] * 4)
    assert (low, high) == pytest.approx((alone_low, alone_high))
    assert cluster_interval([[1.0, 0.0]]) == (None, None, None)
    effective, low, high = cluster_interval([[1.0] * 9] * 4)
    assert (effective, high) == (4.0, pytest.approx(1.0))
    assert low < 0.5


@pytest.mark.parametrize(("share", "likeness"), [(0.5, 0.0), (0.5, 0.2), (0.7, 0.2), (0.6, 0.5)])
def test_interval_covers_the_truth(share, likeness):
    """Subjects differ in their shares (beta), with the given correlation of their choices."""
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(1500):
        if likeness:
            total = 1 / likeness - 1
            shares = random.beta(share * total, (1 - share) * total, 12)
        else:
            shares = np.full(12, share)
        clusters = [list((random.random(8) < p).astype(float)) for p in shares]
        _, low, high = cluster_interval(clusters)
        covered += low <= share <= high
    assert 0.93 <= covered / 1500 <= 0.985


def test_analysis_by_comparison():
    pairs = [
        {"comparison": ["a", "b"], "subject": s, "left": left, "right": right, "drifts": None}
        for s, left, right in (("x", "a", "b"), ("y", "b-lr1e-3", "a-lr1e-3"), ("y", "b", "a"))
    ]
    pairs.append({"comparison": ["c", "b"], "subject": "x", "left": "b", "right": "c"})
    found = analyse(pairs, [{0: "left", 1: "right"}, {2: "left", 3: "none"}])
    assert [(one.method, one.choices, one.share) for one in found] == [
        ("a", 3, pytest.approx(2 / 3)),
        ("c", 1, 0.5),
    ]
    assert found[0].people == 2
    assert (found[1].low, found[1].drift_gap) == (None, None)
