"""Outputs that appear under their name only when they are whole and were found right."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp


class OutputError(ValueError):
    """A place that nothing can be written to."""


def check_output(output: Path, overwrite: bool, sources: list[Path]) -> None:
    """Raise OutputError if the output exists already, or is or lies in what is read.

    Args:
        overwrite: what exists may be replaced.
        sources: files and folders that are read.
    """
    resolved = output.resolve()
    for source in sources:
        inside = source.is_dir() and source.resolve() in (resolved, *resolved.parents)
        if inside or resolved == source.resolve():
            raise OutputError(f"--output {output}: that is {source}, which is read. Give another")
    if output.exists() and not overwrite:
        raise OutputError(f"--output {output}: it exists already. Give another, or --overwrite")
    if overwrite and output.is_dir() and not (output / "model_index.json").is_file():
        raise OutputError(f"--output {output}: a folder, but no pipeline that may be replaced")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Give a path of the same name in a folder beside ``output``, and move it there in the end.

    Whatever goes wrong before, nothing is left behind and what was there is as it was.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    made, replaced = folder / output.name, folder / f".{output.name}"
    try:
        yield made
        if output.is_dir():  # a folder cannot be replaced in one go
            os.replace(output, replaced)
        os.replace(made, output)
    finally:
        if replaced.exists() and not output.exists():
            os.replace(replaced, output)
        shutil.rmtree(folder, ignore_errors=True)
