"""Kernels and Python calls of an adapted layer: ``python -m tests.performance.calls``.

Where layers are small, their time is that of calls. For each method this counts what one layer adds
to the frozen one, in a forward and a backward pass:

    kernels     operations that compute or copy, at torch's dispatcher; views and allocations are
                not among them. What an operation calls inside its kernel does not count. On CUDA,
                the profiler's kernels are what is counted.
    views       the other operations at the dispatcher
    calls       calls of Python functions, and of C functions by Python, as ``sys.setprofile`` sees
                them. Those in a backward pass are of autograd functions written in Python.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tests.performance.layer import DTYPES, FROZEN, Calls, make_modules
from tests.performance.measuring import (
    Run,
    add_measuring_options,
    machine,
    prepare,
    print_results,
)
from tests.performance.shapes import make_shape

METHODS = ("peft-lora", "peft-gralora", "ours")
PASSES = ("forward", "backward")


class _Operations(TorchDispatchMode):
    """Counts operations below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.views = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _only_names_memory(func):
            self.views += 1
        else:
            self.kernels[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _only_names_memory(func: Any) -> bool:
    """Whether an operation is a view or an allocation."""
    returns = [result.alias_info for result in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in returns)
    name = func._schema.name.partition("::")[2]
    return is_view or name == "_unsafe_view" or "empty" in name


def _python_calls(run: Run) -> int:
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count - 2  # the call of ``run``, and of ``setprofile``


def _cuda_kernels(run: Run, device: torch.device) -> int:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize(device)
    events: Any = profiler.events()
    cuda = torch.autograd.DeviceType.CUDA
    return sum(e.device_type == cuda and not e.name.startswith("Mem") for e in events)


@dataclass
class Count:
    kernels: int
    views: int
    calls: int

    def __sub__(self, other: Count) -> Count:
        return Count(
            self.kernels - other.kernels, self.views - other.views, self.calls - other.calls
        )


def count(calls: Calls, module: nn.Module) -> tuple[dict[str, Count], Counter[str]]:
    """Count the passes of a module, by name, and the operations of both by name."""
    output: list[torch.Tensor] = []

    def forward() -> None:
        output[:] = calls.forward(module)

    def backward() -> None:
        torch.autograd.backward(output, calls.gradients)

    runs: dict[str, Callable[[], None]] = dict(zip(PASSES, (forward, backward), strict=True))

    def in_turn(measure: Callable[[Run], Any]) -> dict[str, Any]:
        found = {name: measure(run) for name, run in runs.items()}
        calls.first.grad = None
        module.zero_grad()
        return found

    def operations(run: Run) -> _Operations:
        with _Operations() as mode:
            run()
        return mode

    for _ in range(3):
        in_turn(lambda run: run())
    python, seen = in_turn(_python_calls), in_turn(operations)
    kernels = {name: seen[name].kernels.total() for name in PASSES}
    if calls.device.type == "cuda":
        kernels = in_turn(lambda run: _cuda_kernels(run, calls.device))
    counts = {name: Count(kernels[name], seen[name].views, python[name]) for name in PASSES}
    return counts, seen["forward"].kernels + seen["backward"].kernels


def measure(
    name: str, dtype: str, args: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    base_dtype, autocast = DTYPES[dtype]
    shape = make_shape(name, device, base_dtype)
    modules = make_modules(shape, args)
    calls = Calls(shape, modules, autocast, True)
    frozen, _ = count(calls, modules[FROZEN])
    rows = []
    for method in (FROZEN, *args.methods):
        counted, names = count(calls, modules[method])
        more = {
            key: value if method == FROZEN else value - frozen[key]
            for key, value in counted.items()
        }
        row = {"shape": name, "dtype": dtype, "method": method}
        rows.append(
            {**row, **{key: asdict(value) for key, value in more.items()}, "names": dict(names)}
        )
    return rows


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["128x128@128", "640x640@1024"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16-autocast"], choices=[*DTYPES])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--gralora_k", type=int, default=2)
    parser.add_argument("--hybrid_rank", type=int, default=0)
    parser.add_argument("--names", action="store_true", help="print the operations, too")
    parser.set_defaults(compile=False)  # for the modules of layer.py; nothing counts compiled ones
    add_measuring_options(parser, rounds=1, seconds=0)
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    device = prepare(args)
    # in this thread, where Python's profiler sees it
    torch.autograd.set_multithreading_enabled(False)
    where = machine(device, "peft")
    results = [
        row
        for dtype in args.dtypes
        for name in args.shapes
        for row in measure(name, dtype, args, device)
    ]
    head = ["shape", "dtype", "method"]
    head += [f"{what}, {name}" for what in ("kernels", "views", "calls") for name in PASSES]
    lines = [
        [row["shape"], row["dtype"], row["method"]]
        + [f"{row[name][what]:g}" for what in ("kernels", "views", "calls") for name in PASSES]
        for row in results
    ]
    print_results(args, where, head, lines, results)
    if args.names:
        for row in results:
            found = ", ".join(f"{name} {count}" for name, count in sorted(row["names"].items()))
            print(f"{row['shape']} {row['dtype']} {row['method']}: {found}")


if __name__ == "__main__":
    main()
