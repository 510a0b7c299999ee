"""All that a GPU is needed for, in one command: ``python -m tests.performance.gpu``.

Each part writes its numbers to a file in ``--folder``; a part whose file is there is not run again,
so that the same command goes on after an interruption. ``--parts`` chooses parts, ``--again`` runs
them anew. No part is begun after ``--minutes``; the same command runs the rest. After each part,
``gpu.json`` has everything so far, there and beside the documents, whose tables between markers are
written from it.

``--quick`` runs all of it on small shapes, to try the command itself. It says so in its tables, and
writes them only to a copy of the documents, given with ``--docs``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import ROOT

# What needs torch is imported where it is used, so that --help is quick and prints nothing else.

COMMAND = "python -m tests.performance.gpu"
#: In ``--folder``, and beside the documents with its tables.
RESULTS_NAME = "gpu.json"


@dataclass(frozen=True)
class Part:
    """A part of the day.

    Attributes:
        run: writes the results to a file, with the command's options.
        rows: results -> head and rows of its table in the documents.
    """

    run: Callable[[Path, argparse.Namespace], None]
    rows: Callable[[Any], tuple[list[str], list[list[str]]]]


def _layers(*options: str, quick: Sequence[str]) -> Callable[[Path, argparse.Namespace], None]:
    def run(file: Path, args: argparse.Namespace) -> None:
        import torch

        from tests.performance import layer

        chosen = [*quick, "--rounds", "1", "--seconds", "0"] if args.quick else list(options)
        methods = ["--methods", "peft-lora", "peft-gralora", "ours"]
        if args.quick:  # it also runs where nothing can be compiled
            dynamo: Any = torch._dynamo.config
            dynamo.suppress_errors = True
        layer.main([*chosen, *methods, "--device", "cuda", "--json", str(file)])

    return run


_QUICK_BLOCK = ("--shapes", "sd15-320@16", "--rank", "4", "--dtypes", "bf16-autocast")
_QUICK_LAYER = ("--shapes", "64x32@16", "--rank", "4", "--dtypes", "bf16-autocast", "bf16")


def _attach(file: Path, args: argparse.Namespace) -> None:
    from tests.performance import attach

    options = ["--heads", "192"]
    if args.quick:
        options = ["--double_blocks", "1", "--single_blocks", "1", "--rounds", "1", "--seconds"]
        options += ["0", "--rank", "4"]
    attach.main([*options, "--device", "cuda", "--json", str(file)])


def _export(file: Path, args: argparse.Namespace) -> None:
    from tests.performance import export

    size = ["--gigabytes", "0.02", "--rounds", "1"] if args.quick else []
    export.main([*size, "--json", str(file)])


def _steps(*bases: str, more: Sequence[str] = ()) -> Callable[[Path, argparse.Namespace], None]:
    def run(file: Path, args: argparse.Namespace) -> None:
        from tests.performance import real_step

        options = ["--bases", *bases, *more, "--device", "cuda", "--json", str(file)]
        real_step.main([*options, *(["--quick"] if args.quick else [])])

    return run


def _pytest(*arguments: str) -> Callable[[Path, argparse.Namespace], None]:
    def run(file: Path, args: argparse.Namespace) -> None:
        import torch

        from tests.performance.measuring import machine

        chosen = ["tests/io/test_precision.py", "-q"] if args.quick else [*arguments, "-q"]
        done = subprocess.run(
            [sys.executable, "-m", *args.pytest.split(), *chosen],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-500:]]
        if done.returncode not in (0, 1):  # 0 and 1: all tests ran, and passed or not
            raise RuntimeError(f"pytest ended with {done.returncode}: {lines[-1]}")
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        results = {"code": done.returncode, "summary": lines[-1], "failed": failed}
        where = machine(torch.device("cuda"), "diffusers", "peft")
        file.write_text(json.dumps({"machine": where, "results": results}), encoding="utf-8")

    return run


def _time_rows(results: Any) -> tuple[list[str], list[list[str]]]:
    head = ["out x in or block @ tokens", "dtype", "measure", "frozen, ms", "PEFT LoRA, %"]
    head += ["PEFT GraLoRA, %", "ours, %", "ours / LoRA", "ours / GraLoRA"]
    rows = []
    for row in results["time"]:
        line = [row["shape"], row["dtype"], row["measure"], f"{row['frozen_ms']:.3g}"]
        for name in ("peft-lora", "peft-gralora", "ours"):
            line.append(f"{row['overhead'][name]:.1f} ± {row['spread'][name]:.1f}")
        rows.append([*line, _ratio(row["ours_over_lora"]), _ratio(row["ours_over_gralora"])])
    return head, rows


def _memory_rows(results: Any) -> tuple[list[str], list[list[str]]]:
    head = ["block @ tokens", "dtype", "PEFT LoRA", "PEFT GraLoRA", "ours", "ours / LoRA"]
    rows = [
        [row["shape"], row["dtype"]]
        + [f"{row['peak'][name]:.1f}" for name in ("peft-lora", "peft-gralora", "ours")]
        + [_ratio(row["ours_over_lora"])]
        for row in results["memory"]
    ]
    return head, rows


def _step_rows(results: Any) -> tuple[list[str], list[list[str]]]:
    head = ["base", "way", "step, ms", "peak, GiB", "plan, GiB", "peak / plan"]
    rows = []
    for row in results:
        if "error" in row:
            failure = _cell(f"failed: {row['error'][:60]}")
            rows.append([row["base"], row["way"], failure, "", "", ""])
            continue
        line = [row["base"], row["way"], f"{row['ms']:.0f} ± {row['spread_ms']:.0f}"]
        line += [f"{row['peak_gib']:.2f}", f"{row['plan_gib']:.2f}"]
        rows.append([*line, f"{row['peak_gib'] / row['plan_gib']:.2f}"])
    return head, rows


def _attach_rows(results: Any) -> tuple[list[str], list[list[str]]]:
    head = ["layers", "GraLoRA, ms", "LoRA, ms", "ratio"]
    rows = [
        [
            f"{row['layers']}, {row['preset']}",
            *(f"{row['ms']:.0f}", f"{row['lora_ms']:.0f}"),
            f"{row['ratio']:.2f} ± {row['spread']:.2f}",
        ]
        for row in results
    ]
    return head, rows


def _export_rows(results: Any) -> tuple[list[str], list[list[str]]]:
    return ["", "value"], [[name, f"{value:.3g}"] for name, value in results.items()]


def _test_rows(results: Any) -> tuple[list[str], list[list[str]]]:
    verdict = "passed" if results["code"] == 0 else "failed"
    return ["verdict", "summary"], [
        [verdict, _cell(results["summary"])],
        *(["", _cell(line)] for line in results["failed"]),
    ]


def _cell(text: str) -> str:
    """A program's text, for Markdown."""
    return f"`{text.replace('`', chr(39)).replace('|', '/')}`"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


