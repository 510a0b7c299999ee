"""Time and memory of adapted layers and blocks: ``python -m tests.performance.layer``.

Within a round every method runs on the same frozen weights, in an order drawn anew; an overhead is
the median over the rounds of the ratio to the frozen module, minus one, with half the distance of
the quartiles. ``forward`` is without gradients, ``training`` forward and backward of a random
gradient, to the input too, as in the middle of a network; ``memory`` is that of ``training``.
``weight`` is the dense update of a single layer, and merging it and back.

Dtypes: ``fp32``; ``bf16-autocast``, a bf16 base under autocast, as the trainer runs it; ``bf16``, a
bf16 base and fp32 adapter without autocast. The bounds are explained in ``cost.py``.

With ``--compile`` all modules are compiled, the frozen one too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from tests.performance.cost import Peak, least_seconds, measure_peak, operations_of, uses
from tests.performance.measuring import (
    Run,
    add_measuring_options,
    interleaved,
    machine,
    peak_bytes,
    prepare,
    ratios,
    saved_bytes,
    spread,
    table,
    write_json,
)
from tests.performance.peers import (
    LYCORIS_ABSENT,
    METHODS,
    Sizes,
    adapted,
    adapted_paths,
    shared_copy,
)
from tests.performance.shapes import BLOCKS, LAYERS, TARGETS, Layer, Shape, make_shape

#: dtype of the base, and whether autocast to bf16 is on.
DTYPES = {
    "fp32": (torch.float32, False),
    "bf16-autocast": (torch.bfloat16, True),
    "bf16": (torch.bfloat16, False),
}
MEASURES = ("forward", "training", "memory", "weight")
FROZEN = "frozen"


@dataclass
class Row:
    """One shape, dtype and measure; overheads in % of the frozen module, by method."""

    shape: str
    dtype: str
    measure: str
    rounds: int
    frozen_ms: float
    frozen_operations: int
    overhead: dict[str, float]
    spread: dict[str, float]
    ours_over_lora: float | None
    ours_over_gralora: float | None
    least_operations: float
    least_passes: float


@dataclass
class MemoryRow:
    """MiB of forward and backward beyond the frozen module's, by method."""

    shape: str
    dtype: str
    peak: dict[str, float]
    saved: dict[str, float]
    ours_over_lora: float | None


class Calls:
    """Calls of a frozen module and its adapted copies, with or without a backward pass."""

    def __init__(
        self, shape: Shape, modules: dict[str, nn.Module], autocast: bool, backward: bool
    ) -> None:
        self.modules, self.backward = modules, backward
        self.first = shape.inputs[0].detach().requires_grad_(backward)
        self.inputs = (self.first, *shape.inputs[1:])
        self.device, self.autocast = self.first.device, autocast
        self.gradients = [torch.randn_like(output) for output in self.forward(shape.module)]
        self.call = self._train if backward else self.forward
        self.runs: dict[str, Run] = {
            name: partial(self.call, module) for name, module in modules.items()
        }

    def forward(self, module: nn.Module) -> list[Tensor]:
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)
        with torch.set_grad_enabled(self.backward), autocast:
            result = module(*self.inputs)
        return [result] if isinstance(result, Tensor) else list(result)

    def _train(self, module: nn.Module) -> None:
        torch.autograd.backward(self.forward(module), self.gradients)
        self.first.grad = None
        module.zero_grad()

    def saved_mib(self, module: nn.Module) -> float:
        known = [*module.parameters(), self.first]
        return saved_bytes(lambda: self.forward(module), known) / 2**20


def measure_time(
    shape: Shape, calls: Calls, dtype: str, peak: Peak, args: argparse.Namespace
) -> Row:
    runs = calls.runs
    times = interleaved(runs, calls.device, args.rounds, args.seconds)
    over = {name: ratios(times[name], times[FROZEN]) for name in runs if name != FROZEN}
    overhead = {name: 100 * (median(values) - 1) for name, values in over.items()}
    paths = adapted_paths(shape.module, TARGETS)
    layers = uses(shape.module, paths, lambda: calls.forward(shape.module))
    itemsize = 4 if dtype == "fp32" else 2
    operations, passes = least_seconds(layers, args.rank, peak, itemsize, calls.backward)
    frozen = median(times[FROZEN])
    return Row(
        shape.name,
        dtype,
        "training" if calls.backward else "forward",
        len(times[FROZEN]),
        1e3 * frozen,
        operations_of(partial(calls.call, shape.module)),
        overhead,
        {name: 100 * spread(values) for name, values in over.items()},
        _over(overhead, "peft-lora"),
        _over(overhead, "peft-gralora"),
        100 * operations / frozen,
        100 * passes / frozen,
    )


