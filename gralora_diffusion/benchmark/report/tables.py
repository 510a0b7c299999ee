"""The tables of a report, for page and Markdown alike. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from gralora_diffusion.benchmark.evaluation.results import ALIGNMENT, TrialResult
from gralora_diffusion.benchmark.evaluation.scores import score_named, score_order
from gralora_diffusion.benchmark.evaluation.statistics import Estimate

from .diagnostics import DiagnosticsData
from .report_data import CurveData, ProtocolData, ReportData, Spread
from .summary import cost_label, direction, signed


@dataclass(frozen=True)
class Number:
    """A value and how it is shown."""

    value: float
    text: str

    def __str__(self) -> str:
        return self.text


#: A cell: texts and numbers, one after the other.
Cell = tuple[str | Number, ...]


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; the first ``labels`` columns are names, the others numbers.

    ``note`` stands below and explains how to read the table.
    """

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    labels: int = 1
    note: str = ""


def overview(content: ReportData) -> Table:
    """How many trials there are."""
    rows: list[tuple[Cell, ...]] = []
    for protocol in content.protocols:
        done = sum(trial.protocol == protocol.name for trial in content.trials)
        missing = sum(key.protocol == protocol.name for key in content.missing)
        seeds: list[str | Number] = [p for s in protocol.seeds for p in (", ", _name(s))]
        numbers = (len(protocol.subjects), len(protocol.methods), done, missing)
        cells = [(count(number),) for number in numbers]
        rows.append(((protocol.name,), *cells, tuple(seeds[1:])))
    head = ("protocol", "subjects", "methods", "trials done", "trials missing", "seeds")
    return Table("Overview", head, rows)


def meanings(protocol: ProtocolData) -> Table:
    """What each score means."""
    rows: list[tuple[Cell, ...]] = [
        ((s.score.label,), (s.score.name,), (s.score.meaning or "-",), (direction(s.score),))
        for s in protocol.scores.values()
    ]
    return Table("The scores", ("score", "name", "meaning", "direction"), rows, labels=4)


def scores(protocol: ProtocolData) -> Table:
    """Means and intervals, a row per method."""
    head = ["method", "trials"]
    head += [f"{s.score.label} ({_arrow(s.score.name)})" for s in protocol.scores.values()]
    rows: list[tuple[Cell, ...]] = []
    for method, costs in protocol.methods.items():
        means = [score.means.get(method) for score in protocol.scores.values()]
        cells = [interval(mean) if mean else ("-",) for mean in means]
        rows.append(((method,), (count(costs.trials),), *cells))
    return Table("Means with 95% intervals", tuple(head), rows, note=_note(rows))


def decisions(protocol: ProtocolData) -> Table:
    """The declared comparisons."""
    head = (
        *("method", "reference", "verdict", "difference", "subjects' median"),
        *("subjects", "seeds", "trials", "p", "p, Holm", "p, sign flips"),
    )
    rows: list[tuple[Cell, ...]] = []
    for found in protocol.decisions:
        d = found.difference
        rows.append(
            (
                *((text,) for text in (found.method, found.reference, found.verdict)),
                interval(d, signed),
                (Number(found.median, signed(found.median)),),
                *((count(number),) for number in (d.subjects, d.seeds, d.trials)),
                *(
                    ("-",) if p is None else (Number(p, f"{p:.2g}"),)
                    for p in (found.p, found.holm_p, found.sign_flip_p)
                ),
            )
        )
    return Table("Declared comparisons", head, rows, labels=3, note=_note(rows))


def by_subject(protocol: ProtocolData) -> Table:
    """The differences of the declared comparisons, a row per subject."""
    names = sorted({name for found in protocol.decisions for name in found.by_subject})
    head = [f"{found.method} - {found.reference}" for found in protocol.decisions]
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        values = [found.by_subject.get(name) for found in protocol.decisions]
        cells = [("-",) if v is None else (Number(v, signed(v)),) for v in values]
        rows.append(((name,), *cells))
    return Table("Declared differences by subject", ("subject", *head), rows)


