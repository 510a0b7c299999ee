"""Read damaged files: ``python -m tests.fuzzing --reader all --count 10000 --seed 0``.

A fault is printed with its seed and number, and ``--reader X --seed S --only N`` repeats that case
and prints its traceback. The exit code is 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter, defaultdict

from .worker import Outcome, Worker


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    command = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    command.add_argument("--reader", default="all", help="one of --list, several by commas, or all")
    command.add_argument("--count", type=int, default=1000, help="damaged files per reader")
    command.add_argument("--first", type=int, default=0, help="number of the first one")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--only", type=int, help="number of a single case, told in full")
    command.add_argument("--list", action="store_true", help="print the names of the readers")
    return command


def main() -> None:
    command = build_parser()
    options = command.parse_args()
    logging.disable(logging.WARNING)  # of libraries that are imported
    from .readers import READERS

    if options.list:
        print("\n".join(READERS))
        return
    names = list(READERS) if options.reader == "all" else options.reader.split(",")
    if unknown := set(names) - set(READERS):
        command.error(f"--reader {', '.join(unknown)}: not among {', '.join(READERS)}")
    numbers = range(options.first, options.first + options.count)
    if options.only is not None:
        numbers = range(options.only, options.only + 1)
    with Worker() as worker:
        faults = [
            run(worker, name, options.seed, numbers, options.only is not None) for name in names
        ]
    sys.exit(any(faults))


def run(
    worker: Worker, name: str, seed: int, numbers: range, in_full: bool = False
) -> dict[str, list[Outcome]]:
    """Read the cases, print a summary, return the faults by kind."""
    start, results = time.monotonic(), Counter[str]()
    longest, largest = Outcome(0), Outcome(0)
    faults: dict[str, list[Outcome]] = defaultdict(list)
    for number in numbers:
        outcome = worker.read(name, seed, number)
        results[outcome.error or "read"] += outcome.fault is None
        longest = max(longest, outcome, key=lambda one: one.seconds)
        largest = max(largest, outcome, key=lambda one: one.memory)
        if outcome.fault:
            faults[outcome.fault].append(outcome)
        if in_full:
            print(outcome.details)
    told = ", ".join(f"{count} {what}" for what, count in results.most_common() if count)
    print(f"{name}, seed {seed}: {told} ({time.monotonic() - start:.0f} s)")
    print(
        f"  at most {longest.seconds:.1f} s (--only {longest.number})"
        f" and {largest.memory >> 20} MiB (--only {largest.number})",
        flush=True,
    )
    for fault, found in sorted(faults.items(), key=lambda item: -len(item[1])):
        some = " ".join(str(outcome.number) for outcome in found[:5])
        print(
            f"  FAULT {len(found)} x {fault}; --reader {name} --seed {seed} --only {some}",
            flush=True,
        )
    return faults


if __name__ == "__main__":
    main()
