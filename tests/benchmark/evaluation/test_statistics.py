"""Statistics against closed forms, whole enumerations, tables, and simulated truth."""

import itertools
import math

import numpy as np
import pytest

from gralora_diffusion.benchmark.evaluation.statistics import (
    MIN_SUBJECTS,
    compare,
    estimate,
    pareto_front,
    t_quantile,
)

#: Two-sided 95% points of Student's t, from printed tables, by degrees of freedom.
T_TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 12: 2.179, 29: 2.045}
T_TABLE |= {60: 2.000, 120: 1.980}


def by_place(values):
    """[subjects][seeds] as a mapping."""
    return {
        (f"subject {i}", seed): float(value)
        for i, row in enumerate(values)
        for seed, value in enumerate(row)
    }


def tail(n, freedom):
    """How far out the quantile is (Hesterberg 2014), with the table's t."""
    return math.erfc(T_TABLE[freedom] * math.sqrt(n / (n - 1)) / math.sqrt(2)) / 2


@pytest.mark.parametrize(("freedom", "point"), T_TABLE.items())
def test_students_quantiles_are_those_of_the_tables(freedom, point):
    assert t_quantile(0.975, freedom) == pytest.approx(point, abs=5.1e-4)
    assert t_quantile(0.025, freedom) == pytest.approx(-point, abs=5.1e-4)
    assert t_quantile(0.5, freedom) == pytest.approx(0, abs=1e-9)


def test_quantiles_of_one_and_two_degrees_in_closed_form():
    for p in (0.6, 0.9, 0.975, 0.999):
        assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)
        closed = (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
        assert t_quantile(p, 2) == pytest.approx(closed, rel=1e-9)


def test_of_normal_means_it_is_students_interval():
    rng = np.random.default_rng(3)
    values = rng.normal(0.7, 0.1, size=(30, 1)) + rng.normal(0, 0.05, size=(30, 3))
    found = estimate(by_place(values), resamples=100_000)
    means = values.mean(1)
    half = T_TABLE[29] * means.std(ddof=1) / math.sqrt(30)
    assert found.mean == pytest.approx(means.mean(), rel=1e-12)
    assert (found.subjects, found.seeds, found.trials, found.over) == (30, 3, 90, "subjects")
    assert found.low == pytest.approx(means.mean() - half, abs=0.06 * half)
    assert found.high == pytest.approx(means.mean() + half, abs=0.06 * half)


def check_quantiles(found, every, wanted):
    """The interval's ends are quantiles of all resamples, none left out, up to chance.

    Of 400,000 draws for six subjects, 970 lie beyond an end, give or take 31. Where the outermost
    resample is likelier than the quantile is far out, that resample is the end.
    """
    for end, values in ((found.low, every), (-found.high, -every)):
        assert np.mean(values < end - 1e-9) <= 1.12 * wanted
        assert np.mean(values <= end + 1e-9) >= 0.88 * wanted


def test_over_subjects_it_is_the_enumerated_bootstrap():
    values = np.random.default_rng(8).normal(0.6, 0.1, (6, 2))
    every = np.array([np.mean(drawn) for drawn in itertools.product(values.mean(1), repeat=6)])
    found = estimate(by_place(values), resamples=400_000)
    assert found.over == "subjects"
    check_quantiles(found, every, tail(6, 5))


@pytest.mark.parametrize(("subjects", "seeds"), [(1, 5), (2, 3), (4, 2)])
def test_over_seeds_it_is_the_enumerated_bootstrap_within_each_subject(subjects, seeds):
    values = np.random.default_rng(9).normal(0.6, 0.1, (subjects, seeds))
    means = [[np.mean(drawn) for drawn in itertools.product(row, repeat=seeds)] for row in values]
    every = np.array([np.mean(drawn) for drawn in itertools.product(*means)])
    found = estimate(by_place(values), resamples=400_000)
    assert found.over == "seeds"
    check_quantiles(found, every, tail(seeds, subjects * (seeds - 1)))


@pytest.mark.parametrize(
    ("subjects", "seeds", "between", "within"),
    [(8, 3, 1.0, 0.3), (8, 3, 0.3, 1.0), (8, 1, 1.0, 1.0), (30, 2, 0.5, 0.5)],
)
def test_it_covers_the_truth_in_19_of_20(subjects, seeds, between, within):
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(600):
        values = rng.normal(0, between, (subjects, 1)) + rng.normal(0, within, (subjects, seeds))
        found = estimate(by_place(values), resamples=1500)
        covered += found.low <= 0 <= found.high
    assert 0.92 <= covered / 600 <= 0.975  # of 95%, 600 repeats leave 0.9% to either side


@pytest.mark.parametrize(("subjects", "seeds"), [(1, 6), (3, 4)])
def test_over_seeds_it_covers_the_mean_of_these_subjects(subjects, seeds):
    rng = np.random.default_rng(12)
    covered = 0
    for _ in range(600):
        truth = rng.normal(0, 5, (subjects, 1))
        found = estimate(by_place(truth + rng.normal(0, 1, (subjects, seeds))), resamples=1500)
        covered += found.low <= truth.mean() <= found.high
    assert 0.91 <= covered / 600 <= 0.975


def test_without_a_difference_one_in_twenty_is_called_one():
    rng = np.random.default_rng(13)
    called = 0
    for _ in range(600):
        subject = rng.normal(0, 1, (10, 1))
        ours, theirs = (by_place(subject + rng.normal(0, 0.2, (10, 2))) for _ in range(2))
        called += compare(ours, theirs, True, resamples=1500).verdict != "open"
    assert 0.025 <= called / 600 <= 0.08


def test_pairs_take_out_what_subjects_differ_by():
    rng = np.random.default_rng(5)
    values = by_place(rng.normal(0, 10, (8, 2)))
    ours = {place: value + 0.01 for place, value in values.items()}
    found = compare(ours, values, higher_is_better=True)
    assert found.difference.low == pytest.approx(0.01, abs=1e-9)
    assert found.difference.high == pytest.approx(0.01, abs=1e-9)
    assert (found.wins, found.ties, found.losses, found.verdict) == (16, 0, 0, "better")
    assert compare(ours, values, higher_is_better=False).verdict == "worse"
    assert compare(values, ours, higher_is_better=False).verdict == "better"
    unknown = compare(ours, values, higher_is_better=None)
    assert (unknown.verdict, unknown.wins, unknown.losses) == ("higher", None, None)
    assert unknown.win_rate is None


def test_only_trials_that_both_have_are_compared():
    ours = {("a", 0): 1.0, ("a", 1): 9.0, ("b", 0): 2.0, ("c", 0): 7.0}
    theirs = {("a", 0): 0.5, ("b", 0): 2.0, ("c", 1): 0.0, ("d", 0): 3.0}
    found = compare(ours, theirs, True)
    assert (found.wins, found.ties, found.losses, found.difference.trials) == (1, 1, 0, 2)
    assert found.win_rate == 0.75
    assert found.difference.mean == 0.25
    assert found.verdict == "too few"
    assert compare({("a", 0): 1.0}, {("b", 0): 1.0}, True) is None


def test_subjects_weigh_alike_however_many_seeds_they_have():
    found = estimate({("a", 0): 1.0, ("b", 0): 0.0, ("b", 1): 0.0, ("b", 2): 0.0})
    assert found.mean == 0.5
    assert (found.subjects, found.seeds, found.trials) == (2, 3, 4)


def test_too_few_trials_have_no_interval_and_say_so():
    one = estimate({("a", 0): 1.0})
    assert (one.low, one.high, one.over) == (None, None, None)
    assert "1 subject and 1 trial." in one.caveat
    assert "6 subjects, or two seeds of each subject and 5 trials" in one.caveat
    few = estimate(by_place([[1.0], [2.0], [3.0], [4.0], [5.0]]))
    assert few.low is None
    assert "5 subjects and 5 trials." in few.caveat
    # as many units as needed, but one subject has a single seed: nothing tells how it varies
    assert estimate(by_place([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0]])).low is None


