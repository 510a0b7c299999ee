"""Whether a machine of a cluster can run trials: it has the same versions, and the local files."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gralora_diffusion.options.fields import Place, options_with

from .settings import BenchmarkSettings
from .versions import versions

#: A file's path within its folder, and its size in bytes.
Listing = tuple[tuple[str, int], ...]
#: Options whose images are compared by their contents when a trial begins.
_IMAGES = ("dreambooth_dir", "captioned_dir")


@dataclass(frozen=True)
class Requirements:
    """What every machine must have.

    Attributes:
        versions: as ``versions`` returns them.
        places: option, absolute path and its files; no files for a folder of images.
    """

    versions: dict[str, str]
    places: tuple[tuple[str, str, Listing | None], ...]


def requirements(settings: BenchmarkSettings) -> Requirements:
    """Return what this machine has and the others must have, too.

    Args:
        settings: with absolute paths. What is no file or folder here is a Hub id.
    """
    found = []
    for name, path in _places(settings):
        if path and os.path.isabs(path) and os.path.exists(path):
            found.append((name, path, None if name[2:] in _IMAGES else _listing(Path(path))))
    return Requirements(versions(), tuple(found))


def node_name() -> str:
    """Return the name of this machine."""
    return socket.gethostname()


def node_problems(wanted: Requirements) -> list[str]:
    """Return why this machine cannot run trials, if it cannot."""
    here = versions()
    problems = [
        f"{name} is {here.get(name)}, but {version} where the benchmark was started, so that its "
        "trials would not be comparable. Install the same version"
        for name, version in wanted.versions.items()
        if here.get(name) != version
    ]
    for option, path, listing in wanted.places:
        if not os.path.exists(path):
            problems.append(
                f"{option}: there is no {path!r}. Copy it there, mount it under the same path, or "
                "give a Hub id"
            )
        elif listing is not None and _listing(Path(path)) != listing:
            problems.append(
                f"{option}: the files in {path!r} differ from those where the benchmark was "
                "started, by their names or sizes. Copy them again"
            )
    return problems


def _places(settings: BenchmarkSettings) -> Iterator[tuple[str, str | None]]:
    for options in (settings, settings.training):
        for name, place in options_with(type(options), Place).items():
            if place.read and not place.written:
                value = getattr(options, name)
                for path in value if isinstance(value, list) else [value]:
                    yield f"--{name}", path
    for name, source in settings.encoder_sources.items():
        yield f"--encoders {name}", source


def _listing(path: Path) -> Listing:
    """Return a file, or the files of a folder without the hidden ones."""
    if path.is_file():
        return (("", path.stat().st_size),)
    found = []
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            file = Path(folder, name)
            if not name.startswith(".") and file.is_file():
                found.append((file.relative_to(path).as_posix(), file.stat().st_size))
    return tuple(sorted(found))
