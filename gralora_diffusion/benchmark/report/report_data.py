"""The content of a report as values: computed once, then written as page, Markdown and JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gralora_diffusion.adapters.placement.layer_config import is_finite_number
from gralora_diffusion.benchmark.evaluation.choices import BlindChoices
from gralora_diffusion.benchmark.evaluation.curves import Point, gaps
from gralora_diffusion.benchmark.evaluation.endpoint import (
    UPDATE_NORM,
    Declared,
    rate_of,
    without_rate,
)
from gralora_diffusion.benchmark.evaluation.results import TrialKey, TrialResult, Unreadable
from gralora_diffusion.benchmark.evaluation.scores import Score, score_named, score_order
from gralora_diffusion.benchmark.evaluation.statistics import (
    Comparison,
    Decision,
    Estimate,
    Place,
    compare,
    decide,
    differences,
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
    update_norm: float | None


@dataclass(frozen=True)
class CurveData:
    """A score along a cost.

    Attributes:
        points: curve -> method -> (cost, score), means over the subjects and seeds that all rates
            of the curve have, in the order of the rates. A method without rates is one point.
        gaps: reference -> curve -> the mean gap at equal cost; empty if there are no rates.
    """

    score: str
    cost: str
    points: dict[str, dict[str, Point]]
    gaps: dict[str, dict[str, Estimate]]


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
    """The content of one protocol. ``methods`` are in the order in which they are shown.

    ``undecided`` are declared comparisons without a single pair of trials or curves.
    """

    name: str
    subjects: list[str]
    seeds: list[int]
    methods: dict[str, MethodData]
    scores: dict[str, ScoreData]
    decisions: list[Decision]
    undecided: list[tuple[str, str]]
    curves: list[CurveData]
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
    declared: Declared | None = None
    blind: Sequence[BlindChoices] = ()


def report_data_of(
    results: Sequence[TrialResult],
    *,
    title: str,
    references: Sequence[str] | None,
    expected: Sequence[TrialKey],
    unreadable: Sequence[Unreadable],
    settings: Mapping[str, Any],
    declared: Declared | None,
    blind: Sequence[BlindChoices] = (),
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
        references = _references(order, declared)
    elif unknown := [name for name in references if name not in order]:
        raise ValueError(
            f"references: no trial is of {', '.join(unknown)}. Methods: {', '.join(order)}"
        )
    ordered = sorted(results, key=lambda r: (r.protocol, r.subject, order[r.method], r.seed))
    protocols = dict.fromkeys([*(key.protocol for key in expected), *(r.protocol for r in ordered)])

    def one(name: str) -> ProtocolData:
        found = [result for result in ordered if result.protocol == name]
        return _protocol(name, found, order, references, declared)

    return ReportData(
        title=title,
        protocols=[one(name) for name in protocols],
        references=list(references),
        trials=ordered,
        missing=[key for key in dict.fromkeys(expected) if key not in trials],
        unreadable=list(unreadable),
        provenance=provenance_of(ordered),
        settings=settings,
        declared=declared,
        blind=blind,
    )


def _references(order: Mapping[str, int], declared: Declared | None) -> list[str]:
    """Return the declared references, or every LoRA; none if methods are curves.

    Trials of curves differ in their rates, so their differences trial by trial say little.
    """
    if declared and declared.endpoint.along is None:
        return [name for name in order if name in {pair[1] for pair in declared.comparisons}]
    if len({without_rate(name) for name in order}) < len(order) and declared:
        return []
    return [name for name in order if name.startswith("lora-")]


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
    declared: Declared | None,
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
            means={m: estimate(v) for m, v in values.items()},
            comparisons={
                reference: {
                    method: comparison
                    for method, v in values.items()
                    if method not in references[: place + 1]  # each pair of references once
                    and (comparison := compare(v, values[reference], better))
                }
                for place, reference in enumerate(references)
                if reference in values
            },
        )
    methods = {method: _method(found) for method, found in by_method.items()}
    decided = _decided(by_method, declared)
    pairs = {pair: values for pair, values in decided.items() if values}
    better = declared is None or score_named(declared.endpoint.score).higher_is_better is not False
    return ProtocolData(
        name=name,
        subjects=sorted({r.subject for r in results}),
        seeds=sorted({r.seed for r in results}),
        methods=methods,
        scores=scores,
        decisions=decide(pairs, better),
        undecided=[pair for pair in decided if pair not in pairs],
        curves=_curves(by_method, scores, declared),
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
        update_norm=_mean([r.update_norm for r in results]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _decided(
    by_method: Mapping[str, Sequence[TrialResult]], declared: Declared | None
) -> dict[tuple[str, str], dict[Place, float]]:
    """Return the differences of each declared comparison, which may be none."""
    if declared is None:
        return {}
    score, along = declared.endpoint.score, declared.endpoint.along
    found = {}
    for method, reference in declared.comparisons:
        if along is not None:
            both = (_curve(by_method, name, score, along) for name in (method, reference))
            found[method, reference] = gaps(*both)
        else:
            values = (_values(by_method.get(name, ()), score) for name in (method, reference))
            found[method, reference] = differences(*values)
    return found


def _values(results: Sequence[TrialResult], name: str) -> dict[Place, float]:
    """Return the values of a score or of the update's norm, where they are known."""
    found = {
        (r.subject, r.seed): r.update_norm if name == UPDATE_NORM else r.scores.get(name)
        for r in results
    }
    return {place: value for place, value in found.items() if value is not None}