def test_the_caveat_says_what_the_interval_is_over():
    assert "this subject" in estimate(by_place([[1, 2, 3, 4, 5]])).caveat
    assert "these 2 subjects" in estimate(by_place([[1, 2, 3], [4, 5, 6]])).caveat
    assert "one seed" in estimate(by_place([[i] for i in range(MIN_SUBJECTS)])).caveat
    assert estimate(by_place([[i, i + 1] for i in range(MIN_SUBJECTS)])).caveat == ""


def test_the_same_seed_gives_the_same_in_any_order():
    values = by_place(np.random.default_rng(0).normal(size=(7, 2)))
    turned = dict(reversed(values.items()))
    assert estimate(values, seed=4) == estimate(turned, seed=4)
    assert estimate(values, seed=4) != estimate(values, seed=5)


def test_alike_values_have_an_interval_without_width():
    found = estimate(by_place([[0.5, 0.5]] * 6))
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize("values", [{}, {("a", 0): math.nan}, {("a", 0): math.inf}])
def test_what_has_no_mean_is_refused(values):
    with pytest.raises(ValueError, match="finite values"):
        estimate(values)


def test_the_front_by_its_definition():
    rng = np.random.default_rng(1)
    for _ in range(20):
        points = {
            str(i): (float(x), float(y)) for i, (x, y) in enumerate(rng.integers(0, 6, (9, 2)))
        }
        front = pareto_front(points)
        for name, (x, y) in points.items():
            better = [(a, b) for a, b in points.values() if a <= x and b >= y and (a < x or b > y)]
            assert (name in front) == (not better)
        assert [points[name] for name in front] == sorted(points[name] for name in front)
