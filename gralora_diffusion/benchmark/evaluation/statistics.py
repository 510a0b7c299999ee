"""Means with intervals, and comparisons of methods, over subjects and seeds, as pure functions.

Subjects are what a benchmark samples, so the interval is Student's over the subjects' means, which
are means over their seeds and already contain the seeds' effect. It assumes that subjects are
independent, which they are if each has random numbers of its own, and that their means are not far
from normal: with few or skewed subjects it covers the truth less often, and ``Estimate.caveat``
says so.

A run declares a few comparisons before its first trial. Only these get a verdict, by Holm's
procedure over their p-values (S. Holm, A Simple Sequentially Rejective Multiple Test Procedure,
Scand. J. Statist. 6, 1979), which bounds the probability of any false verdict by 5%. All other
differences are exploratory.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gralora_diffusion.io.student_t import t_distribution, t_quantile

#: Minimum number of subjects for an interval over subjects.
MIN_SUBJECTS = 3
#: Below this number of subjects, nothing can show whether they are normal enough.
FEW_SUBJECTS = 10
#: Minimum number of seeds for an interval over the seeds of a single subject.
MIN_SEEDS = 5
#: A skewness beyond this is high (M. G. Bulmer, Principles of Statistics, 1979, chapter 4).
HIGH_SKEWNESS = 1.0
LEVEL = 0.95
#: Up to this number of values, all their signs are enumerated; beyond, they are sampled.
_ENUMERATED = 16
_SAMPLED = 100_000

#: Where a value was measured: (subject, seed).
Place = tuple[str, int]


@dataclass(frozen=True)
class Estimate:
    """A mean of the subjects' means, which are means over seeds, so that subjects weigh alike.

    Attributes:
        low, high: the 95% interval; None if there are too few subjects or seeds for one.
        over: what the interval is over, "subjects" or "seeds"; None if there is none.
        subjects, seeds, trials: how many there are; seeds are counted once each.
        skewed: whether a few subjects (or seeds) lie far to one side of the others.
    """

    mean: float
    low: float | None
    high: float | None
    over: str | None
    subjects: int
    seeds: int
    trials: int
    skewed: bool

    @property
    def caveat(self) -> str:
        """What limits the interval, to follow a colon; empty if there is nothing to say."""
        if self.over is None:
            return (
                f"there is no interval for {_counted(self.subjects, 'subject')} and "
                f"{_counted(self.trials, 'trial')}. An interval needs {MIN_SUBJECTS} subjects, or "
                f"{MIN_SEEDS} seeds of one subject"
            )
        found = []
        if self.over == "seeds":
            found.append("the interval is over seeds alone, so it holds only for this subject")
        elif self.subjects < FEW_SUBJECTS:
            found.append(
                f"there are only {self.subjects} subjects. The interval assumes that their values "
                "are close to normal, which so few cannot show"
            )
        if self.skewed:
            found.append(
                f"the {self.over} are skewed: a few of them differ much more than the others. The "
                "interval may miss the truth more often than its 5%"
            )
        return ". ".join(one[0].upper() + one[1:] if n else one for n, one in enumerate(found))


@dataclass(frozen=True)
class Comparison:
    """A method against a reference, on the trials that both have. It has no verdict.

    Attributes:
        difference: method - reference, trial by trial.
        wins, ties, losses: trials; wins and losses are None if the better direction is unknown.
    """

    difference: Estimate
    wins: int | None
    ties: int
    losses: int | None

    @property
    def win_rate(self) -> float | None:
        """Wins and half the ties, as a share of the trials in both."""
        if self.wins is None:
            return None
        return (self.wins + self.ties / 2) / self.difference.trials


@dataclass(frozen=True)
class Decision:
    """A declared comparison.

    Attributes:
        difference: method - reference.
        by_subject: subject -> its mean difference.
        median: of the subjects' differences.
        p: two-sided, by Student's t over the subjects (or the seeds of one subject).
        sign_flip_p: the same by flipping signs, which only assumes symmetry.
        holm_p: ``p`` corrected for the number of declared comparisons.
        verdict: "better" or "worse" if ``holm_p`` is at most 5%, else "inconclusive"; "too few" if
            there is no interval.
    """

    method: str
    reference: str
    difference: Estimate
    by_subject: dict[str, float]
    median: float
    p: float | None
    sign_flip_p: float | None
    holm_p: float | None
    verdict: str


def estimate(values: Mapping[Place, float]) -> Estimate:
    """Return mean and interval. They depend on the values, but not on their order.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    means = subject_means(values)
    over, sample = _sample(values)
    low = high = None
    skewed = False
    if over is not None:
        half = t_quantile((1 + LEVEL) / 2, len(sample) - 1) * _standard_error(sample)
        low, high = float(sample.mean() - half), float(sample.mean() + half)
        skewed = abs(skewness(sample)) > HIGH_SKEWNESS
    seeds = len({place[1] for place in values})
    mean = float(np.mean(list(means.values())))
    return Estimate(mean, low, high, over, len(means), seeds, len(values), skewed)


