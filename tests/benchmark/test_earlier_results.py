"""The numbers of the earlier results in the documents are those of their scores, rounded once."""

import csv
import re

import pytest

from gralora_diffusion.benchmark.evaluation.curves import gaps
from gralora_diffusion.benchmark.evaluation.statistics import compare, estimate, subject_means
from tests import ROOT

TEXT = (ROOT / "docs/benchmark.md").read_text(encoding="utf-8")
SECTION = TEXT[TEXT.index("### What an earlier suite showed") : TEXT.index("`--suite tiny` reads")]


@pytest.fixture(scope="module")
def rows():
    with (ROOT / "docs/benchmark_tiny/scores.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def values(rows, method, score):
    return {(r["subject"], int(r["seed"])): float(r[score]) for r in rows if r["method"] == method}


def curves(rows, *methods):
    found = {}
    for method in methods:
        costs, scores = (values(rows, method, name) for name in ("drift_dino", "dino"))
        for place in costs:
            found.setdefault(place, []).append((costs[place], scores[place]))
    return found


def test_the_table(rows):
    shown = re.findall(
        r"^\| (\S+) \| (\S+) M \| (\d+) \| (0\.\d+) \| (0\.\d+) \|", SECTION, re.MULTILINE
    )
    assert {row[0] for row in shown} == {row["method"] for row in rows}
    for method, parameters, rank, similarity, drift in shown:
        one = next(row for row in rows if row["method"] == method)
        assert f"{int(one['parameters']) / 1e6:.2f}" == parameters
        assert one["update_rank"] == rank
        assert f"{estimate(values(rows, method, 'dino')).mean:.3f}" == similarity
        assert f"{estimate(values(rows, method, 'drift_dino')).mean:.3f}" == drift


def test_the_differences(rows):
    flat = " ".join(SECTION.split())
    for score, form in (
        ("dino", "({:.3f}, 95% interval {:.3f} to {:.3f})"),
        ("drift_dino", "({:.3f}, {:.3f} to {:.3f})"),
    ):
        ours, theirs = (values(rows, m, score) for m in ("gralora-r16-k2", "lora-r16"))
        d = compare(ours, theirs, True).difference
        assert form.format(d.mean, d.low, d.high) in flat
    found = gaps(
        curves(rows, "gralora-r16-k2", "gralora-r16-k2-lr4e-3"),
        curves(rows, "lora-r16-lr2e-3", "lora-r16"),
    )
    gap, means = estimate(found), subject_means(found)
    assert f"than LoRA's by {gap.mean:.3f} ({gap.low:.3f} to {gap.high:.3f})" in flat
    assert min(means.values()) > 0
    assert 3 < means["tractor"] / gap.mean < 3.5
    prior = {f"{estimate(values(rows, row['method'], 'prior_dino')).mean:.2f}" for row in rows}
    assert prior == {"0.98", "0.99"}
