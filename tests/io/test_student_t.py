"""Student's t distribution, against printed tables and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from gralora_diffusion.io.student_t import Interval, t_interval, t_quantile

#: Two-sided 95% points of Student's t, from printed tables, by degrees of freedom.
T_TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 12: 2.179, 29: 2.045}
T_TABLE |= {60: 2.000, 120: 1.980}


@pytest.mark.parametrize(("freedom", "point"), T_TABLE.items())
def test_students_quantiles_are_those_of_the_tables(freedom, point):
    assert t_quantile(0.975, freedom) == pytest.approx(point, abs=5.1e-4)
    assert t_quantile(0.025, freedom) == pytest.approx(-point, abs=5.1e-4)
    assert t_quantile(0.5, freedom) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 11, 29, 200])
def test_students_quantiles_are_scipys(freedom):
    for p in (0.6, 0.9, 0.975, 0.999):
        assert t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 8, 50])
def test_the_interval_of_a_mean_is_scipys(count):
    values = np.random.default_rng(count).normal(0.3, 2, count)
    low, high = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert t_interval(values.tolist()) == pytest.approx((values.mean(), low, high), rel=1e-9)


def test_one_value_has_no_interval():
    assert t_interval([0.25]) == Interval(0.25, None, None)
