"""Which k, and what an optimizer makes of an outlier: a linear layer whose answer is known.

    python -m tests.performance.which_k

A layer of WIDTH x WIDTH shall learn an update that consists of b x b blocks, each of rank RANK / b.
A GraLoRA of k = b and rank RANK can represent it exactly, with the parameters of every other k; a
LoRA is k = 1. Inputs are normal, and in half of the tasks one channel is OUTLIER times larger. Each
k has its best of RATES, chosen on seeds that are not reported; for a task whose best rate is the
lowest or highest tried, further ones are tried until it is not. Everything is written into
docs/images/which_k.json and drawn as which_k.svg; tests compare the documents with the former.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gralora_diffusion.adapters.layers import functional
from gralora_diffusion.benchmark.evaluation.statistics import estimate
from gralora_diffusion.lora_files.spectrum import effective_rank, stable_rank
from tests import ROOT

WIDTH, RANK, TOKENS, STEPS, OUTLIER = 32, 8, 64, 300, 10.0
STRUCTURES = KS = (1, 2, 4, 8)
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
#: Rates that are tried beyond those, outwards from their ends.
LOWER, HIGHER = (1e-3, 3e-4), (3e-1, 1.0)
#: Seeds that choose the rate, and seeds that are reported.
TUNING, REPORTED = 4, 12
#: Every tenth of the first hundred steps; later ones are about what is left of the noise.
MEASURED = range(0, 100, 10)
MEASURES = ("full_share", "gradient_share", "step_share", "gradient_cosine", "step_cosine")


#: Name of a measure -> its value in each run.
Run = dict[str, list[float]]


def targets(structure: int, seeds: Sequence[int]) -> Tensor:
    """Return an update (seeds, out, in) of blocks for each seed, of Frobenius norm sqrt(WIDTH)."""
    side, rank = WIDTH // structure, RANK // structure
    found = []
    for seed in seeds:
        random = torch.Generator().manual_seed(seed)
        shape = (structure, structure, side, rank)
        up, down = (torch.randn(shape, generator=random) for _ in range(2))
        blocks = up @ down.transpose(-1, -2)
        dense = blocks.transpose(1, 2).reshape(WIDTH, WIDTH)
        found.append(dense * WIDTH**0.5 / dense.norm())
    return torch.stack(found)


def representable(target: Tensor, k: int) -> float:
    """Return the least share of the squared norm that blocks of rank RANK / k leave over."""
    side = WIDTH // k
    blocks = target.reshape(k, side, k, side).transpose(1, 2).double()
    values = torch.linalg.svdvals(blocks)
    return float(values[..., RANK // k :].square().sum() / values.square().sum())


def train(target: Tensor, scale: Tensor, k: int, rate: float) -> Run:
    """Train one adapter per run, all at once; return loss, ranks and measures of each.

    The loss is that of the whole distribution, relative to that of no update. Measures are means
    over the MEASURED steps: the outlier channel's share of the squared norm of the full gradient
    dL/dW, of the direction in which gradient descent on the factors moves the update, and of
    AdamW's step; and the cosines of the latter two with the full gradient's.

    Args:
        target: (runs, out, in); run n has the seed n modulo the number of seeds.
        scale: of the inputs' channels, (runs, in).
    """
    seeds = TUNING + REPORTED
    factors = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        factors.append(functional.init_factors(WIDTH, WIDTH, rank=RANK, k=k))
    tasks = len(target) // seeds
    A, B = (
        torch.stack(part).repeat(tasks, 1, 1, 1).requires_grad_()
        for part in zip(*factors, strict=True)
    )
    optimizer = torch.optim.AdamW([A, B], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    measured: dict[str, list[Tensor]] = {name: [] for name in MEASURES}
    for step, tokens in enumerate(inputs(seeds)):
        x = tokens.repeat(tasks, 1, 1) * scale[:, None]
        error = x @ (dense(A, B) - target).transpose(1, 2)
        optimizer.zero_grad()
        error.square().sum(-1).mean(-1).sum().backward()
        before = gradient = None
        if step in MEASURED and A.grad is not None and B.grad is not None:
            before = dense(A, B).detach()
            gradient = (dense(A.grad, B) + dense(A, B.grad)).detach()
        optimizer.step()
        schedule.step()
        if before is not None and gradient is not None:
            full = (error.transpose(1, 2) @ x).detach()
            moved = before - dense(A, B).detach()
            for name, value in {
                "full_share": share(full),
                "gradient_share": share(gradient),
                "step_share": share(moved),
                "gradient_cosine": cosine(gradient, full),
                "step_cosine": cosine(moved, full),
            }.items():
                measured[name].append(value)
    learned = dense(A, B).detach()
    left = ((learned - target) * scale[:, None]).square().sum((1, 2))
    whole = (target * scale[:, None]).square().sum((1, 2))
    values = torch.linalg.svdvals(learned.double()).numpy()
    return {
        "loss": (left / whole).tolist(),
        "stable_rank": [stable_rank(v) for v in values],
        "effective_rank": [effective_rank(v) for v in values],
        **{name: torch.stack(found).mean(0).tolist() for name, found in measured.items()},
    }


def dense(A: Tensor, B: Tensor) -> Tensor:
    """Return the updates (seeds, out, in) of factors (seeds, k, i, r) and (seeds, k, r, o)."""
    k, i, r = A.shape[1:]
    A = A.unflatten(3, (k, r // k))
    B = B.unflatten(2, (k, r // k))
    return torch.einsum("znijs,zjnso->zjoni", A, B).reshape(len(A), -1, k * i)


@cache
def inputs(seeds: int) -> Tensor:
    """Return normal inputs (steps, seeds, tokens, in) that depend on each seed alone."""
    randoms = [torch.Generator().manual_seed(10_000 + seed) for seed in range(seeds)]
    return torch.stack([torch.randn(STEPS, TOKENS, WIDTH, generator=r) for r in randoms], 1)


def share(update: Tensor) -> Tensor:
    """Return the first column's share of the squared norm of updates (seeds, out, in)."""
    return update[:, :, 0].square().sum(1) / update.square().sum((1, 2))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of updates (seeds, out, in) as vectors."""
    return torch.cosine_similarity(a.flatten(1), b.flatten(1))


def with_interval(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean, low and high of values over seeds, by Student's t."""
    found = estimate({("", seed): value for seed, value in enumerate(values)})
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _part(run: Run, part: slice) -> Run:
    return {name: values[part] for name, values in run.items()}