def blind(content: ReportData) -> Table:
    """What people chose without knowing the methods."""
    head = (
        *("method", "reference", "share that prefers the method", "choices", "no difference"),
        *("people", "subjects", "effective choices", "difference in drift"),
    )
    rows: list[tuple[Cell, ...]] = []
    for found in content.blind:
        share: list[str | Number] = [Number(found.share, f"{100 * found.share:.1f}%")]
        if found.low is not None and found.high is not None:
            low, high = (Number(x, f"{100 * x:.1f}%") for x in (found.low, found.high))
            share += [" [", low, ", ", high, "]"]
        numbers = (found.choices, found.ties, found.people, found.subjects)
        cells = [(count(number),) for number in numbers]
        effective, gap = found.effective, found.drift_gap
        rows.append(
            (
                *((found.method,), (found.reference,), tuple(share), *cells),
                ("-",) if effective is None else (Number(effective, f"{effective:.1f}"),),
                ("-",) if gap is None else (Number(gap, f"{gap:.4f}"),),
            )
        )
    note = (
        "A choice of no difference counts half. The 95% interval is Wilson's at the effective "
        "number of choices, with Student's quantile for as many subjects, because choices on one "
        "subject resemble each other. It needs two subjects. The difference in drift is the mean "
        "over the pairs, whose learning rates were chosen to make it small."
    )
    return Table("Blind choices", head, rows, labels=2, note=note)


def curve_points(found: CurveData) -> Table:
    """The points of the curves, a row per method."""
    label, cost = score_named(found.score).label, cost_label(found.cost)
    rows: list[tuple[Cell, ...]] = [
        ((method,), (Number(x, f"{x:.4f}"),), (Number(y, f"{y:.4f}"),))
        for points in found.points.values()
        for method, (x, y) in points.items()
    ]
    return Table(f"{label} and {cost}: means of each curve", ("method", cost, label), rows)


def curve_gaps(found: CurveData) -> Table:
    """Differences at equal cost between all curves and LoRA's."""
    rows: list[tuple[Cell, ...]] = []
    for reference, of in found.gaps.items():
        for name, gap in of.items():
            numbers = (gap.subjects, gap.seeds, gap.trials)
            cells = [(count(number),) for number in numbers]
            rows.append(((name,), (reference,), interval(gap, signed), *cells))
    title = f"{score_named(found.score).label} at equal {cost_label(found.cost)}"
    head = ("method", "reference", "difference", "subjects", "seeds", "trials")
    return Table(title, head, rows, labels=2, note=_note(rows))


def comparisons(protocol: ProtocolData, reference: str) -> Table:
    """Differences from a reference, a row per score and method."""
    head = ("score", "method", "difference", "win rate", "wins", "ties", "losses")
    rows = []
    for content in protocol.scores.values():
        label = f"{content.score.label} ({_arrow(content.score.name)})"
        for method, found in content.comparisons.get(reference, {}).items():
            rate = found.win_rate
            rows.append(
                (
                    (label,),
                    (method,),
                    interval(found.difference, signed),
                    ("-",) if rate is None else (Number(rate, f"{100 * rate:.0f}%"),),
                    ("-",) if found.wins is None else (count(found.wins),),
                    (count(found.ties),),
                    ("-",) if found.losses is None else (count(found.losses),),
                )
            )
    title = f"Differences from {reference}, trial by trial"
    return Table(title, head, rows, labels=2, note=_note(rows))


def costs(protocol: ProtocolData) -> Table:
    """Time and memory, a row per method: mean (minimum to maximum)."""
    head = (
        *("method", "parameters", "layers", "lowered k, in layers", "rank of the update", "steps"),
        *("norm of the update", "training, s", "generation, s", "peak memory, GiB"),
    )
    rows = []
    for method, found in protocol.methods.items():
        rank = found.update_rank
        lowered = [p for k, n in found.lowered_k.items() for p in (", ", f"{k} in ", count(n))]
        rows.append(
            (
                (method,),
                (count(found.parameters),),
                ("-",) if found.layers is None else (count(found.layers),),
                tuple(lowered[1:]) or ("-",),
                ("full",) if rank is None else (count(rank),),
                (count(found.steps),),
                _optional(found.update_norm),
                _spread(found.train_seconds, 1),
                _spread(found.generation_seconds, 1),
                _spread(found.peak_memory_gib, 2),
            )
        )
    return Table("Size, time and memory of a trial: mean (minimum to maximum)", head, rows)