def subject_means(values: Mapping[Place, float]) -> dict[str, float]:
    """Return subject -> the mean over its seeds, sorted by name.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    if not values or not all(map(math.isfinite, values.values())):
        raise ValueError(f"a mean needs finite values, but got {dict(values)!r:.80}")
    groups: dict[str, list[float]] = defaultdict(list)
    for (subject, _), value in sorted(values.items()):
        groups[subject].append(value)
    return {subject: float(np.mean(group)) for subject, group in groups.items()}


def differences(
    values: Mapping[Place, float], reference: Mapping[Place, float]
) -> dict[Place, float]:
    """Return value - reference at the places that both have."""
    return {place: values[place] - reference[place] for place in values if place in reference}


def compare(
    values: Mapping[Place, float],
    reference: Mapping[Place, float],
    higher_is_better: bool | None,
) -> Comparison | None:
    """Compare a method with a reference, pair by pair; None if they have no trial in common."""
    pairs = differences(values, reference)
    if not pairs:
        return None
    above = sum(d > 0 for d in pairs.values())
    below = sum(d < 0 for d in pairs.values())
    known = higher_is_better is not None
    wins, losses = (above, below) if higher_is_better else (below, above)
    return Comparison(
        estimate(pairs),
        wins if known else None,
        len(pairs) - above - below,
        losses if known else None,
    )


def decide(
    declared: Mapping[tuple[str, str], Mapping[Place, float]], higher_is_better: bool
) -> list[Decision]:
    """Decide the declared comparisons: (method, reference) -> differences, which are not empty."""
    samples = {pair: _sample(values) for pair, values in declared.items()}
    p = {pair: t_test(sample) for pair, (over, sample) in samples.items() if over is not None}
    corrected = dict(zip(p, holm(list(p.values())), strict=True))
    found = []
    for pair, values in declared.items():
        over, sample = samples[pair]
        means = subject_means(values)
        difference = estimate(values)
        verdict = "too few"
        if over is not None:
            verdict = "inconclusive"
            if corrected[pair] <= 1 - LEVEL:
                better = (difference.mean > 0) is higher_is_better
                verdict = "better" if better else "worse"
        found.append(
            Decision(
                *pair,
                difference,
                means,
                float(np.median(list(means.values()))),
                p.get(pair),
                None if over is None else sign_flip_test(sample),
                corrected.get(pair),
                verdict,
            )
        )
    return found


def t_test(sample: np.ndarray) -> float:
    """Return the two-sided p-value of a mean of zero, by Student's t."""
    error = _standard_error(sample)
    if error == 0:
        return float(sample.mean() == 0)
    freedom = len(sample) - 1
    return 1 - t_distribution(math.atan(abs(sample.mean()) / error / math.sqrt(freedom)), freedom)


def sign_flip_test(sample: np.ndarray) -> float:
    """Return the two-sided p-value of values that are symmetric about zero.

    It is the share of all flips of signs whose mean is at least as far from zero. It is exact for
    up to 16 values, and from 100,000 flips of a fixed generator beyond.
    """
    n = len(sample)
    if n <= _ENUMERATED:
        bits = np.arange(2**n)[:, None] >> np.arange(n) & 1
    else:
        bits = np.random.default_rng(0).integers(0, 2, (_SAMPLED, n))
        bits[0] = 0  # the values themselves, so that p is never zero
    sums = np.abs((1 - 2 * bits) @ sample)
    return float(np.mean(sums >= abs(sample.sum()) * (1 - 1e-12)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's corrected p-values, in the order of the given ones."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def skewness(sample: np.ndarray) -> float:
    """Return the adjusted Fisher-Pearson skewness of at least three values; 0 if all are alike."""
    n, centred = len(sample), sample - sample.mean()
    variance = np.mean(centred**2)
    if variance <= (1e-12 * np.abs(sample).max()) ** 2:
        return 0.0
    biased = np.mean(centred**3) / variance**1.5
    return float(math.sqrt(n * (n - 1)) / (n - 2) * biased)


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names of points that no other beats; lower x and higher y are better.

    A point beats another if it is at least as good in both and better in one.
    """
    front = [
        name
        for name, (x, y) in points.items()
        if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points.values())
    ]
    return sorted(front, key=lambda name: points[name])


def spread(values: Iterable[float]) -> tuple[float, float, float] | None:
    """Return (mean, minimum, maximum), or None without values."""
    found: Sequence[float] = list(values)
    return (float(np.mean(found)), min(found), max(found)) if found else None


def _sample(values: Mapping[Place, float]) -> tuple[str | None, np.ndarray]:
    """Return what an interval is over, and its independent values; (None, ...) if too few."""
    means = subject_means(values)
    if len(means) >= MIN_SUBJECTS:
        return "subjects", np.array(list(means.values()))
    trials = np.array([values[place] for place in sorted(values)], dtype=np.float64)
    if len(means) == 1 and len(trials) >= MIN_SEEDS:
        return "seeds", trials
    return None, trials


def _standard_error(sample: np.ndarray) -> float:
    return float(sample.std(ddof=1) / math.sqrt(len(sample)))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
