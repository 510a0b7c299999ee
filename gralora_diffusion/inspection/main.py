"""The command ``gralora inspect``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gralora_diffusion.base_models.optional_libraries import leave_out_unused
from gralora_diffusion.io.process import print_safely
from gralora_diffusion.io.safe_text import json_for_terminal
from gralora_diffusion.options.command_parser import CommandParser
from gralora_diffusion.options.path_names import path_problem

from . import inspect_file
from .text import as_text


def parser() -> CommandParser:
    """Return the command's parser."""
    result = CommandParser(
        prog="gralora inspect",
        description="Report what a file or folder is: an adapter of this or another program, a "
        "checkpoint, or a pipeline. The exit code is 1 if a value is NaN or infinite, if a layer "
        "is damaged, or if its scaling cannot be determined. It is 2 if the file is none of these. "
        "If you pass several files, all are inspected, and the exit code is the highest.",
    )
    result.add_argument("paths", metavar="FILE", nargs="+", help="files or folders")
    result.add_argument(
        "--json",
        action="store_true",
        help="print the same facts as JSON, as a list for several files",
    )
    result.add_argument("--all_layers", action="store_true", help="list every layer's update")
    result.add_argument(
        "--check",
        action="store_true",
        help="also read all tensors of a checkpoint, and look for NaN and infinity",
    )
    result.add_argument("--sha256", action="store_true", help="hash the file")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    command = parser()
    options = command.parse_args(argv)
    leave_out_unused([])
    code, facts = 0, []
    for number, path in enumerate(options.paths):
        try:
            if problem := path_problem(path):
                raise OSError(f"{path!r:.80} {problem}")
            inspection = inspect_file(path, check=options.check, sha256=options.sha256)
        except (OSError, ValueError) as error:
            print_safely(f"{command.prog}: error: {error}", error=True)
            code = 2
            continue
        if inspection.non_finite or any(layer.problem for layer in inspection.layers):
            code = max(code, 1)
        if options.json:
            facts.append(inspection.to_dict())
        else:
            print("\n" * (number > 0) + as_text(inspection, options.all_layers))
    if facts:
        print(json_for_terminal(facts if len(options.paths) > 1 else facts[0], indent=2))
    if code:
        sys.exit(code)