def diagnostics(protocol: ProtocolData) -> Table:
    """A row per method."""
    head = ("method", "layers", "concentration", "effective rank", "input outliers", "stable rank")
    rows: list[tuple[Cell, ...]] = []
    for method, found in protocol.diagnostics.items():
        concentrations = [found.concentration(layer) for layer in found.layers]
        known = [value for value in concentrations if value is not None]
        ranks, outliers = found.effective_rank.values(), found.input_outliers.values()
        values = (known, ranks, outliers, found.stable_rank.values())
        rows.append(((method,), (count(len(found.layers)),), *map(_over_layers, values)))
    note = (
        "Concentration is the largest block's share of the squared norm of the gradient, relative "
        "to an even share. It is 1 if all blocks have the same share. The effective rank of the "
        "learned update is the exponential of the entropy of its singular values; small ones "
        "count, too. The stable rank is the sum of their squares over the largest one. Input "
        "outliers is the norm of the largest input channel, relative to that of the median "
        "channel. Each layer's value is its mean over the trials."
    )
    return Table("Layers: median (minimum to maximum)", head, rows, note=note)


def alignment(protocol: ProtocolData) -> Table:
    """A row per method that logged the optimizer's steps."""
    head = ("method", *_ALIGNMENT_HEADS)
    rows: list[tuple[Cell, ...]] = []
    for method, found in protocol.diagnostics.items():
        if found.alignment:
            steps = [found.concentration(layer, of_steps=True) for layer in found.step_share]
            values = [found.alignment.get(name, {}).values() for name in ALIGNMENT]
            known = [value for value in steps if value is not None]
            rows.append(((method,), *map(_over_layers, (*values, known))))
    note = (
        "The outlier is the input channel with the largest norm in a step. Its share is its "
        "column's part of the squared norm, relative to an even part: 1 if it has as much as the "
        "mean channel. The full gradient is that of the whole weight, which needs no factors. The "
        "method's gradient is how gradient descent on its parameters would move the weight, and "
        "the step is how its optimizer does. Each layer's value is its mean over steps and trials."
    )
    return Table(
        "Gradients and steps: median over layers (minimum to maximum)", head, rows, note=note
    )


def alignment_by_layer(method: str, content: DiagnosticsData) -> Table:
    """A row per layer; the columns of :func:`alignment`."""
    rows = []
    for layer in content.layers:
        values = [content.alignment.get(name, {}).get(layer) for name in ALIGNMENT]
        concentration = content.concentration(layer, of_steps=True)
        rows.append(((layer,), *map(_optional, (*values, concentration))))
    if not content.alignment:
        rows = []
    return Table(f"{method}: gradients and steps by layer", ("layer", *_ALIGNMENT_HEADS), rows)


#: Columns for the measures of ``ALIGNMENT``, and for the concentration of the steps.
_ALIGNMENT_HEADS = (
    "outlier's share of the full gradient",
    "of the method's gradient",
    "of the step",
    "cosine of the method's gradient with the full one",
    "cosine of the step with it",
    "concentration of the step",
)


def layers(method: str, content: DiagnosticsData) -> Table:
    """A row per layer."""
    head = (
        "layer",
        "blocks per side",
        "concentration",
        "effective rank",
        "input outliers",
        "stable rank",
    )
    rows = []
    for layer in content.layers:
        share = content.gradient_share.get(layer)
        concentration = content.concentration(layer)
        values = (
            *(concentration, content.effective_rank.get(layer)),
            *(content.input_outliers.get(layer), content.stable_rank.get(layer)),
        )
        cells = [_optional(value) for value in values]
        rows.append(((layer,), ("-",) if share is None else (count(len(share)),), *cells))
    return Table(f"{method}: layers, means over {content.trials} trials", head, rows)


def shares(method: str, k: int, content: DiagnosticsData) -> Table:
    """A heat map as numbers."""
    head = ("output block", *(f"input block {n + 1}" for n in range(k)))
    rows: list[tuple[Cell, ...]] = [
        ((f"{j + 1}",), *((Number(value, f"{value:.4f}"),) for value in row))
        for j, row in enumerate(content.mean_share[k])
    ]
    return Table(f"{method}: share of the squared gradient norm, mean over layers", head, rows)


