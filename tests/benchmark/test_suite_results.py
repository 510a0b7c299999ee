"""The numbers of the tiny suite in the documents are those of its scores, rounded once."""

import csv
import re

import numpy as np
import pytest
from scipy import stats

from tests import ROOT

TEXT = (ROOT / "docs/benchmark.md").read_text(encoding="utf-8")
SECTION = TEXT[TEXT.index("### What the suite showed") : TEXT.index("`--suite tiny` reads")]
FLAT = " ".join(SECTION.split())
PAIRS = [
    ("gralora-r16-k2", "lora-r16"),
    ("gralora-r16-k2", "lora-r32"),
    ("gralora-r4-k2", "lora-r4"),
]
#: Subjects that no earlier experiment had used.
NEW = ("octopus", "panda", "ladybird", "ufo")


@pytest.fixture(scope="module")
def rows():
    with (ROOT / "docs/benchmark_tiny/scores.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def curves(rows, method, cost):
    """Subject -> points of a method in the order of its rates, while the cost grows."""
    found = {}
    named = [row for row in rows if re.fullmatch(rf"{method}-lr[\d.e-]+", row["method"])]
    for row in sorted(named, key=lambda row: float(row["method"].split("-lr")[1])):
        points = found.setdefault(row["subject"], [])
        point = float(row[cost]), float(row["dino"])
        if not points or (points[-1] is not None and point[0] > points[-1][0]):
            points.append(point)
        else:
            points.append(None)  # nothing after it counts
    return {s: np.array([p for p in points if p]).T for s, points in found.items()}


def gaps(rows, method, reference, cost="drift_dino"):
    """Subject -> mean gap over the costs that both curves reach, on a fine grid."""
    found, theirs = {}, curves(rows, reference, cost)
    for subject, (x, y) in curves(rows, method, cost).items():
        u, v = theirs[subject]
        low, high = max(x[0], u[0]), min(x[-1], u[-1])
        if len(x) > 1 and len(u) > 1 and low < high:
            grid = np.linspace(low, high, 200_001)
            found[subject] = np.mean(np.interp(grid, x, y) - np.interp(grid, u, v))
    return found


def interval(values):
    values = np.array(list(values))
    reach = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return values.mean(), values.mean() - reach, values.mean() + reach


def shown(value):
    return f"{value:+.3f}".replace("-0.000", "+0.000")


def test_the_declared_comparisons(rows):
    assert len(rows) == 228
    assert {row["seed"] for row in rows} == {"0"}
    found = [gaps(rows, *pair) for pair in PAIRS]
    p = [stats.ttest_1samp(list(one.values()), 0).pvalue for one in found]
    order = np.argsort(p)
    holm = np.maximum.accumulate([p[i] * (3 - rank) for rank, i in enumerate(order)]).clip(max=1)
    corrected = dict(zip(order, holm, strict=True))
    assert min(corrected.values()) > 0.05  # none is decided
    for i, (pair, one) in enumerate(zip(PAIRS, found, strict=True)):
        mean, low, high = map(shown, interval(one.values()))
        cells = (*pair, f"{mean} ({low} to {high})", shown(np.median(list(one.values()))))
        assert f"| {' | '.join(cells)} | {p[i]:.2g} | {corrected[i]:.2g} |" in SECTION
    rank_4 = found[2]
    assert set(found[0]) - set(rank_4) == {"panda"}
    assert f"the tractor, has a gap of {shown(rank_4['tractor'])}" in FLAT
    apart = [shown(np.mean([one[s] for s in NEW if s in one])) for one in found]
    assert f"have mean gaps of {apart[0]}, {apart[1]} and {apart[2]}." in FLAT


def test_the_gaps_at_equal_norm(rows):
    found = [interval(gaps(rows, *pair, cost="update_norm").values()) for pair in PAIRS]
    assert all(low < 0 < high for _, low, high in found)
    told = ["{} ({} to {})".format(*map(shown, one)) for one in found]
    assert f"(exploratory): {told[0]}, {told[1]} and {told[2]}, in the order above" in FLAT


def test_the_curves(rows):
    table = re.findall(
        r"^\| (\S+), (\S+) \| (\S+), (\S+) \| (\S+), (\S+) \|", SECTION, re.MULTILINE
    )
    assert len(table) == 4
    for theirs, ours, *numbers in table:
        means = [
            np.mean([float(row[score]) for row in rows if row["method"] == method])
            for score in ("dino", "drift_dino")
            for method in (f"lora-r16-lr{theirs}", f"gralora-r16-k2-lr{ours}")
        ]
        assert [f"{mean:.3f}" for mean in means] == numbers
