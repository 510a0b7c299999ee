"""Outputs that appear under their name when they are whole, and replace nothing that is read."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .cleanup_on_exit import cleanup_on_exit
from .json_files import read_object


class OutputError(ValueError):
    """A place that nothing can be written to."""


Source = str | os.PathLike[str]


def check_output(output: Path, overwrite: bool, sources: Iterable[Source | None]) -> None:
    """Raise OutputError if the output exists already, or if writing it would change what is read.

    Args:
        overwrite: what exists may be replaced.
        sources: files and folders that are read; those that are not here, such as Hub ids, and
            None are passed over.
    """
    if output.parent.exists() and not output.parent.is_dir():
        raise OutputError(f"--output {output}: {output.parent} is a file, no folder")
    if source := find_overlap(output, sources):
        raise OutputError(f"--output {output}: that is {source}, which is read. Give another")
    if output.exists() and not overwrite:
        raise OutputError(f"--output {output}: it exists already. Give another, or --overwrite")
    if output.is_dir():
        _check_folder(output)


def find_overlap(output: Path, sources: Iterable[Source | None]) -> Path | None:
    """Return what would be lost of the sources if the output were replaced, or written into.

    That is a source which the output is, contains or lies in, or a file of a source folder, through
    whatever links it is reached.
    """
    for source in sources:
        path = Path(source).expanduser() if source else None
        if path is None or not path.exists():
            continue
        if lies_in(output, path):
            return path
        if output.exists():
            for file in _files(path):
                if lies_in(file, output):
                    return file
    return None


def lies_in(path: Path, place: Path) -> bool:
    """Return whether a path, which need not exist, is a file or folder or lies in that folder.

    Links are followed, and two names of one file are the same place.
    """
    here = _identity(place)
    # a link lies both where it is and where it leads
    names = (path.resolve(), path.parent.resolve())
    return here is not None and any(
        _identity(place) == here for name in names for place in (name, *name.parents)
    )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def _files(source: Path) -> Iterator[Path]:
    """The source itself and all files in it; linked folders too, each folder once."""
    yield source
    seen = {_identity(source)}
    for folder, folders, files in os.walk(source, followlinks=True):
        yield from (Path(folder, name) for name in files)
        inside = {name: _identity(Path(folder, name)) for name in folders}
        folders[:] = [name for name, identity in inside.items() if identity not in seen]
        seen.update(inside.values())


def _check_folder(output: Path) -> None:
    """Raise OutputError unless the folder is a pipeline and nothing else."""
    index = output / "model_index.json"
    try:
        parts = {index.name, "README.md", *read_object(index)}
    except (OSError, ValueError) as error:
        raise OutputError(
            f"--output {output}: a folder, but no pipeline that may be replaced"
        ) from error
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

    with cleanup_on_exit(tidy):
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
