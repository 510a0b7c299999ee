"""Statistics against scipy, enumerations, tables, and simulated truth."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from gralora_diffusion.benchmark.evaluation.statistics import (
    FEW_SUBJECTS,
    MIN_SEEDS,
    MIN_SUBJECTS,
    compare,
    decide,
    estimate,
    holm,
    pareto_front,
    sign_flip_test,
    skewness,
    t_test,
)
from gralora_diffusion.io.student_t import t_quantile


def by_place(values):
    """[subjects][seeds] as a mapping."""
    return {
        (f"subject {i}", seed): float(value)
        for i, row in enumerate(values)
        for seed, value in enumerate(row)
    }


@pytest.mark.parametrize(("subjects", "seeds"), [(3, 1), (8, 3), (12, 1), (30, 2), (1, 5)])
def test_the_interval_is_scipys_over_subjects_or_the_seeds_of_one(subjects, seeds):
    values = np.random.default_rng(subjects).normal(0.7, 0.1, (subjects, seeds))
    found = estimate(by_place(values))
    sample = values.mean(1) if subjects > 1 else values[0]
    low, high = stats.t.interval(0.95, len(sample) - 1, sample.mean(), stats.sem(sample))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)
    assert found.over == ("subjects" if subjects > 1 else "seeds")
    assert (found.subjects, found.seeds, found.trials) == (subjects, seeds, subjects * seeds)
    assert t_test(sample) == pytest.approx(stats.ttest_1samp(sample, 0).pvalue, abs=1e-12)
    centred = sample - sample.mean() + 0.01
    assert t_test(centred) == pytest.approx(stats.ttest_1samp(centred, 0).pvalue, rel=1e-9)
    assert skewness(sample) == pytest.approx(stats.skew(sample, bias=False), rel=1e-9)


@pytest.mark.parametrize("n", [3, 8, 12])
def test_sign_flips_are_scipys_permutations(n):
    sample = np.random.default_rng(n).normal(0.4, 1, n)
    expected = stats.permutation_test(
        (sample,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_test(sample) == pytest.approx(expected.pvalue, abs=1e-12)


def test_many_signs_are_sampled():
    sample = np.random.default_rng(1).normal(0.3, 1, 30)
    p = stats.ttest_1samp(sample, 0).pvalue
    assert sign_flip_test(sample) == pytest.approx(p, abs=0.2 * p)
    assert sign_flip_test(sample) == sign_flip_test(sample)
    assert sign_flip_test(np.full(40, 1.0)) == pytest.approx(1e-5)


def test_holm_by_its_definition():
    """Corrected by testing every set of hypotheses with Bonferroni, which is what Holm closes."""
    rng = np.random.default_rng(2)
    for n in (1, 2, 3, 5):
        p = list(rng.uniform(0, 0.3, n))
        closed = [
            max(
                min(1, len(chosen) * min(p[j] for j in chosen))
                for size in range(1, n + 1)
                for chosen in itertools.combinations(range(n), size)
                if i in chosen
            )
            for i in range(n)
        ]
        assert holm(p) == pytest.approx(closed)
    assert holm([]) == []


# -- coverage by simulation, vectorized: a draw is a row -------------------------------------------

DRAWS = 4000
#: What subjects differ by, of mean zero: what chance leaves at 4,000 draws is 0.7% to either side.
SHAPES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "heavy-tailed": lambda rng, shape: rng.standard_t(3, size=shape),
    "skewed": lambda rng, shape: rng.exponential(size=shape) - 1,
    "one in five": lambda rng, shape: (rng.uniform(size=shape) < 0.2) - 0.2,
}


def coverage(subject_means):
    """The share of rows (draws, subjects) whose interval has zero.

    The interval is the package's: its quantile, mean and standard error.
    """
    n = subject_means.shape[1]
    half = t_quantile(0.975, n - 1) * subject_means.std(1, ddof=1) / math.sqrt(n)
    covered = np.abs(subject_means.mean(1)) <= half
    for row in range(5):  # these are the package's intervals
        found = estimate(by_place(subject_means[row][:, None]))
        assert (found.low <= 0 <= found.high) == covered[row]
    return covered.mean()


@pytest.mark.parametrize(("subjects", "seeds"), [(8, 3), (12, 1), (30, 3), (3, 1)])
@pytest.mark.parametrize("shape", ["normal", "heavy-tailed"])
def test_it_covers_the_truth_in_19_of_20(shape, subjects, seeds):
    """With effects of subject and trial, and random numbers of each subject's own."""
    rng = np.random.default_rng(11)
    between = SHAPES[shape](rng, (DRAWS, subjects))
    within = SHAPES[shape](rng, (DRAWS, subjects, seeds))
    least, most = (0.93, 0.97) if shape == "normal" else (0.93, 0.985)  # t is wide for heavy tails
    assert least <= coverage(between + within.mean(2)) <= most


