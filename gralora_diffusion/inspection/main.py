"""The command ``gralora inspect``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ..tensor_files import AdapterFileError
from . import inspect_file
from .text import as_text


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    result = argparse.ArgumentParser(
        prog="gralora inspect",
        description="Say what a file or folder is: an adapter of this or another program, a "
        "checkpoint, a pipeline. Exit code 1 if a value is NaN or infinite, 2 if it is none of "
        "these.",
    )
    result.add_argument("path", metavar="FILE", help="file or folder")
    result.add_argument("--json", action="store_true", help="print the same facts as JSON")
    result.add_argument("--all_layers", action="store_true", help="list every layer's update")
    result.add_argument(
        "--check",
        action="store_true",
        help="read all tensors of a checkpoint too, and look for NaN and infinity",
    )
    result.add_argument("--sha256", action="store_true", help="hash the file")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    command = parser()
    options = command.parse_args(argv)
    try:
        inspection = inspect_file(options.path, check=options.check, sha256=options.sha256)
    except AdapterFileError as error:
        command.exit(2, f"{command.prog}: error: {error}\n")
    if options.json:
        print(json.dumps(inspection.to_dict(), indent=2))
    else:
        print(as_text(inspection, options.all_layers))
    if inspection.non_finite:
        sys.exit(1)
