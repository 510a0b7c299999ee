"""What streaming a base costs and saves: ``python -m tests.performance.streaming``.

A whole step with gradient checkpointing, of a denoiser with random weights, first with all of them
on the device, then with ``--kept`` fractions of the blocks. Bytes copied and held are counted by
the engine and compared with what ``--dry_run`` says of them; times and peaks need a GPU to mean
something. Between the copies of blocks, a step should take as long as before.
"""

from __future__ import annotations

import argparse
import gc
from statistics import median
from typing import Any

import torch

from gralora_diffusion.base_models.streaming import StreamedBlocks, Streaming, block_bytes
from gralora_diffusion.training.runtime.acceleration import checkpoint_gradients
from tests.performance.measuring import (
    add_measuring_options,
    interleaved,
    machine,
    prepare,
    print_results,
    spread,
)
from tests.performance.real_step import BASES, Step, make_denoiser


def measure(
    name: str, kept: float | None, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Return the numbers of a step; with ``kept=None``, of one whose base is on the device."""
    base = BASES[name]
    cpu = torch.device("cpu")
    denoiser = make_denoiser(base, device if kept is None else cpu, args.quick)
    step = Step(base, denoiser, args.rank, args.quick)
    checkpoint_gradients(denoiser)
    sizes = block_bytes(denoiser)
    streamed: StreamedBlocks | None = None
    if kept is not None:
        streamed = Streaming(kept).start(denoiser, device)
    for parameter in step.trained:
        parameter.data = parameter.data.to(device)
    optimizer = torch.optim.AdamW(step.trained)
    inputs = step.inputs(device)
    steps = 0

    def run() -> None:
        nonlocal steps
        steps += 1
        step.backward(inputs)
        optimizer.step()
        optimizer.zero_grad()

    run()  # in which the order of the blocks becomes known
    before = streamed.copied if streamed else 0
    steps = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = interleaved({"step": run}, device, args.rounds, args.seconds)["step"]
    found = {
        "base": name,
        "kept": 1.0 if kept is None else kept,
        "ms": 1e3 * median(times),
        "spread_ms": 1e3 * spread(times),
        "copied": (streamed.copied - before) / steps if streamed else 0,
        "held": streamed.most_held if streamed else 0,
        "planned_copied": 0 if kept is None else 2 * Streaming(kept).bytes_needed(sizes).streamed,
        "planned_held": 0 if kept is None else Streaming(kept).bytes_needed(sizes).ring,
        "peak": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
    if streamed:
        streamed.close()
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bases", nargs="+", default=["flux"], choices=list(BASES))
    parser.add_argument("--kept", nargs="+", type=float, default=[0.0, 0.3, 0.6])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="small models, to try the command")
    add_measuring_options(parser, rounds=7, seconds=15)
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    device = prepare(args)
    results = []
    for name in args.bases:
        for kept in (None, *args.kept):
            results.append(measure(name, kept, args, device))
            gc.collect()
    head = ["base", "kept", "ms", "of whole", "copied MiB", "plan", "held MiB", "plan", "peak GiB"]
    lines = []
    for row in results:
        whole = next(r["ms"] for r in results if r["base"] == row["base"])
        sizes = [row[n] / 2**20 for n in ("copied", "planned_copied", "held", "planned_held")]
        peak = "" if row["peak"] is None else f"{row['peak'] / 2**30:.2f}"
        numbers = [f"{row['kept']:.2f}", f"{row['ms']:.1f}", f"{row['ms'] / whole:.2f}"]
        lines.append([row["base"], *numbers, *(f"{size:,.1f}" for size in sizes), peak])
    print_results(args, machine(device, "diffusers"), head, lines, results)


if __name__ == "__main__":
    main()
