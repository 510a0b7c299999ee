"""Axes of the plots, at the limits of what floats can say."""

import math
import re

import pytest

from gralora_diffusion.benchmark.report.svg import WIDTH, strips

DOT = re.compile(r'<circle[^>]* cx="([^"]*)"')


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        [1.0, 10.0, 100.0],
        [1e-60, 1e60],
        [1e-280, 1.0],
        [5e-324],
        [5e-324, 1e60],
        [1e60],
        [1.0, math.nextafter(1.0, 2)],
    ],
)
def test_values_are_in_their_order_within_the_plot(values: list[float], log: bool) -> None:
    places = [float(place) for place in DOT.findall(strips("a", [("b", values, 0)], "c", log=log))]
    assert len(places) == len(values)
    assert places == sorted(places)
    assert all(-WIDTH < place < WIDTH for place in places)
