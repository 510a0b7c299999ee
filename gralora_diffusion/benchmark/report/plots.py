"""The plots of a report. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from markupsafe import Markup

from gralora_diffusion.benchmark.evaluation.endpoint import UPDATE_NORM, Declared, without_rate
from gralora_diffusion.benchmark.evaluation.results import ALIGNMENT
from gralora_diffusion.benchmark.evaluation.scores import score_named

from .diagnostics import DiagnosticsData
from .report_data import ParetoData, ProtocolData, ScoreData
from .summary import cost_label, difference_text, direction, endpoint_label
from .svg import (
    COLOURS,
    Curve,
    ForestRow,
    Point,
    Row,
    curve_plot,
    forest_plot,
    heat_map,
    interval_plot,
    scatter,
    strips,
)

#: A caption and its plot.
Figure = tuple[str, Markup]
#: How many layers of each method have a heat map.
LAYERS = 6
_BLOCKS = ("output block", "input block")


def colours(methods: Iterable[str]) -> dict[str, int]:
    """A colour for each curve and the methods on it, the same in all plots."""
    names = list(methods)
    curves = list(dict.fromkeys(map(without_rate, names)))
    of = {curve: number % COLOURS for number, curve in enumerate(curves)}
    return of | {name: of[without_rate(name)] for name in names}


def forest(protocol: ProtocolData, declared: Declared, colour: Mapping[str, int]) -> Figure:
    """The declared comparisons with the difference of each subject."""
    rows = [
        ForestRow(
            d.method,
            f"against {d.reference}",
            f"{difference_text(d.difference)}, {d.verdict}",
            d.difference.mean,
            d.difference.low,
            d.difference.high,
            list(d.by_subject.values()),
            colour.get(d.method, 0),
        )
        for d in protocol.decisions
    ]
    what = endpoint_label(declared.endpoint)
    higher = score_named(declared.endpoint.score).higher_is_better is not False
    sides = ("reference better", "method better")
    plot = forest_plot(
        f"Declared comparisons: {what}",
        rows,
        f"difference in {what}",
        *(sides if higher else reversed(sides)),
    )
    return "Mean difference with its 95% interval; pale dots are subjects.", plot


def curves(protocol: ProtocolData, colour: Mapping[str, int]) -> list[Figure]:
    """The deciding score along each cost."""
    found = []
    for data in protocol.curves:
        label, cost = score_named(data.score).label, cost_label(data.cost)
        # the bare base lies at no cost, and far from all others
        names = [name for name in data.points if name != "base"] or list(data.points)
        joined = [_curve_of(data.points[name], name, colour[name]) for name in names]
        several = any(len(curve.points) > 1 for curve in joined)
        caption = f"{label} against {cost}. " + (
            "Each line is a method at several learning rates; higher and further left is better."
            if several
            else "Each point is a method; higher and further left is better."
        )
        axis = f"← {cost}" if data.cost != UPDATE_NORM else cost
        if data.cost == UPDATE_NORM:
            caption = f"{label} against the {cost}."
        found.append((caption, curve_plot(f"{label} by {cost}", joined, axis, f"{label} ↑")))
    return found


def _curve_of(points: Mapping[str, tuple[float, float]], name: str, colour: int) -> Curve:
    """A curve under its name, or a single method under its own."""
    label = name if len(points) > 1 else next(iter(points))
    return Curve(label, list(points.values()), colour)


def means(protocol: ProtocolData, colour: Mapping[str, int]) -> list[Figure]:
    """Means with intervals, a plot for each score."""
    return [(found.score.label, _means(found, colour)) for found in protocol.scores.values()]


def _means(content: ScoreData, colour: Mapping[str, int]) -> Markup:
    rows = [
        Row(
            method,
            mean.mean,
            mean.low,
            mean.high,
            colour[method],
            f"{mean.mean:.4f}"
            if mean.low is None or mean.high is None
            else f"{mean.mean:.4f} [{mean.low:.4f}, {mean.high:.4f}]",
        )
        for method, mean in content.means.items()
    ]
    score = content.score
    return interval_plot(f"{score.label}: means", rows, f"{score.label}; {direction(score)}")


def differences(protocol: ProtocolData, reference: str, colour: Mapping[str, int]) -> list[Figure]:
    """Differences from a reference with intervals and a line at zero, a plot for each score."""
    return [
        (found.score.label, _differences(found, reference, colour))
        for found in protocol.scores.values()
        if found.comparisons.get(reference)
    ]


def _differences(content: ScoreData, reference: str, colour: Mapping[str, int]) -> Markup:
    rows = [
        Row(method, d.mean, d.low, d.high, colour[method], difference_text(d))
        for method, comparison in content.comparisons[reference].items()
        for d in (comparison.difference,)
    ]
    better = {True: "better →", False: "← better", None: ""}[content.score.higher_is_better]
    axis = ", ".join(filter(None, (f"difference from {reference}", better)))
    title = f"{content.score.label} compared with {reference}"
    return interval_plot(title, rows, axis, zero=True)


def pareto(protocol: ProtocolData, colour: Mapping[str, int]) -> list[Figure]:
    """Similarity against drift and parameters; the front is filled and joined."""
    return [(pareto_title(plot), _pareto(plot, protocol, colour)) for plot in protocol.pareto]


def _pareto(plot: ParetoData, protocol: ProtocolData, colour: Mapping[str, int]) -> Markup:
    drift = protocol.scores.get(plot.x)
    similarity = protocol.scores[plot.y]
    points = [
        Point(
            method,
            x,
            y,
            colour[method],
            _interval(drift, method) if drift else None,
            _interval(similarity, method),
        )
        for method, (x, y) in plot.points.items()
    ]
    log = drift is None and all(x > 0 for x, _ in plot.points.values())
    label = drift.score.label if drift else "trained parameters"
    y_axis = f"{similarity.score.label} ↑"
    return scatter(pareto_title(plot), points, f"← {label}", y_axis, plot.front, log)


def pareto_title(plot: ParetoData) -> str:
    x = "parameters" if plot.x == "parameters" else score_named(plot.x).label
    return f"{score_named(plot.y).label} against {x}"


def heat_maps(method: str, content: DiagnosticsData) -> list[Figure]:
    """The mean over all layers for each k, then the most uneven layers."""
    found = []
    for k, share in content.mean_share.items():
        count = sum(len(blocks) == k for blocks in content.gradient_share.values())
        caption = f"{method}: mean over {count} layers"
        found.append((caption, heat_map(f"{caption}, k = {k}", share, *_BLOCKS)))
    uneven = sorted(content.gradient_share, key=lambda layer: -(content.concentration(layer) or 0))
    for layer in uneven[:LAYERS]:
        caption = f"{method}: {layer}, {content.concentration(layer):.3g} times an even share"
        found.append((caption, heat_map(caption, content.gradient_share[layer], *_BLOCKS)))
    return found


def layer_strips(
    diagnostics: Mapping[str, DiagnosticsData], colour: Mapping[str, int]
) -> list[Figure]:
    """Concentration, effective rank, outliers, and what steps make of them; a dot per layer."""
    kinds: dict[str, dict[str, list[float]]] = {
        "largest block's gradient share, relative to an even share": {
            method: [c for layer in found.layers if (c := found.concentration(layer)) is not None]
            for method, found in diagnostics.items()
        },
        "effective rank of the learned update": {
            method: list(found.effective_rank.values()) for method, found in diagnostics.items()
        },
        "largest input channel, relative to the median channel": {
            method: list(found.input_outliers.values()) for method, found in diagnostics.items()
        },
    }
    for name, title in ALIGNMENT.items():
        by_layer = {method: found.alignment.get(name, {}) for method, found in diagnostics.items()}
        kinds[title] = {method: list(values.values()) for method, values in by_layer.items()}
    plots = []
    for title, by_method in kinds.items():
        rows = [(m, values, colour[m]) for m, values in by_method.items() if values]
        if rows:
            positive = all(value > 0 for _, values, _ in rows for value in values)
            plots.append((title, strips(title, rows, title, log=positive)))
    return plots


def _interval(content: ScoreData, method: str) -> tuple[float, float] | None:
    mean = content.means.get(method)
    if mean is None or mean.low is None or mean.high is None:
        return None
    return mean.low, mean.high
