"""What people chose between pairs of images without names: shares with intervals, pure functions.

The interval of a share of choices is Wilson's (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927) at an
effective number of choices, because choices on one subject resemble each other: it is the number
of independent choices that would vary as the subjects' shares do, and at most the number of choices
(E. L. Korn and B. I. Graubard, Survey Methodology 24, 1998, whose interval is Clopper and
Pearson's). The quantile is Student's for as many subjects.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gralora_diffusion.io.student_t import t_quantile

from .endpoint import without_rate
from .statistics import LEVEL


@dataclass(frozen=True)
class BlindChoices:
    """What people chose in one comparison.

    Attributes:
        choices, ties: numbers; a tie counts half for each.
        people, subjects: how many chose, and on how many subjects.
        share: of the choices that prefer ``method``.
        low, high: its 95% interval; None with a single subject.
        effective: the number of independent choices that the interval is based on.
        drift_gap: the mean absolute difference of the two drifts; None if unknown.
    """

    method: str
    reference: str
    choices: int
    ties: int
    people: int
    subjects: int
    share: float
    low: float | None
    high: float | None
    effective: float | None
    drift_gap: float | None


def analyse(
    pairs: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[int, str]]
) -> list[BlindChoices]:
    """Return the choices by comparison, in the order of the names.

    Args:
        pairs: those of a key.
        answers: of each person: the number of a pair -> "left", "right" or "none".
    """
    wins: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    people: dict[tuple[str, str], set[int]] = defaultdict(set)
    gaps: dict[tuple[str, str], list[float]] = defaultdict(list)
    for person, given in enumerate(answers):
        for number, choice in given.items():
            pair = pairs[number]
            method, reference = pair["comparison"]
            left_is_method = pair["left"] == method or without_rate(pair["left"]) == method
            won = 0.5 if choice == "none" else float((choice == "left") is left_is_method)
            wins[method, reference][pair["subject"]].append(won)
            people[method, reference].add(person)
            if drifts := pair.get("drifts"):
                gaps[method, reference].append(abs(drifts[0] - drifts[1]))
    found = []
    for (method, reference), by_subject in sorted(wins.items()):
        every = [value for values in by_subject.values() for value in values]
        effective, low, high = cluster_interval(list(by_subject.values()))
        gap = gaps.get((method, reference))
        found.append(
            BlindChoices(
                method,
                reference,
                choices=len(every),
                ties=every.count(0.5),
                people=len(people[method, reference]),
                subjects=len(by_subject),
                share=math.fsum(every) / len(every),
                low=low,
                high=high,
                effective=effective,
                drift_gap=None if not gap else math.fsum(gap) / len(gap),
            )
        )
    return found


def cluster_interval(
    clusters: Sequence[Sequence[float]],
) -> tuple[float | None, float | None, float | None]:
    """Return (effective number, low, high) of the 95% interval of a share of clustered choices.

    It needs two clusters. If all choices are alike, clusters count as one choice each.

    Args:
        clusters: values from 0 to 1; none is empty.
    """
    count = len(clusters)
    if count < 2:
        return None, None, None
    sizes = np.array([len(cluster) for cluster in clusters], dtype=float)
    sums = np.array([math.fsum(cluster) for cluster in clusters])
    n = sizes.sum()
    share = sums.sum() / n
    variance = count / (count - 1) * np.square(sums - share * sizes).sum() / n**2
    spread = share * (1 - share)
    if spread == 0:
        effective = float(count)
    else:
        effective = float(n if variance == 0 else min(n, spread / variance))
    t = t_quantile((1 + LEVEL) / 2, count - 1)
    middle = (share + t**2 / (2 * effective)) / (1 + t**2 / effective)
    half = t * math.sqrt(spread / effective + t**2 / (4 * effective**2)) / (1 + t**2 / effective)
    return effective, float(max(0.0, middle - half)), float(min(1.0, middle + half))