def _by_rate(by_method: Mapping[str, Sequence[TrialResult]], name: str) -> list[str]:
    """Return the methods of a curve in the order of their rates, which may be the run's."""

    def rate(method: str) -> float:
        training = by_method[method][0].settings.get("training")
        value = training.get("learning_rate") if isinstance(training, Mapping) else None
        return rate_of(method) or (float(str(value)) if is_finite_number(value) else 0.0)

    return sorted((m for m in by_method if without_rate(m) == name), key=rate)


def _curve(
    by_method: Mapping[str, Sequence[TrialResult]], name: str, score: str, cost: str
) -> dict[Place, list[Point]]:
    """Return the curve of each subject and seed, in the order of the rates."""
    curves: dict[Place, list[Point]] = {}
    for method in _by_rate(by_method, name):
        values, costs = (_values(by_method[method], n) for n in (score, cost))
        for place in values.keys() & costs.keys():
            curves.setdefault(place, []).append((costs[place], values[place]))
    return curves


def _curves(
    by_method: Mapping[str, Sequence[TrialResult]],
    scores: Mapping[str, ScoreData],
    declared: Declared | None,
) -> list[CurveData]:
    """The deciding score, or the first similarity, along its cost and along the update's norm."""
    similar = next((n for n, s in scores.items() if s.score.kind == "similarity"), None)
    score = declared.endpoint.score if declared else similar
    if score is None or score not in scores:
        return []
    drifts = [name for name, s in scores.items() if s.score.kind == "drift" and name != score]
    wanted = (declared.endpoint.along if declared else None, f"drift_{score}", *drifts)
    costs = [cost for cost in wanted if cost in drifts][:1]
    if any(r.update_norm for results in by_method.values() for r in results):
        costs.append(UPDATE_NORM)
    names = list(dict.fromkeys(map(without_rate, by_method)))
    references = [name for name in names if name.startswith("lora-")]
    found = []
    for cost in costs:
        points = {name: _mean_points(by_method, name, score, cost) for name in names}
        curves = {name: _curve(by_method, name, score, cost) for name in names}
        between: dict[str, dict[str, Estimate]] = {}
        for place, reference in enumerate(references):
            for name in names:
                if name not in references[: place + 1]:
                    gap = gaps(curves[name], curves[reference])
                    if gap:
                        between.setdefault(reference, {})[name] = estimate(gap)
        points = {name: of for name, of in points.items() if of}
        if points:
            found.append(CurveData(score, cost, points, between))
    return found


def _mean_points(
    by_method: Mapping[str, Sequence[TrialResult]], name: str, score: str, cost: str
) -> dict[str, Point]:
    methods = _by_rate(by_method, name)
    values = {m: _values(by_method[m], score) for m in methods}
    costs = {m: _values(by_method[m], cost) for m in methods}
    common = set.intersection(*(set(values[m]) & set(costs[m]) for m in methods))
    if not common:
        return {}
    return {
        m: tuple(estimate({p: of[m][p] for p in common}).mean for of in (costs, values))  # type: ignore[misc]
        for m in methods
    }


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
