"""The plots of a report. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from markupsafe import Markup

from gralora_diffusion.benchmark.evaluation.scores import score_named

from .diagnostics import DiagnosticsData
from .report_data import ParetoData, ProtocolData, ScoreData
from .summary import difference_text, direction
from .svg import COLOURS, Point, Row, heat_map, interval_plot, scatter, strips

#: A caption and its plot.
Figure = tuple[str, Markup]
#: How many layers of each method have a heat map.
LAYERS = 6
_BLOCKS = ("output block", "input block")


def colours(methods: Iterable[str]) -> dict[str, int]:
    """A colour for each method, the same in all plots."""
    return {method: number % COLOURS for number, method in enumerate(methods)}


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
    """Concentration, effective rank and outliers, a dot per layer."""
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
