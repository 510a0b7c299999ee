"""The experiment on which k: its pieces, and the numbers of the documents against its results."""

import json

import numpy as np
import pytest
import torch
from scipy import stats

from gralora_diffusion.adapters.layers import functional
from tests import ROOT
from tests.performance import which_k

PAGE = (ROOT / "docs/how_it_works.md").read_text(encoding="utf-8")
FOUND = json.loads((ROOT / "docs/images/which_k.json").read_text(encoding="utf-8"))


def test_targets_have_their_blocks_and_ranks():
    for structure in which_k.STRUCTURES:
        target = which_k.targets(structure, [3])[0].double()
        assert float(target.norm()) == pytest.approx(which_k.WIDTH**0.5)
        side = which_k.WIDTH // structure
        for j in range(structure):
            for n in range(structure):
                block = target[j * side : (j + 1) * side, n * side : (n + 1) * side]
                assert torch.linalg.matrix_rank(block, rtol=1e-5) == which_k.RANK // structure
        left = [which_k.representable(target, k) for k in which_k.KS]
        assert left[which_k.KS.index(structure)] == pytest.approx(0, abs=1e-9)
        assert all(value > 0.01 for k, value in zip(which_k.KS, left, strict=True) if k < structure)


def test_updates_and_measures():
    A, B = functional.init_factors(32, 32, rank=8, k=4, zero_update=False)
    expected = functional.delta_weight(A, B)
    update = which_k.dense(A[None], B[None])
    torch.testing.assert_close(update[0], expected)
    first = float(expected[:, 0].square().sum() / expected.square().sum())
    assert float(which_k.share(update)) == pytest.approx(first, rel=1e-5)
    other = torch.randn_like(update)
    by_hand = float((expected * other[0]).sum() / expected.norm() / other.norm())
    assert float(which_k.cosine(update, other)) == pytest.approx(by_hand, rel=1e-4, abs=1e-6)


def test_intervals_and_figure_are_those_of_the_losses():
    for row in FOUND["rows"]:
        losses = np.array(row["losses"])
        assert len(losses) == which_k.REPORTED
        reach = stats.t.ppf(0.975, len(losses) - 1) * stats.sem(losses)
        ends = losses.mean(), losses.mean() - reach, losses.mean() + reach
        assert [row["loss"][end] for end in ("mean", "low", "high")] == pytest.approx(ends)
    assert (ROOT / "docs/images/which_k.svg").read_text(encoding="utf-8") == which_k.figure(FOUND)


def test_numbers_of_the_documents():
    for outlier in (1.0, which_k.OUTLIER):
        assert which_k.loss_table(FOUND, outlier) in PAGE
    assert which_k.measure_table(FOUND, 4) in PAGE
    section = PAGE[PAGE.index("## Which k") : PAGE.index("## Scaling")]
    flat = " ".join(section.split())
    row = which_k.row_of(FOUND, 4, 1, which_k.OUTLIER)
    full, step = (100 * row[name]["mean"] for name in ("full_share", "step_share"))
    assert f"{full:.0f}% of the full gradient and {step:.1f}% of AdamW's step" in flat
    assert f"1/{which_k.WIDTH} ({100 / which_k.WIDTH:.1f}%)" in flat
    assert f"{which_k.STEPS} steps of AdamW" in flat
    assert f"torch {FOUND['versions']['torch'].partition('+')[0]}" in flat
    assert not any(r["rate_at_the_end"] for r in FOUND["rows"])
    assert f"In none of the {len(FOUND['rows'])} rows of the results is the best rate" in flat
    more = [r for r in FOUND["rows"] if len(r["rates"]) > len(which_k.RATES)]
    better = [r for r in more if r["rate"] not in which_k.RATES]
    assert f"For {len(more)} rows, rates beyond the first four were tried" in flat
    assert f"up to {max(max(r['rates']) for r in more):g}; {'one' * len(better)} row is" in flat
    numbers = {len(r["rates"]) for r in FOUND["rows"]}
    assert f"the best of {min(numbers)} to {max(numbers)} learning rates" in flat


def test_rates_are_tried_until_the_best_is_not_at_an_end():
    first = {rate: {"loss": [float(n)] * 16} for n, rate in enumerate(which_k.RATES)}
    assert which_k._next_rates(first) == {which_k.LOWER[0]}
    lower = {which_k.LOWER[0]: {"loss": [9.0] * 16}, **first}
    assert which_k._next_rates(lower) == set()
    falling = {rate: {"loss": [-float(n)] * 16} for n, rate in enumerate(which_k.RATES)}
    assert which_k._next_rates(falling) == {which_k.HIGHER[0]}
    for rate in which_k.HIGHER:
        falling[rate] = {"loss": [-10.0 * rate] * 16}
    assert which_k._next_rates(falling) == set()  # there are no more
    assert which_k._best_rate(falling) == which_k.HIGHER[-1]