_MEASURES = ("--dtypes", "bf16-autocast", "fp32", "--seconds", "4", "--rounds", "11", "--measures")
#: In the order in which they run: the most wanted numbers first.
PARTS: dict[str, Part] = {
    "steps": Part(_steps("sd15", "sdxl", "sd35-medium", "flux2-klein", "flux"), _step_rows),
    "gpu-tests": Part(_pytest("-m", "gpu", "tests"), _test_rows),
    "blocks": Part(
        _layers(
            "--shapes",
            "blocks",
            *_MEASURES,
            "training",
            quick=(*_QUICK_BLOCK, "--measures", "training"),
        ),
        _time_rows,
    ),
    "layers": Part(
        _layers(
            "--shapes",
            "layers",
            *_MEASURES,
            "forward",
            "training",
            quick=(*_QUICK_LAYER, "--measures", "forward", "training"),
        ),
        _time_rows,
    ),
    "memory": Part(
        _layers(
            "--shapes",
            "blocks",
            *_MEASURES,
            "memory",
            quick=(*_QUICK_BLOCK, "--measures", "memory"),
        ),
        _memory_rows,
    ),
    "compile": Part(
        _layers(
            "--shapes",
            "sd15-640@1024",
            "sdxl-1280@1024",
            "flux-double@1024",
            "--compile",
            *_MEASURES,
            "training",
            quick=(*_QUICK_BLOCK, "--measures", "training", "--compile"),
        ),
        _time_rows,
    ),
    "checkpointing": Part(_steps("sdxl", "flux", more=["--ways", "checkpointing"]), _step_rows),
    "quantized": Part(
        _steps("sdxl", "flux", more=["--ways", "bnb-4bit", "bnb-8bit", "torchao-int8"]), _step_rows
    ),
    "streaming": Part(_steps("flux", more=["--ways", "streamed"]), _step_rows),
    "attach": Part(_attach, _attach_rows),
    "export": Part(_export, _export_rows),
    "suite": Part(_pytest("-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"), _test_rows),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        default=list(PARTS),
        choices=list(PARTS),
        metavar="PART",
        help=f"some of {', '.join(PARTS)} (default: all)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=25,
        help="after which no part is begun (default: %(default)s)",
    )
    parser.add_argument("--again", action="store_true", help="run parts that are done, too")
    parser.add_argument("--quick", action="store_true", help="small shapes, to try the command")
    parser.add_argument("--folder", type=Path, help="(default: gpu_day, or gpu_day_quick)")
    parser.add_argument("--docs", type=Path, help="folder of the documents (default: docs)")
    parser.add_argument(
        "--pytest",
        default="pytest",
        metavar="MODULE",
        help="module that runs tests (default: pytest)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"{COMMAND} needs a CUDA device, and torch finds none here")
    folder = args.folder or Path("gpu_day_quick" if args.quick else "gpu_day")
    folder.mkdir(parents=True, exist_ok=True)
    docs = args.docs or (None if args.quick else ROOT / "docs")
    if args.quick and docs is not None and docs.resolve() == ROOT / "docs":
        parser.error("--quick measures nothing for the documents: give a copy of them with --docs")
    for name, result in _results(folder).items():
        if result["quick"] != args.quick:
            other = "with" if result["quick"] else "without"
            parser.error(f"{folder} has {name}, which ran {other} --quick: choose another --folder")
    began, failed, late = time.perf_counter(), [], []
    for name in args.parts:
        file = folder / f"{name}.json"
        if file.exists() and not args.again:
            print(f"{name}: done before")
            continue
        if time.perf_counter() - began > 60 * args.minutes:
            late.append(name)
            continue
        print(f"{name} ...", flush=True)
        start, part = time.perf_counter(), folder / f"{name}.part"
        try:
            PARTS[name].run(part, args)
        except (Exception, SystemExit) as error:  # the other parts are still wanted
            failed.append(name)
            print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        seconds = time.perf_counter() - start
        result = json.loads(part.read_text(encoding="utf-8"))
        result |= {"quick": args.quick, "seconds": seconds}
        part.write_text(json.dumps(result, indent=1), encoding="utf-8")
        part.replace(file)
        print(f"{name}: {seconds:.0f} s", flush=True)
        _write_down(folder, docs)
    results = _write_down(folder, docs)
    missing = [name for name in PARTS if name not in results]
    measured = sum(result["seconds"] for result in results.values()) / 60
    print(f"{folder / RESULTS_NAME}; not measured: {', '.join(missing) or 'nothing'}")
    print(f"measuring all of this took {measured:.1f} minutes")
    if late:
        print(f"--minutes {args.minutes:g} have passed; run again for {', '.join(late)}")
    return 1 if failed or late else 0


def _results(folder: Path) -> dict[str, Any]:
    """The results of each part that is done."""
    return {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name in PARTS
        if (file := folder / f"{name}.json").exists()
    }


def _write_down(folder: Path, docs: Path | None) -> dict[str, Any]:
    """Write all results to ``folder``, and to the documents with their tables; return them."""
    from gralora_diffusion.io.tensor_files import replacing

    results = _results(folder)
    for place in (folder, docs):
        if place is not None:
            with replacing(place / RESULTS_NAME) as temporary:
                temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if docs is not None:
        write_tables(docs / "performance.md", results)
    return results


# -- tables in the documents -----------------------------------------------------------------------


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """Return marker -> Markdown of each part's table, and of what no machine has run yet."""
    from tests.performance import unseen
    from tests.performance.measuring import table

    made = {}
    for name, part in PARTS.items():
        if name not in results:
            made[name] = f"Not measured yet: `{COMMAND} --parts {name}`"
            continue
        head, rows = part.rows(results[name]["results"])
        where = results[name]["machine"]
        if results[name]["quick"]:
            where = f"Not a measurement, only a trial of the command on small shapes; {where}"
        made[name] = f"{where}:\n\n{table(head, rows, markdown=True)}"
    made["unseen"] = unseen.as_table(results)
    return made


def write_tables(document: Path, results: Mapping[str, Any]) -> None:
    """Write each table between its markers, ``<!-- gpu:NAME -->`` and ``<!-- /gpu:NAME -->``.

    Raises:
        ValueError: a marker is missing.
    """
    from gralora_diffusion.io.tensor_files import replacing

    text = document.read_text(encoding="utf-8")
    for name, made in tables(results).items():
        start, end = f"<!-- gpu:{name} -->", f"<!-- /gpu:{name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{document} has no {start} ... {end}")
        text = f"{before}{start}\n\n{made}\n\n{end}{after}"
    with replacing(document) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
