"""The command ``gralora control``: talks to a training that runs elsewhere."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from gralora_diffusion.io.durations import duration
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.process import print_safely
from gralora_diffusion.io.safe_text import for_terminal_line, json_for_terminal
from gralora_diffusion.options.command_parser import CommandParser, finite
from gralora_diffusion.training.runtime.control import REQUESTS, RunStatus, read_status, request

#: Seconds between looks for the answer.
_LOOK_SECONDS = 0.1


def parser() -> CommandParser:
    """Return the command's parser."""
    requests = "; ".join(f"{name}: {text}" for name, text in REQUESTS.items())
    result = CommandParser(
        prog="gralora control",
        description="Save, sample or stop a training that runs in another terminal or on another "
        "machine, and see how far it is. The exit code is 0 if the request was answered, or is "
        "still waiting for the step to end; 1 if the run ended before it answered; and 2 if no run "
        "is there.",
    )
    result.add_argument("folder", metavar="OUTPUT_DIR", type=Path, help="--output_dir of the run")
    result.add_argument(
        "request",
        metavar="REQUEST",
        choices=[*REQUESTS, "status"],
        help=f"{requests}; status: see how far it is",
    )
    result.add_argument(
        "--wait",
        type=finite,
        default=60.0,
        metavar="SECONDS",
        help="how long to wait for the answer (default: 60)",
    )
    result.add_argument("--json", action="store_true", help="print the status as JSON")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    command = parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[0:1] and words[0] in (*REQUESTS, "status") and not Path(words[0]).exists():
        command.error(f"the folder comes first: {command.prog} OUTPUT_DIR {words[0]}")
    options = command.parse_args(words, check=_problems)
    folder, what = options.folder, options.request
    code = 0
    try:
        if what != "status":
            before = _number_of(read_status(folder), what)
            request(folder, what)
            code, text = _wait(folder, what, before, options.wait)
            if not options.json:
                print_safely(text, error=code > 0)
        status = read_status(folder)
    except ConfigError as error:
        command.fail(error.problems)
    if options.json:
        print(json_for_terminal(status.to_dict(), indent=2))
    elif what == "status":
        print_safely(as_text(status))
    if code:
        sys.exit(code)


def _problems(options: argparse.Namespace) -> Iterator[str]:
    if options.wait < 0:
        yield f"--wait is {options.wait}; it must be at least 0"


def _wait(folder: Path, what: str, before: int, patience: float) -> tuple[int, str]:
    """Wait for the answer; return an exit code and what to say."""
    deadline = time.monotonic() + patience
    while True:
        status = read_status(folder)
        if _number_of(status, what) > before:
            answer = status.answers[what]
            return 0, f"step {answer['step']}: {for_terminal_line(answer['text'])}"
        if status.state in ("finished", "stopped", "ended"):
            has_ended = what == "stop" and status.state != "ended"
            return int(not has_ended), f"the run {status.state} before it saw the request"
        if time.monotonic() >= deadline:
            when = "when the steps have begun" if status.state == "preparing" else "after its step"
            return 0, f"requested; the run answers {when}"
        time.sleep(_LOOK_SECONDS)


def _number_of(status: RunStatus, what: str) -> int:
    return int(status.answers.get(what, {"number": 0})["number"])


def as_text(status: RunStatus) -> str:
    """Return a status as lines for people."""
    rows = [("state", status.state + (f", {status.owner}" if status.owner else ""))]
    if status.alive is None:
        rows.append(("", "whether it is alive is unknown, because the folder has no locks"))
    if status.step is not None:
        rows.append(("step", f"{status.step:,} of {status.steps:,}"))
    if status.loss is not None:
        rows.append(("loss", f"{status.loss:.4f}"))
    if status.seconds_left is not None and status.state == "training":
        rows.append(("left", duration(status.seconds_left)))
    if status.updated is not None:
        rows.append(("updated", f"{duration(max(0.0, time.time() - status.updated))} ago"))
    if status.pending:
        rows.append(("pending", ", ".join(status.pending)))
    for what, answer in status.answers.items():
        rows.append((what, f"step {answer['step']}: {for_terminal_line(answer['text'])}"))
    return "\n".join(f"{name:<9}{text}" for name, text in rows)
