"""Curves over the steps of runs."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from gralora_diffusion.studio import curves

ROWS = [
    {"step": 1, "loss": 2.0, "performance": {"samples_per_second": 5.0}},
    {"step": 2, "loss": None, "lr": 1e-4},
    {"step": 3, "loss": 1.0, "performance": "damaged"},
    {"step": 4, "loss": float("inf")},
    {"step": 5, "loss": 10**400, "lr": True},
    {"step": 6, "loss": -1.7e308, "lr": float("nan")},
]


def points_of(markup):
    root = ElementTree.fromstring(str(markup))
    return [
        [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
        for line in root.iter("polyline")
    ]


def test_numbers_that_there_are():
    assert curves.numbers_of(ROWS, "loss") == [(1, 2.0), (3, 1.0)]
    assert curves.numbers_of(ROWS, "samples_per_second") == [(1, 5.0)]
    assert curves.numbers_of(ROWS, "lr") == [(2, 1e-4)]


def test_smoothed():
    points = [(i, float(i)) for i in range(1, 41)]  # means of two
    assert curves.smoothed(points) == [(1, 1.0), *((i, i - 0.5) for i in range(2, 41))]


def test_a_plot_reaches_from_corner_to_corner():
    made = curves.plot("a <b>", [curves.Curve("run", [(1, 3.0), (2, 1.0), (5, 2.0)])])
    assert "<b>" not in re.sub("<b class", "", str(made))
    assert points_of(made) == [[(48, 10), (124, 126), (352, 68)]]


@pytest.mark.parametrize("points", [[(1, 0.0)], [(7, 5.0), (8, 5.0)], [(1, -1e300), (2, 1e300)]])
def test_extreme_points_stay_inside(points):
    for x, y in points_of(curves.plot("t", [curves.Curve("r", points)]))[0]:
        assert 48 <= x <= 352
        assert 10 <= y <= 126


def test_no_peak_of_a_long_curve_is_lost():
    values = [(i, 100.0 if i == 7777 else 1.0) for i in range(1, 20_001)]
    (line,) = points_of(curves.plot("t", [curves.Curve("r", values)]))
    assert len(line) < 400
    assert min(y for _, y in line) == 10


def test_a_single_point_is_a_dot():
    assert points_of(curves.plot("t", [curves.Curve("r", [(7, 5.0)])])) == [[(48, 68)] * 2]


def test_without_points_there_is_no_plot():
    assert curves.plot("t", [curves.Curve("r", [])]) == ""
