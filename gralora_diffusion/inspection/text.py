"""An inspection as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from gralora_diffusion.io.safe_text import first_few, for_terminal, for_terminal_line

from .facts import Inspection, LayerFacts

#: Number of layers that are listed, those with the largest norms first.
LISTED = 10
#: Metadata that is shown elsewhere or is not a line of text.
_ELSEWHERE = {"gralora_adapter_metadata", "lora_adapter_metadata", "format"}
_LONGEST_VALUE = 100


def as_text(inspection: Inspection, all_layers: bool = False) -> str:
    """Return the inspection as text for the terminal."""
    blocks = [
        _head(inspection),
        _components(inspection),
        _settings(inspection.layers),
        _largest(inspection.layers, all_layers),
        _others(inspection),
        _problems(inspection),
        _metadata(inspection.metadata),
        _values(inspection),
    ]
    return for_terminal("\n\n".join(block for block in blocks if block))


def _head(inspection: Inspection) -> str:
    family = " or ".join(inspection.families) or "unknown"
    if inspection.families:
        family += f" (by {inspection.family_told_by})"
    count = len(inspection.files)
    size = f"{_size(inspection.bytes)}{f' in {count} files' if count > 1 else ''}"
    dtypes = ", ".join(f"{dtype} ({n})" for dtype, n in inspection.dtypes.items())
    lines = {
        "file": inspection.path,
        "what": inspection.title,
        "family": family,
        "size": f"{size}, {inspection.parameters:,} parameters in {inspection.tensors} tensors",
        "dtypes": dtypes,
    }
    if inspection.trigger:
        lines["trigger"] = inspection.trigger
    for name, digest in (inspection.sha256 or {}).items():
        lines[f"sha256 {name}" if count > 1 else "sha256"] = digest
    return table(list(lines.items()))


def _components(inspection: Inspection) -> str:
    adapter = bool(inspection.layers)
    head = ("component", "layers" if adapter else "tensors", "parameters")
    rows = [
        (name, str(part.layers if adapter else part.tensors), f"{part.parameters:,}")
        for name, part in inspection.components.items()
    ]
    return table([head, *rows], right=(1, 2))


def _settings(layers: Sequence[LayerFacts]) -> str:
    """Return rank, k, alpha and scaling, with one line for all layers that share them."""
    if not layers:
        return ""
    combinations = Counter(
        (f.component, f.kind, f.rank, f.k, f.hybrid_rank, f.alpha, f.scaling) for f in layers
    )
    gralora = any(f.kind == "GraLoRA" for f in layers)
    head = ["component", "kind", "layers", "rank", "k", "hybrid", "alpha", "scaling"]
    rows = [
        [component, kind, str(count), *[_number(value) for value in numbers]]
        for (component, kind, *numbers), count in combinations.items()
    ]
    if not gralora:
        head, *rows = [[*row[:4], *row[6:]] for row in [head, *rows]]
    return table([head, *rows], right=range(2, len(head)))


def _largest(layers: Sequence[LayerFacts], all_layers: bool) -> str:
    measured = [f for f in layers if f.norm is not None or f.effective_rank is not None]
    if not measured:
        return ""
    ordered = sorted(measured, key=lambda facts: -(facts.norm or 0))
    shown = ordered if all_layers else ordered[:LISTED]
    head = ("largest updates", "shape", "norm", "effective rank")
    rows = [(f.path, _shape(f), _number(f.norm), _number(f.effective_rank)) for f in shown]
    left = len(ordered) - len(shown)
    more = f"\n... and {left} more (--all_layers)" if left else ""
    return table([head, *rows], right=(1, 2, 3)) + more


def _others(inspection: Inspection) -> str:
    if not inspection.others:
        return ""
    first = ", ".join(inspection.others[:5]) + (", ..." if len(inspection.others) > 5 else "")
    return (
        f"{len(inspection.others)} keys do not belong to any adapted layer: "
        f"{for_terminal_line(first)}"
    )


def _problems(inspection: Inspection) -> str:
    """Return the problems of the file, and the layers whose scaling is not known."""
    lines = list(inspection.problems)
    by_problem: dict[str, list[str]] = {}
    for layer in inspection.layers:
        if layer.problem:
            by_problem.setdefault(layer.problem, []).append(layer.path)
    lines += [f"{first_few(paths, 3)}: {problem}" for problem, paths in by_problem.items()]
    return "\n  ".join(["problems:", *lines]) if lines else ""


def _metadata(metadata: dict[str, str]) -> str:
    rows = []
    for name, value in sorted(metadata.items()):
        if name not in _ELSEWHERE:
            line = " ".join(str(value).split())
            cut = len(line) > _LONGEST_VALUE
            rows.append((name, line[: _LONGEST_VALUE - 4] + " ..." if cut else line))
    return table([("metadata", ""), *rows]) if rows else ""


def _values(inspection: Inspection) -> str:
    lines = []
    if inspection.norm is not None:
        lines.append(f"norm of the whole update: {_number(inspection.norm)}")
    if inspection.median_effective_rank is not None:
        median = _number(inspection.median_effective_rank)
        lines.append(f"median of the layers' effective ranks: {median}")
    if inspection.non_finite is None:
        lines.append("values: not read (--check reads them)")
    elif not inspection.non_finite:
        lines.append("values: all finite")
    else:
        lines.append(f"NaN OR INFINITE VALUES in {len(inspection.non_finite)} tensors:")
        lines += [f"  {for_terminal_line(key)}" for key in inspection.non_finite]
    return "\n".join(lines)


def _shape(facts: LayerFacts) -> str:
    sides = [str(side) if side else "?" for side in (facts.inputs, facts.outputs)]
    kernel = f" {'x'.join(map(str, facts.kernel))}" if facts.kernel else ""
    return " -> ".join(sides) + kernel


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _size(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Return rows of cells as lines with aligned columns; the columns in ``right`` align right."""
    rows = [[for_terminal_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numbers = set(right)
    lines = (
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