def measure_memory(shape: Shape, calls: Calls, dtype: str) -> MemoryRow:
    peaks, saved = {}, {}
    for name, module in calls.modules.items():
        calls.runs[name]()  # what is made once and kept does not count
        peaks[name] = peak_bytes(calls.runs[name], calls.device) / 2**20
        saved[name] = calls.saved_mib(module)
    extra = {name: value - peaks[FROZEN] for name, value in peaks.items() if name != FROZEN}
    extra_saved = {name: saved[name] - saved[FROZEN] for name in extra}
    return MemoryRow(shape.name, dtype, extra, extra_saved, _over(extra, "peft-lora"))


def _over(extra: dict[str, float], peer: str) -> float | None:
    return extra["ours"] / extra[peer] if "ours" in extra and extra.get(peer) else None


WEIGHT_METHODS = ("peft-lora", "peft-gralora", "ours")


@dataclass
class WeightRow:
    """Milliseconds by method, and the ratio of ours to PEFT's GraLoRA."""

    shape: str
    dtype: str
    measure: str
    ms: dict[str, float]
    ours_over_gralora: float | None


def measure_weight(
    shape: Shape, modules: dict[str, nn.Module], dtype: str, args: argparse.Namespace
) -> list[WeightRow]:
    """``delta_weight``, and merging followed by unmerging, of a layer alone.

    The weights are copies for each method: merging writes to them.
    """
    layers: dict[str, Any] = {}
    for name in WEIGHT_METHODS:
        if name in modules:
            layers[name] = modules[name].get_submodule("layer")
            base = layers[name].get_base_layer()
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)

    def both(layer: Any) -> None:
        layer.merge()
        layer.unmerge()

    measures: dict[str, Callable[[Any], Any]] = {
        "delta_weight": lambda layer: layer.get_delta_weight("default"),
        "merge + unmerge": both,
    }
    rows, device = [], torch.device(args.device)
    for measure, call in measures.items():
        runs = {name: lambda layer=layer, call=call: call(layer) for name, layer in layers.items()}
        with torch.no_grad():
            times = interleaved(runs, device, args.rounds, args.seconds)
        over = None
        if "ours" in times and "peft-gralora" in times:
            over = median(ratios(times["ours"], times["peft-gralora"]))
        ms = {name: 1e3 * median(values) for name, values in times.items()}
        rows.append(WeightRow(shape.name, dtype, measure, ms, over))
    return rows


def make_modules(shape: Shape, args: argparse.Namespace) -> dict[str, nn.Module]:
    sizes = Sizes(args.rank, args.gralora_k, args.hybrid_rank)
    targets = adapted_paths(shape.module, TARGETS)
    modules = {FROZEN: shared_copy(shape.module)}  # what may be compiled is not what is asked
    for method in args.methods:
        modules[method] = adapted(shape.module, method, targets, sizes)
    if args.compile:
        torch.compiler.reset()
        config: Any = torch._dynamo.config
        config.recompile_limit = 64  # all of them are of one class, which they count for
        for module in modules.values():
            module.compile()
    counts = {
        name: sum(p.numel() for p in module.parameters() if p.requires_grad)
        for name, module in modules.items()
    }
    line = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    print(f"{shape.name}: parameters: {line}", file=sys.stderr)
    return modules


def time_table(rows: list[Row], methods: list[str], markdown: bool) -> str:
    head = ["shape", "dtype", "measure", "frozen ms", *methods]
    head += ["ours/LoRA", "ours/GraLoRA", "operations", "passes"]
    lines = []
    for row in rows:
        line = [row.shape, row.dtype, row.measure, f"{row.frozen_ms:.2f}"]
        line += [f"{row.overhead[m]:.1f} ± {row.spread[m]:.1f}" for m in methods]
        line += [_ratio(row.ours_over_lora), _ratio(row.ours_over_gralora)]
        lines.append([*line, f"{row.least_operations:.1f}", f"{row.least_passes:.1f}"])
    return table(head, lines, markdown)


