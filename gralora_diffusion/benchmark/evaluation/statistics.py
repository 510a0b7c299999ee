"""Means with intervals, and comparisons of methods, over subjects and seeds, as pure functions.

The interval is a cluster bootstrap: subjects are drawn with replacement, each with all of its
seeds (A. C. Davison and D. V. Hinkley, Bootstrap Methods and Their Application, 1997, section 3.8,
"strategy 1"; C. A. Field and A. H. Welsh, Bootstrapping clustered data, J. R. Statist. Soc. B 69,
2007). The subjects' means already contain the effect of seeds, and resampling seeds within subjects
would count it twice. The interval does not end at the 2.5% and 97.5% quantiles of the bootstrap
means but farther out, to make up for a small number of subjects ("expanded percentile interval": T.
Hesterberg, What Teachers Should Know about the Bootstrap, arXiv 1411.5279, section 4.2).

With fewer than ``MIN_SUBJECTS`` subjects, a bootstrap does not show how subjects vary. If there are
enough seeds, the interval is then over seeds alone, resampled within each subject, and holds for
these subjects only. Otherwise there is no interval.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

#: Minimum number of subjects for an interval over subjects.
MIN_SUBJECTS = 6
#: An interval over seeds needs so many degrees of freedom: trials less subjects.
MIN_FREEDOM = 4
LEVEL = 0.95
RESAMPLES = 10_000

#: Where a value was measured: (subject, seed).
Place = tuple[str, int]


@dataclass(frozen=True)
class Estimate:
    """A mean of the subjects' means, which are means over seeds, so that subjects weigh alike.

    Attributes:
        low, high: the 95% interval; None if there are too few trials for one.
        over: what the interval is over, "subjects" or "seeds"; None if there is none.
        subjects, seeds, trials: how many there are; seeds are counted once each.
    """

    mean: float
    low: float | None
    high: float | None
    over: str | None
    subjects: int
    seeds: int
    trials: int

    @property
    def caveat(self) -> str:
        """What the interval does not cover, to follow a colon; empty if there is nothing to say."""
        if self.over is None:
            return (
                f"there is no interval for {_counted(self.subjects, 'subject')} and "
                f"{_counted(self.trials, 'trial')}. An interval needs {MIN_SUBJECTS} subjects, or "
                f"two seeds of each subject and {self.subjects + MIN_FREEDOM} trials"
            )
        if self.over == "seeds":
            return (
                f"the interval is over seeds alone, so it holds only for {_these(self.subjects)}. "
                f"An interval over subjects needs {MIN_SUBJECTS} of them"
            )
        if self.seeds == 1:
            return "there is only one seed. Its effect on all subjects is not in the interval"
        return ""


@dataclass(frozen=True)
class Comparison:
    """A method against a reference, on the trials that both have.

    Attributes:
        difference: method - reference, trial by trial.
        wins, ties, losses: trials; wins and losses are None if the better direction is unknown.
        verdict: "better", "worse" ("higher", "lower" if it is not known which way is better),
            "open" (the interval includes zero) or "too few" (there is no interval).
    """

    difference: Estimate
    wins: int | None
    ties: int
    losses: int | None
    verdict: str

    @property
    def win_rate(self) -> float | None:
        """Wins and half the ties, as a share of the trials in both."""
        if self.wins is None:
            return None
        return (self.wins + self.ties / 2) / self.difference.trials


def estimate(values: Mapping[Place, float], resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Return mean and interval. They depend on the values and the seed, but not on the order.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    if not values or not all(map(math.isfinite, values.values())):
        raise ValueError(f"a mean needs finite values, but got {dict(values)!r:.80}")
    groups: dict[str, list[float]] = defaultdict(list)
    for (subject, _), value in sorted(values.items()):
        groups[subject].append(value)
    samples = [np.array(group, dtype=np.float64) for group in groups.values()]
    means = np.array([sample.mean() for sample in samples])
    count, trials = len(samples), len(values)
    rng = np.random.default_rng(seed)
    low = high = over = None
    if count >= MIN_SUBJECTS:
        over = "subjects"
        low, high = _expanded(_resampled(means, resamples, rng), count, count - 1)
    elif trials - count >= MIN_FREEDOM and min(map(len, samples)) >= 2:
        over = "seeds"
        drawn = np.mean([_resampled(sample, resamples, rng) for sample in samples], axis=0)
        low, high = _expanded(drawn, trials / count, trials - count)
    seeds = len({place[1] for place in values})
    return Estimate(float(means.mean()), low, high, over, count, seeds, trials)


def compare(
    values: Mapping[Place, float],
    reference: Mapping[Place, float],
    higher_is_better: bool | None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison | None:
    """Compare a method with a reference, pair by pair; None if they have no trial in common."""
    both = sorted(values.keys() & reference.keys())
    if not both:
        return None
    differences = {place: values[place] - reference[place] for place in both}
    difference = estimate(differences, resamples, seed)
    above = sum(d > 0 for d in differences.values())
    below = sum(d < 0 for d in differences.values())
    known = higher_is_better is not None
    wins, losses = (above, below) if higher_is_better else (below, above)
    return Comparison(
        difference,
        wins if known else None,
        len(both) - above - below,
        losses if known else None,
        _verdict(difference, higher_is_better),
    )


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names of points that no other beats; lower x and higher y are better.

    They are sorted by x. Equal points are all included.
    """

    def beaten(name: str) -> bool:
        x, y = points[name]
        return any(a <= x and b >= y and (a, b) != (x, y) for a, b in points.values())

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])


def t_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution, by bisection.

    The distribution function for whole degrees of freedom is given by 26.7.3 and 26.7.4 of M.
    Abramowitz and I. A. Stegun, Handbook of Mathematical Functions.
    """
    low, high = 0.0, math.pi / 2  # of the angle atan(t / sqrt(freedom))
    for _ in range(60):
        angle = (low + high) / 2
        if _t_distribution(angle, freedom) < abs(2 * probability - 1):
            low = angle
        else:
            high = angle
    return math.copysign(math.tan(low) * math.sqrt(freedom), probability - 0.5)


def _t_distribution(angle: float, freedom: int) -> float:
    """Return the probability that \\|t\\| is below sqrt(freedom) tan(angle)."""
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for j in range(3 if odd else 2, freedom + 1, 2):
        total += term
        term *= cosine**2 * (j - 1) / j
    series = math.sin(angle) * total
    return 2 / math.pi * (angle + series) if odd else series


def _resampled(sample: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return the means of bootstrap samples, (resamples,)."""
    n = len(sample)
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples) @ sample / n


def _expanded(means: np.ndarray, n: float, freedom: int) -> tuple[float, float]:
    """Return quantiles that equal Student's interval for normal values."""
    reach = t_quantile((1 + LEVEL) / 2, freedom) * math.sqrt(n / (n - 1))
    tail = NormalDist().cdf(-reach)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _verdict(difference: Estimate, higher_is_better: bool | None) -> str:
    if difference.low is None or difference.high is None:
        return "too few"
    if difference.low <= 0 <= difference.high:
        return "open"
    higher = difference.low > 0
    if higher_is_better is None:
        return "higher" if higher else "lower"
    return "better" if higher is higher_is_better else "worse"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _these(subjects: int) -> str:
    return "this subject" if subjects == 1 else f"these {subjects} subjects"


def spread(values: Iterable[float]) -> tuple[float, float, float] | None:
    """Return (mean, minimum, maximum), or None without values."""
    found: Sequence[float] = list(values)
    return (float(np.mean(found)), min(found), max(found)) if found else None