def test_a_seed_that_subjects_share_is_not_averaged_out_and_one_of_their_own_is():
    """Why a trial's random numbers depend on its subject, too."""
    rng = np.random.default_rng(12)
    subject = rng.normal(0, 1, (DRAWS, 30, 1))
    trial = rng.normal(0, 0.5, (DRAWS, 30, 3))
    shared = rng.normal(0, 0.5, (DRAWS, 1, 3))
    own = rng.normal(0, 0.5, (DRAWS, 30, 3))
    assert coverage((subject + trial + shared).mean(2)) < 0.85
    assert 0.93 <= coverage((subject + trial + own).mean(2)) <= 0.97


@pytest.mark.parametrize("subjects", [8, 12, 30])
def test_skewed_subjects_are_covered_less_often_and_mostly_warned_of(subjects):
    """The rest of the misses are those whose few large subjects are not among the sampled ones."""
    rng = np.random.default_rng(13)
    for shape in ("skewed", "one in five"):
        values = SHAPES[shape](rng, (DRAWS, subjects))
        assert coverage(values) > (0.80 if subjects < 30 else 0.90)
        warned = np.mean(np.abs(stats.skew(values, axis=1, bias=False)) > 1)
        assert warned > 0.5
        flagged = [estimate(by_place(row[:, None])).skewed for row in values[:50]]
        assert np.mean(flagged) == pytest.approx(warned, abs=0.2)
    normal = SHAPES["normal"](rng, (DRAWS, subjects))
    assert np.mean(np.abs(stats.skew(normal, axis=1, bias=False)) > 1) < 0.21


@pytest.mark.parametrize("comparisons", [1, 3])
def test_a_false_verdict_in_at_most_one_report_of_twenty(comparisons):
    """Under no difference, with one method in all comparisons, which makes them depend."""
    rng = np.random.default_rng(14)
    pairs = rng.normal(size=(DRAWS, 1, 12)) - rng.normal(size=(DRAWS, comparisons, 12))
    p = stats.ttest_1samp(pairs, 0, axis=2).pvalue
    false = np.array([min(holm(list(row))) <= 0.05 for row in p])
    assert 0.02 <= false.mean() <= 0.058
    for draw in (*np.flatnonzero(false)[:3], *np.flatnonzero(~false)[:3]):
        report = {("a", f"b{i}"): by_place(row[:, None]) for i, row in enumerate(pairs[draw])}
        verdicts = {decision.verdict for decision in decide(report, True)}
        assert bool(verdicts & {"better", "worse"}) == false[draw]


# -- decisions -------------------------------------------------------------------------------------


def test_a_decision_has_what_its_differences_have():
    rng = np.random.default_rng(15)
    clear = by_place(rng.normal(1, 0.2, (8, 2)))
    none = by_place(rng.normal(0, 1, (8, 2)))
    few = by_place([[1.0, 2.0]])
    found = decide({("a", "b"): clear, ("a", "c"): none, ("d", "e"): few}, higher_is_better=True)
    assert [(d.method, d.reference) for d in found] == [("a", "b"), ("a", "c"), ("d", "e")]
    assert [d.verdict for d in found] == ["better", "inconclusive", "too few"]
    assert [d.p is None for d in found] == [False, False, True]
    means = np.array(list(clear.values())).reshape(8, 2).mean(1)
    first = found[0]
    assert first.by_subject == pytest.approx({f"subject {i}": m for i, m in enumerate(means)})
    assert first.median == pytest.approx(np.median(means))
    assert first.p == pytest.approx(stats.ttest_1samp(means, 0).pvalue, rel=1e-6)
    assert first.sign_flip_p == 2 / 2**8
    assert first.holm_p == pytest.approx(2 * first.p)  # the third has no p-value
    assert first.difference == estimate(clear)
    assert decide({("a", "b"): clear}, higher_is_better=False)[0].verdict == "worse"


