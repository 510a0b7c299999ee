"""The studio's folder: where runs, images, comparisons, exports and benchmarks lie."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

#: Characters of a name that a user gives, at most.
_MOST = 80


@dataclass(frozen=True)
class Workspace:
    """A folder with everything that the studio makes. All of it is ordinary files."""

    folder: Path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def comparisons(self) -> Path:
        return self.folder / "comparisons"

    @property
    def kept(self) -> Path:
        """Images of comparisons that the user wants to keep."""
        return self.folder / "kept"

    @property
    def loras(self) -> Path:
        """LoRA files of other programs that were added to be compared."""
        return self.folder / "loras"

    @property
    def exports(self) -> Path:
        return self.folder / "exports"

    @property
    def benchmarks(self) -> Path:
        return self.folder / "benchmarks"

    @property
    def state(self) -> Path:
        """The studio's own files: its lock and its jobs."""
        return self.folder / ".studio"

    @property
    def jobs(self) -> Path:
        return self.state / "jobs"

    @property
    def uploads(self) -> Path:
        """What a page has uploaded, while the studio runs."""
        return self.state / "uploads"

    @property
    def own_folders(self) -> tuple[Path, ...]:
        """The folders in which the studio deletes and starts what it finds."""
        return self.state, self.jobs, self.uploads


def file_name(text: str, otherwise: str) -> str:
    """Return a text as the name of a file or folder: letters, digits, ``-``, ``_`` and ``.``.

    Args:
        otherwise: the name if nothing is left of the text.
    """
    name = re.sub(r"[^\w.-]+", "-", text.strip())[:_MOST].strip("-.")
    return name or otherwise


def free_path(folder: Path, name: str) -> Path:
    """Return ``folder/name``, or the first of ``name-2``, ``name-3``, ... that does not exist."""
    stem, suffix = Path(name).stem, Path(name).suffix
    path, number = folder / name, 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}{suffix}"
    return path


def stamp() -> str:
    """Return the time as part of a file's name, in order of time."""
    return time.strftime("%Y%m%d-%H%M%S")
