"""Rates of methods: the same steps for all, and names that are read back."""

import math

import pytest

from gralora_diffusion.benchmark.evaluation.endpoint import without_rate
from gralora_diffusion.benchmark.methods import Method
from gralora_diffusion.benchmark.rates import at_rates, base_rates, rate_factor, rate_problems


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("lora-r16", 1),
        ("gralora-r16-k2", math.sqrt(2)),
        ("gralora-r16-k4", 2),
        ("lora-r32", math.sqrt(1 / 2)),
        ("lora-r4", 2),
        ("gralora-r4-k2", math.sqrt(8)),
        ("gralora-r12-k2-h4", math.sqrt(2)),
        ("dora-r64", 1 / 2),
        ("loha-r4", 1),
    ],
)
def test_factors_by_root_of_k_and_of_the_ranks(name, factor):
    assert rate_factor(Method.parse(name), 16) == pytest.approx(factor)


def test_each_method_at_its_rates():
    methods = ["base", "lora-r16", "gralora-r16-k4", "full", "lora-r8-lr0.5", "full-lr1e-5"]
    assert at_rates(methods, ["1e-3", "0.002"], None) == [
        *("base", "lora-r16-lr1e-3", "lora-r16-lr2e-3"),
        *("gralora-r16-k4-lr2e-3", "gralora-r16-k4-lr4e-3", "full", "lora-r8-lr0.5", "full-lr1e-5"),
    ]
    assert [round(rate, 9) for rate in base_rates(["auto"], 2e-3)] == [
        *(1e-3, 0.001414214, 2e-3, 0.002828427)
    ]
    assert at_rates(["gralora-r16-k2"], ["2"], None) == ["gralora-r16-k2-lr2.8e0"]


def test_names_are_read_back_and_belong_to_their_curve():
    for rate in (1.234e-5, 9.96e-4, 0.0123, 0.5, 1.0, 3.14):
        (name,) = at_rates(["gralora-r12-k2-h4"], [str(rate)], None)
        method = Method.parse(name)
        assert method.name == name
        first = rate * math.sqrt(2)
        assert float(method.learning_rate) == pytest.approx(first, rel=0.051)
        assert without_rate(name) == "gralora-r12-k2-h4"
    for name in ("lora-r4", "base", "full", "a-lr", "<i>gralora-lrx"):
        assert without_rate(name) == name


def test_problems():
    assert rate_problems(["lora-r4"], ["auto"], None) == [
        "--rates: auto needs --learning_rate, around which the rates lie"
    ]
    for wrong in ("-1", "0", "nan", "inf", "fast"):
        assert rate_problems(["lora-r4"], [wrong], 1.0) == [
            f"--rates: {wrong!r} is neither auto alone nor a positive number"
        ]
    assert rate_problems(["no method"], ["auto"], 1.0) == []  # reported as a method
    assert rate_problems(["lora-r4"], ["auto"], 1.0) == []
