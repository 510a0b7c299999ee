"""Time and memory of a fused export: ``python -m tests.performance.export [--gigabytes 4]``.

A base in bf16 whose every matrix is adapted, in the widths of FLUX.1. In each round: ``cp`` of the
base, the matrix products alone (every block of every update, added to zeros in the cache), and the
export. Printed are medians, and the median of the ratios within a round, which a busy machine moves
less. Peak memory is that of the process beyond pages of files (RssAnon of /proc/self/status).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from gralora_diffusion.export.adapter_layers import LayerUpdate
from gralora_diffusion.export.rounding import Rounding
from gralora_diffusion.export.streaming import _BLOCK, OutputTensor, Piece, write_streamed
from gralora_diffusion.io.tensor_files import read_header
from tests.performance.measuring import anonymous_mib, machine, write_json

#: (out, in) of the layers of a block of FLUX.1: one of two streams and two single ones.
SHAPES = [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360)]


def make_base(path: Path, gigabytes: float) -> None:
    torch.manual_seed(0)
    tensors, size = {}, 0
    while size < gigabytes * 1e9:
        shape = SHAPES[len(tensors) % len(SHAPES)]
        tensors[f"blocks.{len(tensors)}.weight"] = torch.empty(shape, dtype=torch.bfloat16).normal_(
            std=0.02
        )
        size += 2 * shape[0] * shape[1]
    save_file(tensors, path)


def updates(path: Path, rank: int, k: int) -> dict[str, LayerUpdate]:
    """Updates of |dW| / |W| = 0.02 or so."""
    made = {}
    for key, tensor in read_header(path)[0].items():
        out_features, in_features = tensor.shape
        A = torch.randn(k, in_features // k, rank) / in_features**0.5
        B = torch.randn(k, rank, out_features // k)
        made[key] = LayerUpdate(A, B, None, 0.02 * 0.02 * (in_features * k / rank) ** 0.5)
    return made


def export(base: Path, output: Path, made: dict[str, LayerUpdate]) -> float:
    start = time.perf_counter()
    outputs = [
        OutputTensor(
            key, t.shape, t.dtype, (Piece(t, 0, t.shape[0], update=lambda key=key: made[key]),)
        )
        for key, t in read_header(base)[0].items()
    ]
    losses = write_streamed(output, outputs, {}, Rounding(), progress=False)
    seconds = time.perf_counter() - start
    total = sum(losses.values(), start=type(next(iter(losses.values())))())
    print(f"  |dW|/|W| {total.ratio:.3f}, lost by rounding {total.error:.1%}", file=sys.stderr)
    return seconds


def products(made: dict[str, LayerUpdate]) -> float:
    def one(update: LayerUpdate) -> None:
        rows, columns = update.shape
        block = torch.zeros(max(1, _BLOCK // columns), columns)
        for start in range(0, rows, len(block)):
            update.add_to(block[: rows - start], start)

    threads = torch.get_num_threads()
    start = time.perf_counter()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as p:
        list(p.map(one, made.values()))
    seconds = time.perf_counter() - start
    torch.set_num_threads(threads)
    return seconds


def copy(base: Path, output: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", base, output], check=True)
    return time.perf_counter() - start


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--gralora_k", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the files are made")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there too")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        base = Path(name) / "base.safetensors"
        # made by another process, so that it does not count in this one's memory
        code = f"from {__spec__.name} import *; make_base(Path({str(base)!r}), {args.gigabytes})"
        subprocess.run([sys.executable, "-c", code], check=True)
        made = updates(base, args.rank, args.gralora_k)
        before, peak, done = anonymous_mib(), [0.0], threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                peak[0] = max(peak[0], anonymous_mib())

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        rows = []
        for number in range(args.rounds):
            output = Path(name) / f"{number}.safetensors"
            row = [copy(base, output)]
            output.unlink()
            row.append(products(made))
            used = time.process_time()
            row.append(export(base, output, made))
            row.append(time.process_time() - used)
            output.unlink()
            rows.append(row)
            print("  " + "  ".join(f"{seconds:6.2f}" for seconds in row), file=sys.stderr)
        done.set()
        watcher.join()
    cp, matrix, whole, used = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(e / (2 * c + p) for c, p, e, _ in rows)
    where = machine(torch.device("cpu"))
    print(where)
    print(f"{len(made)} matrices, {args.gigabytes} GB bf16, rank {args.rank}, k {args.gralora_k}")
    print(f"cp {cp:.2f} s, products {matrix:.2f} s, export {whole:.2f} s (medians)")
    print(f"the export's seconds of processor, over all cores: {used:.2f}")
    print(f"export / (2 cp + products) {ratio:.2f} (median of ratios; the goal is at most 1)")
    print(f"anonymous memory: {before:.0f} MiB before, {peak[0]:.0f} MiB at the peak")
    results = {
        "cp, s": cp,
        "products, s": matrix,
        "export, s": whole,
        "processor, s": used,
        "export / (2 cp + products)": ratio,
        "memory at the peak, MiB": peak[0],
    }
    write_json(args, where, results)


if __name__ == "__main__":
    main()
