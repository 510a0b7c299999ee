"""Which plots a report has. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gralora_diffusion.benchmark.evaluation.scores import score_named

from .diagnostics import DiagnosticsData
from .report_data import ParetoData, ProtocolData, ScoreData
from .summary import difference_text, direction
from .svg import COLOURS, Point, Row, heat_map, interval_plot, scatter, strips

#: Layers whose heat maps are drawn, of each method.
LAYERS = 6
_BLOCKS = ("output block", "input block")


def colours(methods: Iterable[str]) -> dict[str, int]:
    """A colour for each method, the same in all plots."""
    return {method: number % COLOURS for number, method in enumerate(methods)}


def means(content: ScoreData, colour: Mapping[str, int]) -> str:
    """Means with intervals."""
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


def differences(content: ScoreData, reference: str, colour: Mapping[str, int]) -> str | None:
    """Differences from a reference with intervals, and a line at zero."""
    rows = [
        Row(method, d.mean, d.low, d.high, colour[method], difference_text(d))
        for method, comparison in content.comparisons.get(reference, {}).items()
        for d in (comparison.difference,)
    ]
    if not rows:
        return None
    better = {True: "better →", False: "← better", None: ""}[content.score.higher_is_better]
    axis = ", ".join(filter(None, (f"difference from {reference}", better)))
    return interval_plot(f"{content.score.label}: against {reference}", rows, axis, zero=True)


def pareto(plot: ParetoData, protocol: ProtocolData, colour: Mapping[str, int]) -> str:
    """Similarity against drift or parameters; the front is filled and joined."""
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


def heat_maps(method: str, content: DiagnosticsData) -> list[tuple[str, str]]:
    """(caption, plot): the mean of all layers for each k, then the least even layers."""
    found = []
    for k, share in content.mean_share.items():
        count = sum(len(blocks) == k for blocks in content.gradient_share.values())
        caption = f"{method}: mean of {count} layers"
        found.append((caption, heat_map(f"{caption}, k = {k}", share, *_BLOCKS)))
    uneven = sorted(content.gradient_share, key=lambda layer: -(content.concentration(layer) or 0))
    for layer in uneven[:LAYERS]:
        caption = f"{method}: {layer}, {content.concentration(layer):.3g} times an even share"
        found.append((caption, heat_map(caption, content.gradient_share[layer], *_BLOCKS)))
    return found


def layer_strips(
    mechanism: Mapping[str, DiagnosticsData], colour: Mapping[str, int]
) -> list[tuple[str, str]]:
    """(caption, plot) of concentration, effective rank and outliers, a dot per layer."""
    kinds: dict[str, dict[str, list[float]]] = {
        "largest block's share of the gradient, over an even share": {
            method: [c for layer in found.layers if (c := found.concentration(layer)) is not None]
            for method, found in mechanism.items()
        },
        "effective rank of the learned update": {
            method: list(found.effective_rank.values()) for method, found in mechanism.items()
        },
        "largest input channel, over the median one": {
            method: list(found.input_outliers.values()) for method, found in mechanism.items()
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
