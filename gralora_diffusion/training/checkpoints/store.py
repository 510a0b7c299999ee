"""Checkpoints that are complete or not there; only the newest few are kept.

A checkpoint is the folder ``checkpoint-<step>``. It is written under another name and renamed when
it is complete, and an old one is renamed before it is deleted. A folder of that name is therefore
always complete, however the process ended.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from gralora_diffusion.io.errors import CheckpointError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = ".unfinished-"


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: output folder of the run.
        limit: how many to keep; None keeps all.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int | None = None) -> None:
        self.folder = Path(folder)
        self.limit = limit

    def list(self) -> list[tuple[int, Path]]:
        """Return (step, path) of the complete checkpoints, oldest first."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        matches = [(_NAME.fullmatch(path.name), path) for path in found if path.is_dir()]
        return sorted((int(match[1]), path) for match, path in matches if match)

    def find(self, wanted: str) -> tuple[int, Path] | None:
        """Return (step, path) of ``latest``, or of a checkpoint by path or name.

        Returns None for ``latest`` if there is none yet.

        Raises:
            CheckpointError: the named one does not exist. The error lists those that do.
        """
        whole = self.list()
        if wanted == "latest":
            return whole[-1] if whole else None
        for path in (Path(wanted), self.folder / wanted):
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                return int(match[1]), path
        there = ", ".join(path.name for _, path in whole) or "none"
        raise CheckpointError(
            f"--resume_from_checkpoint is {wanted}, but there is no such checkpoint. Checkpoints "
            f"in {self.folder}: {there}. Give one of them, or latest."
        )

    def write(self, step: int, save: Callable[[Path], None]) -> Path:
        """Write the checkpoint of ``step`` by ``save(folder)``, then delete those over the limit.

        One process does this for all. A checkpoint of the same step is replaced.

        Raises:
            CheckpointError: it could not be written (disk full, ...). Nothing of it is left behind
                and the earlier checkpoints are unchanged.
        """
        final = self.folder / f"checkpoint-{step}"
        unfinished = self.folder / f"{_UNFINISHED}{final.name}"
        try:
            self.clean()
            unfinished.mkdir(parents=True)
            save(unfinished)
            for path in unfinished.rglob("*"):
                if path.is_file():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
            if final.exists():
                self.delete(final)
            unfinished.rename(final)
            whole = self.list()
            for _, path in whole[: -self.limit] if self.limit else ():
                self.delete(path)
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch raises a RuntimeError for a full disk, safetensors its own error
            free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
            shutil.rmtree(unfinished, ignore_errors=True)
            kept = ", ".join(path.name for _, path in self.list()) or "none"
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {error} "
                f"({free / 2**20:.1f} MiB were free). The earlier checkpoints are untouched: "
                f"{kept}. Free some space and resume with --resume_from_checkpoint latest."
            ) from error
        return final

    def clean(self) -> None:
        """Delete unfinished checkpoints of killed processes."""
        for path in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)

    def delete_all(self) -> None:
        for _, path in self.list():
            self.delete(path)

    def delete(self, path: Path) -> None:
        condemned = path.with_name(f"{_UNFINISHED}deleted-{path.name}")
        shutil.rmtree(condemned, ignore_errors=True)
        path.rename(condemned)
        shutil.rmtree(condemned, ignore_errors=True)