def _best_rate(tried: Mapping[float, Run]) -> float:
    """Return the rate with the least loss on the seeds that choose it."""
    return min(tried, key=lambda rate: sum(tried[rate]["loss"][:TUNING]))


def _next_rates(tried: Mapping[float, Run]) -> set[float]:
    """Return the rates to try next, beyond an end that is the best so far."""
    best = _best_rate(tried)
    lower = [rate for rate in LOWER if rate < min(tried)][:1] if best == min(tried) else []
    higher = [rate for rate in HIGHER if rate > max(tried)][:1] if best == max(tried) else []
    return {*lower, *higher}


def results() -> dict[str, Any]:
    """Measure everything: each k at its best rate, on the seeds that are reported."""
    seeds = TUNING + REPORTED
    tasks = [(structure, outlier) for outlier in (1.0, OUTLIER) for structure in STRUCTURES]
    target = torch.cat([targets(structure, range(seeds)) for structure, _ in tasks])
    scale = torch.ones(len(target), WIDTH)
    scale[:, 0] = torch.tensor([outlier for _, outlier in tasks]).repeat_interleave(seeds)
    rows = []
    for k in KS:
        runs = {rate: train(target, scale, k, rate) for rate in RATES}
        parts = [slice(number * seeds, (number + 1) * seeds) for number in range(len(tasks))]
        tried = [{rate: _part(run, part) for rate, run in runs.items()} for part in parts]
        for rate in (*LOWER, *HIGHER):
            wanted = [n for n, found in enumerate(tried) if rate in _next_rates(found)]
            if wanted:
                rows_of = torch.cat([torch.arange(parts[n].start, parts[n].stop) for n in wanted])
                run = train(target[rows_of], scale[rows_of], k, rate)
                for place, n in enumerate(wanted):
                    tried[n][rate] = _part(run, parts[place])
        for (structure, outlier), part, found in zip(tasks, parts, tried, strict=True):
            best = _best_rate(found)
            reported = {name: values[TUNING:] for name, values in found[best].items()}
            limits = [representable(one, k) for one in target[part][TUNING:]]
            rows.append(
                {
                    "structure": structure,
                    "k": k,
                    "outlier": outlier,
                    "rate": best,
                    "rates": sorted(found),
                    "rate_at_the_end": best in (min(found), max(found)),
                    "representable": with_interval(limits),
                    "losses": reported["loss"],
                    **{name: with_interval(values) for name, values in reported.items()},
                }
            )
    return {
        "settings": {
            "width": WIDTH,
            "rank": RANK,
            "tokens": TOKENS,
            "steps": STEPS,
            "outlier": OUTLIER,
            "rates": RATES,
            "tuning_seeds": TUNING,
            "reported_seeds": REPORTED,
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": rows,
    }


# -- tables for the documents --------------------------------------------------------------------


def row_of(found: Mapping[str, Any], structure: int, k: int, outlier: float) -> Mapping[str, Any]:
    """Return the row of a task and a k."""
    for row in found["rows"]:
        if (row["structure"], row["k"], row["outlier"]) == (structure, k, outlier):
            return row
    raise KeyError((structure, k, outlier))


def loss_table(found: Mapping[str, Any], outlier: float) -> str:
    """Return Markdown: the loss of each k, in percent of that of no update, with intervals."""
    lines = [
        "| the update consists of | k = 1 (LoRA) | k = 2 | k = 4 | k = 8 |",
        "|---|---|---|---|---|",
    ]
    for structure in STRUCTURES:
        name = f"one block of rank {RANK}"
        if structure > 1:
            name = f"{structure} x {structure} blocks of rank {RANK // structure}"
        cells = []
        for k in KS:
            loss = row_of(found, structure, k, outlier)["loss"]
            # + 0.0 makes no minus of a zero
            mean, low, high = (round(100 * loss[end], 1) + 0.0 for end in ("mean", "low", "high"))
            cells.append(f"{mean:.1f}% ({low:.1f} to {high:.1f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure_table(found: Mapping[str, Any], structure: int) -> str:
    """Return Markdown: what happens to the outlier channel, and the ranks, for each k."""
    labels = {
        "full_share": "outlier's share of the full gradient",
        "gradient_share": "of the gradient's direction through the factors",
        "step_share": "of AdamW's step",
        "gradient_cosine": "cosine of that direction with the full gradient",
        "step_cosine": "cosine of AdamW's step with it",
        "stable_rank": "stable rank of the learned update",
        "effective_rank": "entropy rank of the learned update",
    }
    lines = ["| | k = 1 (LoRA) | k = 2 | k = 4 | k = 8 |", "|---|---|---|---|---|"]
    for name, label in labels.items():
        cells = []
        for k in KS:
            value = row_of(found, structure, k, OUTLIER)[name]
            digits = 1 if "rank" in name else 3
            ends = (f"{value[end]:.{digits}f}" for end in ("mean", "low", "high"))
            cells.append("{} ({} to {})".format(*ends))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


# -- the figure ------------------------------------------------------------------------------------

STYLE = """
svg { color-scheme: light dark; background: #fff; font: 12px system-ui, sans-serif; }
text { fill: #1b1f24; } .soft { fill: #59636e; } line { stroke: #d5dae0; }
.a { stroke: #0065bd; fill: #0065bd; } .b { stroke: #c2410c; fill: #c2410c; }
polyline { fill: none !important; stroke-width: 2; } .limit { fill: none; stroke: #59636e; }
.mid { text-anchor: middle; } .end { text-anchor: end; } .bold { font-weight: 600; }
@media (prefers-color-scheme: dark) {
  svg { background: #14171b; } text { fill: #e6e9ed; } .soft { fill: #a3adb8; }
  line { stroke: #363d46; } .limit { stroke: #a3adb8; }
  .a { stroke: #62b0ff; fill: #62b0ff; } .b { stroke: #ff9d5c; fill: #ff9d5c; } }
"""


def figure(found: Mapping[str, Any]) -> str:
    """Return an SVG: a panel for each structure, with the loss of each k and its interval."""
    width, height, left, top = 190, 190, 46, 58
    parts = []
    for panel, structure in enumerate(STRUCTURES):
        x0 = left + panel * (width + 14)
        blocks = "one block" if structure == 1 else f"{structure} x {structure} blocks"
        parts.append(f'<text class="bold mid" x="{x0 + width / 2}" y="44">{blocks}</text>')
        for value in (0, 0.25, 0.5, 0.75, 1):
            y = top + height * (1 - value)
            parts.append(f'<line x1="{x0}" x2="{x0 + width}" y1="{y}" y2="{y}"/>')
            if panel == 0:
                parts.append(f'<text class="soft end" x="{x0 - 6}" y="{y + 4}">{value:g}</text>')
        for place, k in enumerate(KS):
            x = x0 + width * (place + 0.5) / len(KS)
            label = "1 (LoRA)" if k == 1 else f"{k}"
            parts.append(f'<text class="mid" x="{x}" y="{top + height + 18}">{label}</text>')
        for colour, outlier in (("a", 1.0), ("b", found["settings"]["outlier"])):
            points = []
            for place, k in enumerate(KS):
                row = row_of(found, structure, k, outlier)
                x = x0 + width * (place + 0.5) / len(KS) + (5 if colour == "b" else -5)
                y, low, high = (
                    top + height * (1 - min(1.0, row["loss"][end]))
                    for end in ("mean", "low", "high")
                )
                points.append(f"{x:.1f},{y:.1f}")
                parts.append(
                    f'<line class="{colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" '
                    f'y2="{high:.1f}"/><circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
                )
                if colour == "a":
                    limit = top + height * (1 - row["representable"]["mean"])
                    parts.append(
                        f'<line class="limit" x1="{x - 8:.1f}" x2="{x + 18:.1f}" y1="{limit:.1f}" '
                        f'y2="{limit:.1f}"/>'
                    )
            parts.append(f'<polyline class="{colour}" points="{" ".join(points)}"/>')
    total = left + len(STRUCTURES) * (width + 14)
    middle, end = left + (total - left) / 2, top + height + 40
    legend = (
        f'<circle class="a" cx="{left}" cy="18" r="4"/><text x="{left + 10}" y="22">inputs of '
        f'equal size</text><circle class="b" cx="{left + 190}" cy="18" r="4"/><text '
        f'x="{left + 200}" y="22">one channel {found["settings"]["outlier"]:g} times larger</text>'
        f'<line class="limit" x1="{left + 420}" x2="{left + 446}" y1="18" y2="18"/>'
        f'<text x="{left + 454}" y="22">what this k can represent</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {end + 12}" role="img">'
        "<title>Loss left over by k, for updates of known block structure</title>"
        f"<style>{STYLE}</style>{legend}{''.join(parts)}"
        f'<text class="soft mid" x="{middle}" y="{end}">k, at equal parameters; the loss is '
        "relative to that of no update; bars are 95% intervals over 12 seeds</text></svg>\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Write the results and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "docs/images")
    folder = parser.parse_args(argv).folder
    torch.set_num_threads(1)
    found = results()
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    (folder / "which_k.json").write_text(text, encoding="utf-8")
    (folder / "which_k.svg").write_text(figure(found), encoding="utf-8")


if __name__ == "__main__":
    main()
