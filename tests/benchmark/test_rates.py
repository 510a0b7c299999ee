"""Rates of methods: the same steps for all, and names that are read back."""

import math

import pytest
import torch
from torch import nn

from gralora_diffusion.benchmark.diagnostics import update_norm
from gralora_diffusion.benchmark.evaluation.endpoint import without_rate
from gralora_diffusion.benchmark.methods import Method
from gralora_diffusion.benchmark.rates import at_rates, base_rates, rate_factor, rate_problems
from gralora_diffusion.benchmark.rivals import attach_rival


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
        ("scaledlora-r16", 1),
        ("rslora-r16", 1 / 4),
        ("loraplus-r16-x16", 1 / 16),
        ("pissa-r16", math.sqrt(1 / 6)),
        ("lokr-r64-f4", math.sqrt(12)),
        ("oft-b65", 1 / 4),
        ("boft-b64-m1", 4 / math.sqrt(253)),
    ],
)
def test_factors_by_root_of_k_and_of_the_ranks(name, factor):
    assert rate_factor(Method.parse(name), 16) == pytest.approx(factor)


@pytest.mark.parametrize(
    "name",
    [
        *("lora-r32", "dora-r16", "scaledlora-r16", "rslora-r16", "loraplus-r16-x16", "pissa-r16"),
        *("lokr-r8-f4", "oft-b32", "boft-b32-m1"),
    ],
)
def test_first_steps_are_those_of_a_lora(name):
    """A real step of AdamW on a real layer, at a method's factor: as far as LoRA's, to a third."""
    moved = []
    for method in (Method.parse("lora-r16"), Method.parse(name)):
        torch.manual_seed(0)
        model = nn.ModuleDict({"layer": nn.Linear(256, 256)})
        attach_rival(model, {"layer": model["layer"]}, method, 0.0)
        layer = model["layer"].train()
        parameters = [p for p in layer.parameters() if p.requires_grad]
        second = [p for n, p in layer.named_parameters() if "lora_B" in n]
        rate = 1e-4 * rate_factor(method, 16)
        groups = [
            {"params": [p for p in parameters if all(p is not q for q in second)]},
            {"params": second, "lr": rate * method.ratio},
        ]
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0)
        layer(torch.randn(512, 256)).mul(torch.randn(512, 256)).sum().backward()
        optimizer.step()
        moved.append(update_norm([model]))
    assert moved[1] == pytest.approx(moved[0], rel=1 / 3)


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
