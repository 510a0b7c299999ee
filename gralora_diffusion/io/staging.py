"""Outputs that appear under their name once they are complete, and never replace an input."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .cleanup_on_exit import cleanup_on_exit
from .file_names import PIPELINE_INDEX, real_path
from .json_files import read_object


class OutputError(ValueError):
    """The output cannot be written to this place."""


Source = str | os.PathLike[str]


def check_output(
    output: Path,
    overwrite: bool,
    sources: Iterable[Source | None],
    cache_dir: Source | None = None,
) -> None:
    """Raise OutputError if the output exists already, or if writing it would change an input.

    Args:
        overwrite: an existing output may be replaced.
        sources, cache_dir: as for :func:`find_overlap`.
    """
    if output.parent.exists() and not output.parent.is_dir():
        raise OutputError(f"--output {output}: {output.parent} is a file, not a folder")
    if problem := unwritable(output.parent):
        raise OutputError(f"--output {output} cannot be written ({problem})")
    if source := find_overlap(output, sources, cache_dir):
        raise OutputError(
            f"--output {output} overlaps {source}, which is read. Choose another --output"
        )
    if output.exists() and not overwrite:
        raise OutputError(
            f"--output {output} exists already. Choose another --output, or pass --overwrite"
        )
    if output.is_dir():
        _check_folder(output)


def unwritable(folder: Path) -> str | None:
    """Return why no file can be created in a folder, which may not exist yet, or None."""
    place = next((p for p in (folder, *folder.absolute().parents) if p.exists()), Path.cwd())
    try:
        # by creating one: permissions alone do not say it of every file system, nor for root
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return str(error.strerror)


def find_overlap(
    output: Path, sources: Iterable[Source | None], cache_dir: Source | None = None
) -> Path | None:
    """Return the source that would change if the output were replaced or written into.

    It is a source that equals or contains the output, or one of its files that the output equals or
    contains. Links are followed.

    Args:
        sources: input files, folders and Hub ids. None and what does not exist are ignored. Of a
            Hub id, the source is its folder in the Hub's cache, from which it is read.
        cache_dir: another place of that cache.
    """
    for path in (path for source in sources if source for path in places_of(source, cache_dir)):
        if lies_in(output, path):
            return path
        if output.exists():
            for file in _files(path):
                if lies_in(file, output):
                    return file
    return None


def places_of(source: Source, cache_dir: Source | None = None) -> list[Path]:
    """Return the local path of a source; of a Hub id, its folders in the Hub's cache."""
    path = Path(source).expanduser()
    if path.exists():
        return [path]
    if path.is_absolute() or not isinstance(source, str):
        return []
    from huggingface_hub import constants  # only now, because it takes a while
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    repository = "/".join(source.split("/")[:2])  # without its folder, which an adapter may name
    try:
        name = repo_folder_name(repo_id=repository, repo_type="model")
    except HFValidationError:  # such as an address
        return []
    caches = {Path(cache).expanduser() for cache in (constants.HF_HUB_CACHE, cache_dir) if cache}
    return [cache / name for cache in sorted(caches) if (cache / name).is_dir()]


def lies_in(path: Path, place: Path) -> bool:
    """Whether a path, which need not exist, is this file or folder, or lies in this folder.

    Links are followed, and two names of one file are the same place.
    """
    here = _identity(place)
    # a link lies both in its own folder and in the folder of its target
    names = (real_path(path), real_path(path.parent))
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
    """Yield the source itself and all files in it, also in linked folders, each folder once."""
    yield source
    seen = {_identity(source)}
    for folder, folders, files in os.walk(source, followlinks=True):
        yield from (Path(folder, name) for name in files)
        inside = {name: _identity(Path(folder, name)) for name in folders}
        folders[:] = [name for name, identity in inside.items() if identity not in seen]
        seen.update(inside.values())


def _check_folder(output: Path) -> None:
    """Raise OutputError unless the folder contains a pipeline and nothing else."""
    index = output / PIPELINE_INDEX
    try:
        parts = {index.name, "README.md", *read_object(index)}
    except (OSError, ValueError) as error:
        raise OutputError(
            f"--output {output} is a folder without a pipeline, so it is not replaced. Choose "
            "another --output"
        ) from error
    if others := sorted(entry.name for entry in output.iterdir() if entry.name not in parts):
        raise OutputError(
            f"--output {output}: the folder also contains {', '.join(others[:3])}, which would be "
            "lost. Choose another --output"
        )


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield a path with the same name in a folder beside ``output``, and move it there at the end.

    If anything fails before that, nothing is left behind and an existing output is unchanged.
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
            raise OutputError(f"--output {output} cannot be written ({error.strerror})") from error
        yield made
        if output.is_dir():  # a folder cannot be replaced in one step
            os.replace(output, replaced)
        os.replace(made, output)
