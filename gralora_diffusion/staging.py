"""Outputs that appear under their name only when they are whole and were found right."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .unfinished import tidied


class OutputError(ValueError):
    """A place that nothing can be written to."""


def check_output(output: Path, overwrite: bool, sources: list[Path]) -> None:
    """Raise OutputError if the output exists already, or is or lies in what is read.

    Args:
        overwrite: what exists may be replaced.
        sources: files and folders that are read.
    """
    if output.parent.exists() and not output.parent.is_dir():
        raise OutputError(f"--output {output}: {output.parent} is a file, no folder")
    resolved = output.resolve()
    for source in sources:
        inside = source.is_dir() and source.resolve() in (resolved, *resolved.parents)
        if inside or resolved == source.resolve():
            raise OutputError(f"--output {output}: that is {source}, which is read. Give another")
    if output.exists() and not overwrite:
        raise OutputError(f"--output {output}: it exists already. Give another, or --overwrite")
    if output.is_dir():
        _check_folder(output)


def _check_folder(output: Path) -> None:
    """Raise OutputError unless the folder is a pipeline and nothing else."""
    index = output / "model_index.json"
    if not index.is_file():
        raise OutputError(f"--output {output}: a folder, but no pipeline that may be replaced")
    parts = {index.name, "README.md", *json.loads(index.read_text(encoding="utf-8"))}
    if others := sorted(entry.name for entry in output.iterdir() if entry.name not in parts):
        raise OutputError(
            f"--output {output}: the folder also holds {', '.join(others[:3])}, which would be "
            "lost. Give another"
        )


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Give a path of the same name in a folder beside ``output``, and move it there in the end.

    Whatever goes wrong before, nothing is left behind and what was there is as it was.
    """
    folder = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
    made, replaced = folder / output.name, folder / f".{output.name}"

    def tidy() -> None:
        if replaced.exists() and not output.exists():
            os.replace(replaced, output)
        shutil.rmtree(folder, ignore_errors=True)

    with tidied(tidy):
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise OutputError(
                f"--output {output}: cannot be written to ({error.strerror})"
            ) from error
        yield made
        if output.is_dir():  # a folder cannot be replaced in one go
            os.replace(output, replaced)
        os.replace(made, output)