def memory_table(rows: list[MemoryRow], methods: list[str], markdown: bool) -> str:
    lines = [
        [row.shape, row.dtype]
        + [f"{row.peak[m]:.2f} / {row.saved[m]:.2f}" for m in methods]
        + [_ratio(row.ours_over_lora)]
        for row in rows
    ]
    return table(["shape", "dtype", *methods, "ours/LoRA"], lines, markdown)


def weight_table(rows: list[WeightRow], markdown: bool) -> str:
    methods = list(rows[0].ms)
    lines = [
        [row.shape, row.dtype, row.measure]
        + [f"{row.ms[m]:.3f}" for m in methods]
        + [_ratio(row.ours_over_gralora)]
        for row in rows
    ]
    return table(["shape", "dtype", "measure", *methods, "ours/GraLoRA"], lines, markdown)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=[*BLOCKS, *LAYERS],
        metavar="NAME@TOKENS",
        help="blocks and linear layers (OUTxIN); 'blocks' and 'layers' are all that are listed",
    )
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), choices=MEASURES)
    parser.add_argument("--rank", type=int, default=32, help="of LoRA; parameters are equal")
    parser.add_argument("--gralora_k", type=int, default=2)
    parser.add_argument("--hybrid_rank", type=int, default=0, help="plain part of --rank")
    parser.add_argument(
        "--compile", action="store_true", help="with torch.compile, the frozen module too"
    )
    add_measuring_options(parser, rounds=21, seconds=30)
    return parser


def expand(shapes: list[str]) -> list[str]:
    groups = {"blocks": BLOCKS, "layers": LAYERS}
    return [name for shape in shapes for name in groups.get(shape, (shape,))]


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    device = prepare(args)
    if any(name.startswith("lycoris") for name in args.methods):
        try:
            import lycoris  # noqa: F401
        except ImportError:
            print(LYCORIS_ABSENT)
            args.methods = [name for name in args.methods if not name.startswith("lycoris")]
    where = machine(device, "diffusers", "peft", "lycoris-lora")
    print(where)
    sizes = f"rank {args.rank}, k {args.gralora_k}, hybrid rank {args.hybrid_rank}"
    rows: list[Row] = []
    memory_rows: list[MemoryRow] = []
    weight_rows: list[WeightRow] = []
    peaks = {}
    for dtype in args.dtypes:
        base_dtype, autocast = DTYPES[dtype]
        peak = peaks[dtype] = measure_peak(device, base_dtype)
        print(
            f"{dtype}: {peak.operations / 1e9:.0f} G operations/s in a large product, "
            f"{peak.bytes / 1e9:.1f} GB/s in a copy"
        )
        for name in expand(args.shapes):
            shape = make_shape(name, device, base_dtype)
            modules = make_modules(shape, args)
            for backward in (False, True):
                calls = Calls(shape, modules, autocast, backward)
                if ("training" if backward else "forward") in args.measures:
                    row = measure_time(shape, calls, dtype, peak, args)
                    print(time_table([row], args.methods, False), file=sys.stderr)
                    rows.append(row)
                if backward and "memory" in args.measures:
                    memory_rows.append(measure_memory(shape, calls, dtype))
            if "weight" in args.measures and isinstance(shape.module, Layer) and not autocast:
                weight_rows += measure_weight(shape, modules, dtype, args)
    if rows:
        print(f"\nOverhead in %, {sizes}; bounds in % of the frozen module")
        print(time_table(rows, args.methods, args.markdown))
    if memory_rows:
        print("\nMemory of training beyond the frozen module's, MiB: peak / saved for backward")
        print(memory_table(memory_rows, args.methods, args.markdown))
    if weight_rows:
        print(f"\nMilliseconds, {sizes}")
        print(weight_table(weight_rows, args.markdown))
    results = {
        "peaks": {name: asdict(peak) for name, peak in peaks.items()},
        "time": [asdict(row) for row in rows],
        "memory": [asdict(row) for row in memory_rows],
        "weight": [asdict(row) for row in weight_rows],
    }
    write_json(args, where, results)


if __name__ == "__main__":
    main()