def trials(results: Sequence[TrialResult]) -> Table:
    """Every trial with its scores."""
    names = sorted({name for result in results for name in result.scores}, key=score_order)
    head = (
        *("protocol", "subject", "method", "seed", "parameters", "rank of the update", "steps"),
        *("norm of the update", "training, s", "generation, s", "peak memory, GiB"),
    )
    rows = []
    for r in results:
        found = [r.scores.get(name) for name in names]
        memory = r.peak_memory_gib
        rows.append(
            (
                *((name,) for name in (r.protocol, r.subject, r.method)),
                (_name(r.seed),),
                (count(r.parameters),),
                ("full",) if r.update_rank is None else (count(r.update_rank),),
                (count(r.steps),),
                _optional(r.update_norm),
                (Number(r.train_seconds, f"{r.train_seconds:,.1f}"),),
                (Number(r.generation_seconds, f"{r.generation_seconds:,.1f}"),),
                ("-",) if memory is None else (Number(memory, f"{memory:.2f}"),),
                *(("-",) if v is None else (Number(v, f"{v:.4f}"),) for v in found),
            )
        )
    return Table("All trials", (*head, *(score_named(n).label for n in names)), rows, labels=3)


def missing(content: ReportData) -> Table:
    """Trials without a result."""
    rows: list[tuple[Cell, ...]] = [
        (*((name,) for name in key[:3]), (_name(key.seed),)) for key in content.missing
    ]
    return Table("Missing trials", ("protocol", "subject", "method", "seed"), rows, labels=3)


def unreadable(content: ReportData) -> Table:
    """Results that could not be used."""
    rows: list[tuple[Cell, ...]] = [((str(u.path),), (u.reason,)) for u in content.unreadable]
    return Table("Unusable results", ("file", "reason"), rows, labels=2)


def settings(content: ReportData) -> list[Table]:
    """Settings and versions, if there are any."""
    found = content.provenance
    tables = []
    if found.by_method:
        head = ("method", *found.by_method)
        rows: list[tuple[Cell, ...]] = [
            ((method,), *((values[method],) for values in found.by_method.values()))
            for method in dict.fromkeys(trial.method for trial in content.trials)
        ]
        tables.append(Table("Settings by method", head, rows, labels=len(head)))
    if found.common:
        rows = [((name,), (value,)) for name, value in found.common.items()]
        tables.append(Table("Settings of all trials", ("setting", "value"), rows, labels=2))
    if found.versions:
        rows = [((name,), (value,)) for name, value in found.versions.items()]
        tables.append(Table("Versions", ("program", "version"), rows, labels=2))
    return tables


def count(value: int) -> Number:
    """A whole number."""
    return Number(value, f"{value:,}")


def interval(mean: Estimate, shown: Callable[[float], str] = "{:.4f}".format) -> Cell:
    """A mean and its interval, with a star if a note applies."""
    parts: list[str | Number] = [Number(mean.mean, shown(mean.mean))]
    if mean.low is not None and mean.high is not None:
        low, high = (Number(value, shown(value)) for value in (mean.low, mean.high))
        parts += [" [", low, ", ", high, "]"]
    return (*parts, "*") if mean.over != "subjects" else tuple(parts)


def _name(seed: int) -> Number:
    """A number that is a name, and so has no commas."""
    return Number(seed, f"{seed}")


def _arrow(name: str) -> str:
    return direction(score_named(name)).removesuffix(" is better")


def _optional(value: float | None) -> Cell:
    return ("-",) if value is None else (Number(value, f"{value:.4g}"),)


def _note(rows: Sequence[tuple[Cell, ...]]) -> str:
    starred = any(cell[-1:] == ("*",) for row in rows for cell in row)
    text = "* There is no interval, or only one over the seeds of one subject."
    return text if starred else ""


def _over_layers(values: Iterable[float]) -> Cell:
    found = sorted(values)
    if not found:
        return ("-",)
    middle, least, greatest = (
        Number(value, f"{value:.4g}") for value in (median(found), found[0], found[-1])
    )
    return (middle, " (", least, " to ", greatest, ")")


def _spread(found: Spread | None, decimals: int) -> Cell:
    if found is None:
        return ("-",)
    mean, least, greatest = (Number(value, f"{value:,.{decimals}f}") for value in found)
    return (mean, " (", least, " to ", greatest, ")")
