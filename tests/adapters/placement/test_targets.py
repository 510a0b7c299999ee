"""Which k a layer can take, and which layers are left out."""

import pytest
from torch import nn

from gralora_diffusion import TargetError, inject
from gralora_diffusion.adapters.layers import GraloraLayer
from gralora_diffusion.adapters.placement.targets import find_targets, lowered_k, misfits
from tests import models
from tests.models import config


class Odd(nn.Module):
    """Layers whose widths have few divisors in common."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 18)
        self.b = nn.Linear(16, 8)
        self.c = nn.Conv2d(10, 15, 3)
        self.d = nn.Linear(7, 16)
        self.norm = nn.LayerNorm(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=8)


ALL = ["a", "b", "c", "d"]


def largest(r: int, k: int, *widths: int) -> int:
    """By trying: the largest number up to k that divides all."""
    return next(n for n in range(k, 0, -1) if all(number % n == 0 for number in (r, *widths)))


class TestLoweredK:
    @pytest.mark.parametrize("r", [8, 12, 30])
    def test_the_largest_that_divides_rank_and_widths(self, r):
        widths = {"a": (12, 18), "b": (16, 8), "c": (10, 15), "d": (7, 16)}
        for k in (k for k in range(1, r + 1) if r % k == 0):
            expected = {path: largest(r, k, *widths[path]) for path in ALL}
            lowered = lowered_k(Odd(), config(ALL, r=r, gralora_k=k))
            assert lowered == {path: low for path, low in expected.items() if low != k}
            model = inject(Odd(), config(ALL, r=r, gralora_k=k, k_pattern=lowered))
            layers = {n: m for n, m in model.named_modules() if isinstance(m, GraloraLayer)}
            assert {n: m.gralora_k["default"] for n, m in layers.items()} == expected

    def test_the_layers_own_rank_and_k(self):
        patterned = config(
            ALL, r=8, gralora_k=4, rank_pattern={"a": 18, "c": 10}, k_pattern={"a": 9, "c": 5}
        )
        assert lowered_k(Odd(), patterned) == {"a": 6, "d": 1}
        assert lowered_k(Odd(), config(["b"], r=8, gralora_k=8)) == {}

    def test_what_no_k_helps_is_left_to_be_refused(self):
        wrong = config(["d", "norm", "grouped", "b"], r=8, gralora_k=4, rank_pattern={"b": 6})
        assert lowered_k(Odd(), wrong) == {"d": 1}
        wrong.k_pattern = {"d": 1}
        with pytest.raises(TargetError) as caught:
            inject(Odd(), wrong)
        assert str(caught.value).count("\n  ") == 3
        for text in ("norm: a LayerNorm", "grouped: a convolution with groups=8", "b: r=6 not div"):
            assert text in str(caught.value)


class TestMisfits:
    def test_each_layer_is_measured_by_its_own_rank_and_k(self):
        wrong = config(ALL, r=8, gralora_k=4, rank_pattern={"a": 6}, k_pattern={"c": 5, "b": 8})
        (text,) = misfits(find_targets(Odd(), wrong), wrong)
        head, *lines, advice = text.split("\n")
        assert head == (
            "3 of 4 target layers cannot take GraLoRA of the r and gralora_k that the config gives "
            "them:"
        )
        assert lines == [
            "  a: out_features=18 and r=6 not divisible by gralora_k=4 (largest k below that fits "
            "this layer and r=6: 3)",
            "  c: r=8 not divisible by gralora_k=5 (largest k below that fits this layer and r=8: "
            "1)",
            "  d: in_features=7 not divisible by gralora_k=4 (largest k below that fits this layer "
            "and r=8: 1)",
        ]
        assert advice == "Choose another k for these layers in k_pattern, or targets without them."

    def test_the_advice_counts_every_rank(self):
        wrong = config(["a", "b"], r=8, gralora_k=8, rank_pattern={"a": 16})
        (text,) = misfits(find_targets(Odd(), wrong), wrong)
        assert "Choose gralora_k=1 or 2, or targets without these layers, or a smaller k" in text


class TestExcluded:
    @pytest.mark.parametrize(
        ("excluded", "left"),
        [
            (["fc1"], {"fc2", "q_proj"}),
            (["1.mlp.fc1", "q_proj"], {"fc1", "fc2"}),
            (r".*mlp\..*", {"q_proj"}),
        ],
    )
    def test_left_out(self, excluded, left):
        chosen = config(["fc1", "fc2", "q_proj"], exclude_modules=excluded)
        model = inject(models.text_encoder(), chosen)
        adapted = {n for n, m in model.named_modules() if isinstance(m, GraloraLayer)}
        assert adapted == set(find_targets(models.text_encoder(), chosen))
        assert {name.rsplit(".", 1)[-1] for name in adapted} == left
        assert "encoder.layers.1.mlp.fc1" not in adapted

    @pytest.mark.parametrize(
        ("excluded", "text"),
        [
            (["fc1", "fc3"], "these exclude_modules match no module: fc3."),
            (r".*fc3", r"these exclude_modules match no module: .*fc3."),
            ("*fc3", "exclude_modules '*fc3' is not a regular expression"),
            (["fc1", "fc2"], "not found in the model: no layer matches"),
        ],
    )
    def test_refused(self, excluded, text):
        with pytest.raises(TargetError) as caught:
            inject(models.text_encoder(), config(["fc1", "fc2"], exclude_modules=excluded))
        assert text in str(caught.value)