def test_holm_takes_back_what_one_interval_alone_would_say():
    sample = np.array([-0.2, 0.5, 0.1, 0.9, 0.3, 0.4, -0.1, 0.6])
    values = by_place(sample[:, None])
    assert 0.01 < t_test(sample) < 0.05 < 3 * t_test(sample)
    assert decide({("a", "b"): values}, True)[0].verdict == "better"
    three = decide({("a", str(i)): values for i in range(3)}, True)
    assert {d.verdict for d in three} == {"inconclusive"}


def test_values_that_are_all_alike():
    found = estimate(by_place([[0.5, 0.5]] * 6))
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert not found.skewed
    assert t_test(np.full(4, 0.5)) == 0
    assert t_test(np.zeros(4)) == 1
    assert sign_flip_test(np.zeros(4)) == 1


def test_pairs_take_out_what_subjects_differ_by():
    rng = np.random.default_rng(5)
    values = by_place(rng.normal(0, 10, (8, 2)))
    ours = {place: value + 0.01 for place, value in values.items()}
    found = compare(ours, values, higher_is_better=True)
    assert found.difference.low == pytest.approx(0.01, abs=1e-9)
    assert found.difference.high == pytest.approx(0.01, abs=1e-9)
    assert (found.wins, found.ties, found.losses) == (16, 0, 0)
    assert compare(ours, values, higher_is_better=False).losses == 16
    unknown = compare(ours, values, higher_is_better=None)
    assert (unknown.wins, unknown.losses, unknown.win_rate) == (None, None, None)


def test_only_trials_that_both_have_are_compared():
    ours = {("a", 0): 1.0, ("a", 1): 9.0, ("b", 0): 2.0, ("c", 0): 7.0}
    theirs = {("a", 0): 0.5, ("b", 0): 2.0, ("c", 1): 0.0, ("d", 0): 3.0}
    found = compare(ours, theirs, True)
    assert (found.wins, found.ties, found.losses, found.difference.trials) == (1, 1, 0, 2)
    assert found.win_rate == 0.75
    assert found.difference.mean == 0.25
    assert found.difference.over is None
    assert compare({("a", 0): 1.0}, {("b", 0): 1.0}, True) is None


def test_subjects_weigh_alike_however_many_seeds_they_have():
    found = estimate({("a", 0): 1.0, ("b", 0): 0.0, ("b", 1): 0.0, ("b", 2): 0.0})
    assert found.mean == 0.5
    assert (found.subjects, found.seeds, found.trials) == (2, 3, 4)


def test_too_few_trials_have_no_interval_and_say_so():
    one = estimate({("a", 0): 1.0})
    assert (one.low, one.high, one.over) == (None, None, None)
    assert "1 subject and 1 trial." in one.caveat
    assert "3 subjects, or 5 seeds of one subject" in one.caveat
    # two subjects have none, however many seeds: within them, nothing shows how subjects differ
    assert estimate(by_place([range(9), range(9)])).low is None
    assert estimate(by_place([range(MIN_SEEDS - 1)])).low is None


def test_the_caveat_says_what_limits_the_interval():
    seeds = estimate(by_place([range(MIN_SEEDS)])).caveat
    assert seeds == "the interval is over seeds alone, so it holds only for this subject"
    few = estimate(by_place([[i] for i in range(MIN_SUBJECTS)])).caveat
    assert few.startswith("there are only 3 subjects. The interval assumes")
    assert estimate(by_place([[i] for i in range(FEW_SUBJECTS)])).caveat == ""
    skewed = estimate(by_place([[9 * (i == 4) + 0.1 * i] for i in range(FEW_SUBJECTS)])).caveat
    assert skewed.startswith("the subjects are skewed: a few of them")
    both = estimate(by_place([[9 * (i == 4)] for i in range(5)])).caveat
    assert "cannot show. The subjects are skewed" in both


def test_the_order_of_the_values_does_not_count():
    values = by_place(np.random.default_rng(0).normal(size=(7, 2)))
    assert estimate(values) == estimate(dict(reversed(values.items())))


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
