"""What the benchmarks share: time in interleaved rounds, memory, and what the machine is.

Times of one machine differ from minute to minute by more than what is compared here. So what is
compared takes turns within a round, in an order drawn anew each time; ratios are formed within a
round, and their median is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], Any]

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says of each use that it was used

#: A call that takes less than this is repeated until it does not.
_SHORTEST = 0.01
_LONGEST_WARM_UP = 1.0
#: Rounds that are made even if the time is up.
_FEWEST_ROUNDS = 3

# -- time ------------------------------------------------------------------------------------------


def timed(run: Run, device: torch.device, calls: int = 1, undo: Run | None = None) -> float:
    """Seconds per call: of the processor if this process has one thread, else of the clock.

    ``undo``, after each call, does not count.
    """
    # one thread's own time does not count when others had its core
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock, seconds = time.process_time if alone else time.perf_counter, 0.0
    for _ in range(1 if undo is None else calls):
        _synchronize(device)
        start = clock()
        for _ in range(calls if undo is None else 1):
            run()
        _synchronize(device)
        seconds += clock() - start
        if undo is not None:
            undo()
    return seconds / calls


def interleaved(
    runs: Mapping[str, Run],
    device: torch.device,
    rounds: int,
    seconds: float = float("inf"),
    undo: Mapping[str, Run] | None = None,
) -> dict[str, list[float]]:
    """Return the seconds per call of each of ``runs``, by round.

    Args:
        rounds: at most as many; fewer, but at least three, once ``seconds`` have passed.
        undo: by name, what takes back what a call did; it does not count.
    """
    calls, undo = {}, undo or {}
    for name, run in runs.items():
        took = [timed(run, device, 1, undo.get(name))]  # these are to warm up
        while len(took) < 3 and sum(took) < _LONGEST_WARM_UP:
            took.append(timed(run, device, 1, undo.get(name)))
        calls[name] = max(1, round(_SHORTEST / min(took)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, draw, end = list(runs), random.Random(0), time.perf_counter() + seconds
    for number in range(rounds):
        if number >= _FEWEST_ROUNDS and time.perf_counter() > end:
            break
        draw.shuffle(order)
        for name in order:
            times[name].append(timed(runs[name], device, calls[name], undo.get(name)))
    return times


def ratios(times: Sequence[float], over: Sequence[float]) -> list[float]:
    """Ratios of two runs of :func:`interleaved`, by round."""
    return [a / b for a, b in zip(times, over, strict=True)]


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles."""
    if len(values) < 2:
        return float("nan")
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- memory ----------------------------------------------------------------------------------------


def peak_bytes(run: Run, device: torch.device) -> int:
    """Return the most bytes that ``run`` holds beyond what was there before.

    On CUDA the allocator knows; on the CPU torch's profiler writes down each allocation. What
    ``run`` makes at its first call and keeps must be there already.
    """
    if device.type == "cuda":
        _synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def saved_bytes(run: Run, known: Sequence[torch.Tensor]) -> int:
    """Return the bytes that ``run`` keeps for its backward pass, but for the ``known`` tensors."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def anonymous_mib() -> float:
    """Memory of this process beyond pages of files, in MiB: RssAnon of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return float("nan")


# -- the machine -----------------------------------------------------------------------------------


def processor() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def machine(device: torch.device, *packages: str) -> str:
    """One line: the processor or GPU, and the versions of torch and ``packages``."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        where = f"{processor()}, {os.cpu_count()} cores, {threads} threads"
    versions = [f"{name} {_version(name)}" for name in ("torch", *packages)]
    return ", ".join([where, *versions])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


# -- options and tables ----------------------------------------------------------------------------


def add_measuring_options(parser: argparse.ArgumentParser, rounds: int, seconds: float) -> None:
    parser.add_argument("--rounds", type=int, default=rounds, help="at most (default %(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        help="for the rounds of one comparison (default %(default)s)",
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="(default here: %(default)s)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's own)")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there too")


def prepare(args: argparse.Namespace) -> torch.device:
    """The device of the options; threads and seed are set."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return torch.device(args.device)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> str:
    """A table in columns, or in Markdown."""
    if markdown:
        lines = [head, ["---"] * len(head), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *rows)
    )


def write_json(args: argparse.Namespace, where: str, results: Any) -> None:
    if args.json:
        facts = {"machine": where, "options": vars(args), "results": results}
        Path(args.json).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def print_results(
    args: argparse.Namespace,
    where: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    results: Any,
) -> None:
    """Print the machine and a table; write ``results`` too, if the options want that."""
    print(where)
    print(table(head, rows, args.markdown))
    write_json(args, where, results)
