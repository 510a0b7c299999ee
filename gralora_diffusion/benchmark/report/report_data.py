"""The content of a report as values: computed once, then written as page, Markdown and JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gralora_diffusion.benchmark.evaluation.results import TrialKey, TrialResult, Unreadable
from gralora_diffusion.benchmark.evaluation.scores import Score, score_named, score_order
from gralora_diffusion.benchmark.evaluation.statistics import (
    Comparison,
    Estimate,
    Place,
    compare,
    estimate,
    pareto_front,
    spread,
)

from .diagnostics import DiagnosticsData, diagnostics_of
from .provenance import Provenance, provenance_of

#: (mean, least, greatest)
Spread = tuple[float, float, float]


@dataclass(frozen=True)
class MethodData:
    """The cost of a method over its trials of a protocol; parameters are those of the largest.

    ``layers`` and ``lowered_k`` are those of ``TrialResult``.
    """

    trials: int
    parameters: int
    layers: int | None
    lowered_k: Mapping[int, int]
    update_rank: int | None
    steps: int
    train_seconds: Spread
    generation_seconds: Spread
    peak_memory_gib: Spread | None


@dataclass(frozen=True)
class ScoreData:
    """One score: means by method, and comparisons by reference and method."""

    score: Score
    means: dict[str, Estimate]
    comparisons: dict[str, dict[str, Comparison]]


@dataclass(frozen=True)
class ParetoData:
    """Similarity against a cost. points: method -> (cost, similarity)."""

    x: str
    y: str
    points: dict[str, tuple[float, float]]
    front: list[str]


@dataclass(frozen=True)
class ProtocolData:
    """The content of one protocol. ``methods`` are in the order in which they are shown."""

    name: str
    subjects: list[str]
    seeds: list[int]
    methods: dict[str, MethodData]
    scores: dict[str, ScoreData]
    pareto: list[ParetoData]
    diagnostics: dict[str, DiagnosticsData]


@dataclass(frozen=True)
class ReportData:
    """A whole report, except for the images."""

    title: str
    protocols: list[ProtocolData]
    references: list[str]
    trials: list[TrialResult]
    missing: list[TrialKey]
    unreadable: list[Unreadable]
    provenance: Provenance
    settings: Mapping[str, Any] = field(default_factory=dict)
    resamples: int = 0
    bootstrap_seed: int = 0

    @property
    def comparisons(self) -> int:
        """How many differences have an interval. By chance, some of them exclude zero."""
        return sum(
            comparison.difference.over is not None
            for protocol in self.protocols
            for score in protocol.scores.values()
            for comparisons in score.comparisons.values()
            for comparison in comparisons.values()
        )


def report_data_of(
    results: Sequence[TrialResult],
    *,
    title: str,
    references: Sequence[str] | None,
    expected: Sequence[TrialKey],
    unreadable: Sequence[Unreadable],
    settings: Mapping[str, Any],
    resamples: int,
    bootstrap_seed: int,
) -> ReportData:
    """Compute what the report says; see ``write_report`` for the arguments.

    Raises:
        ValueError: two results of the same trial, or a reference without trials.
    """
    trials = {result.key: result for result in results}
    if len(trials) < len(results):
        counts = Counter(str(result.key) for result in results)
        twice = [name for name, count in counts.items() if count > 1]
        raise ValueError(f"results: more than one of {'; '.join(twice[:3])}. Give each trial once")
    order = _method_order(trials, expected)
    if references is None:
        references = [name for name in order if name.startswith("lora")]
    elif unknown := [name for name in references if name not in order]:
        raise ValueError(
            f"references: no trial is of {', '.join(unknown)}. Methods: {', '.join(order)}"
        )
    ordered = sorted(results, key=lambda r: (r.protocol, r.subject, order[r.method], r.seed))
    protocols = dict.fromkeys([*(key.protocol for key in expected), *(r.protocol for r in ordered)])

    def one(name: str) -> ProtocolData:
        found = [result for result in ordered if result.protocol == name]
        return _protocol(name, found, order, references, resamples, bootstrap_seed)

    return ReportData(
        title=title,
        protocols=[one(name) for name in protocols],
        references=list(references),
        trials=ordered,
        missing=[key for key in dict.fromkeys(expected) if key not in trials],
        unreadable=list(unreadable),
        provenance=provenance_of(ordered),
        settings=settings,
        resamples=resamples,
        bootstrap_seed=bootstrap_seed,
    )


def _method_order(
    trials: Mapping[TrialKey, TrialResult], expected: Sequence[TrialKey]
) -> dict[str, int]:
    """Methods in the order of the settings; others follow by name."""
    names = [key.method for key in expected] + sorted(key.method for key in trials)
    return {name: place for place, name in enumerate(dict.fromkeys(names))}


def _protocol(
    name: str,
    results: Sequence[TrialResult],
    order: Mapping[str, int],
    references: Sequence[str],
    resamples: int,
    seed: int,
) -> ProtocolData:
    by_method = {m: [r for r in results if r.method == m] for m in order}
    by_method = {method: found for method, found in by_method.items() if found}
    names = sorted({score for result in results for score in result.scores}, key=score_order)
    scores = {}
    for score in names:
        values: dict[str, dict[Place, float]] = {
            method: {(r.subject, r.seed): r.scores[score] for r in found if score in r.scores}
            for method, found in by_method.items()
        }
        values = {method: found for method, found in values.items() if found}
        better = score_named(score).higher_is_better
        scores[score] = ScoreData(
            score=score_named(score),
            means={m: estimate(v, resamples, seed) for m, v in values.items()},
            comparisons={
                reference: {
                    method: comparison
                    for method, v in values.items()
                    if method not in references[: place + 1]  # each pair of references once
                    and (comparison := compare(v, values[reference], better, resamples, seed))
                }
                for place, reference in enumerate(references)
                if reference in values
            },
        )
    methods = {method: _method(found) for method, found in by_method.items()}
    return ProtocolData(
        name=name,
        subjects=sorted({r.subject for r in results}),
        seeds=sorted({r.seed for r in results}),
        methods=methods,
        scores=scores,
        pareto=_pareto(scores, methods),
        diagnostics={m: c for m, found in by_method.items() if (c := diagnostics_of(found))},
    )


def _method(results: Sequence[TrialResult]) -> MethodData:
    train = spread(r.train_seconds for r in results)
    draw = spread(r.generation_seconds for r in results)
    if train is None or draw is None:
        raise ValueError("a method without a trial")
    ranks = [r.update_rank for r in results]
    largest = max(results, key=lambda r: (r.parameters, r.layers or 0))
    return MethodData(
        trials=len(results),
        parameters=largest.parameters,
        layers=largest.layers,
        lowered_k=largest.lowered_k,
        update_rank=None if None in ranks else max(rank for rank in ranks if rank is not None),
        steps=max(r.steps for r in results),
        train_seconds=train,
        generation_seconds=draw,
        peak_memory_gib=spread(r.peak_memory_gib for r in results if r.peak_memory_gib is not None),
    )


def _pareto(scores: Mapping[str, ScoreData], methods: Mapping[str, MethodData]) -> list[ParetoData]:
    """The first similarity against every drift, and against parameters."""
    similar = next((s for s in scores.values() if s.score.kind == "similarity"), None)
    if similar is None:
        return []
    costs = {
        score.score.name: {method: mean.mean for method, mean in score.means.items()}
        for score in scores.values()
        if score.score.kind == "drift"
    }
    costs["parameters"] = {method: float(m.parameters) for method, m in methods.items()}
    plots = []
    for cost, values in costs.items():
        points = {m: (values[m], e.mean) for m, e in similar.means.items() if m in values}
        if points:
            plots.append(ParetoData(cost, similar.score.name, points, pareto_front(points)))
    return plots
