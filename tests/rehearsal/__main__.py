"""The command: ``python -m tests.rehearsal [--parts NAME ...] [--set OPTION=VALUE ...]``.

Without ``--parts``, all parts run; a name may end with ``*``. ``--set`` changes options of the
trainer. The exit code is 1 if a part fails.

Two other things run on the pretended GPU: ordinary tests, ``python -m tests.rehearsal -- tests/io``
and other arguments of pytest, and the GPU day, ``python -m tests.rehearsal --day`` and its options.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
from typing import Any

from tests.rehearsal import guard


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.rehearsal",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", default=["*"], metavar="NAME")
    parser.add_argument("--set", nargs="+", default=[], metavar="OPTION=VALUE")
    parser.add_argument("--list", action="store_true", help="print the names of the parts")
    return parser


def main(arguments: list[str] | None = None) -> int:
    line = sys.argv[1:] if arguments is None else arguments
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # the pretended GPU is one thread's
    guard.load()
    if line[:1] == ["--day"]:
        return _gpu_day(line[1:])
    if "--" in line:
        return _pytest(line[line.index("--") + 1 :])
    args = build_parser().parse_args(line)
    changes = dict(_parsed(text) for text in args.set)

    import gc
    import logging
    import warnings

    import torch

    from tests.rehearsal.parts import all_parts, rehearse

    torch.set_num_threads(1)
    gc.set_threshold(20_000, 20, 20)  # as in the tests
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    known = list(all_parts())
    unknown = [name for name in args.parts if not fnmatch.filter(known, name)]
    if unknown:
        raise SystemExit(f"no part {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [name for name in known if any(fnmatch.fnmatch(name, p) for p in args.parts)]
    if args.list:
        print("\n".join(chosen))
        return 0
    failed, began = 0, time.process_time()
    for outcome in rehearse(chosen, changes):
        seconds, began = time.process_time() - began, time.process_time()
        print(f"{'FAILED' if outcome.problems else 'passed'} {outcome.name} {seconds:.1f} s")
        for problem in outcome.problems:
            print(f"  {problem}")
        sys.stdout.flush()
        failed += bool(outcome.problems)
    return 1 if failed else 0


def _parsed(text: str) -> tuple[str, Any]:
    """Parse ``option=value``; true, false and none are Python's."""
    name, _, value = text.partition("=")
    return name, {"true": True, "false": False, "none": None}.get(value.lower(), value)


def _gpu_day(arguments: list[str]) -> int:
    # Before the GPU is pretended, because libraries look for its driver when they are imported.
    from tests.performance import attach, export, gpu, layer, real_step  # noqa: F401
    from tests.rehearsal.device import pretended_gpu

    with pretended_gpu():
        return gpu.main(["--quick", "--pytest", "tests.rehearsal --", *arguments])


def _pytest(arguments: list[str]) -> int:
    import pytest

    from tests.rehearsal.device import pretended_gpu

    class Plugin:
        @pytest.hookimpl(wrapper=True, tryfirst=True)
        def pytest_runtest_protocol(self) -> Any:
            with pretended_gpu():
                return (yield)

    return int(pytest.main(["-p", "no:cacheprovider", *arguments], [Plugin()]))


if __name__ == "__main__":
    sys.exit(main())
