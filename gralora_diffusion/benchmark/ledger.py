"""Which trials there are, and which are done, according to the files in a run's folder."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from gralora_diffusion.benchmark.evaluation.results import (
    RESULT_NAME,
    TRIALS_FOLDER,
    Failure,
    ResultFileError,
    TrialKey,
    TrialResult,
    Unreadable,
    read_result,
    write_result,
)
from gralora_diffusion.io.json_files import read_object
from gralora_diffusion.io.tensor_files import replacing

from .methods import Method
from .settings import BenchmarkSettings
from .tasks import Task

logger = logging.getLogger(__name__)

FAILURE_NAME = "failed.json"
#: Folders of a trial's files: its images, and its adapter.
IMAGES, ADAPTER = "pictures", "adapter"
#: Folder in a trial's folder for what is not complete yet.
_WORK_NAME = ".work"
#: What an ended attempt may have left, also one of version 0.1, which had claims on trials.
_LEFT_BEHIND = ("claim.json*", ".claim.json*", f"{_WORK_NAME}*")

Learned = TypeVar("Learned")


class Trial(NamedTuple):
    """A method, a task and a seed, which are trained, sampled and evaluated once."""

    task: Task
    method: Method
    seed: int

    @property
    def key(self) -> TrialKey:
        return TrialKey(self.task.protocol, self.task.subject, self.method.name, self.seed)


def in_order(
    settings: BenchmarkSettings, learned: Iterable[Learned]
) -> list[tuple[Learned, Method, int]]:
    """Return everything that is learned with every method and seed, in order of execution.

    Whenever a run is stopped, the numbers of trials per method differ by at most one.
    """
    things, methods = list(learned), settings.parsed_methods
    return [
        (thing, method, seed)
        for seed in settings.seeds or ()
        for thing in things
        for method in methods
    ]


class Ledger:
    """Which trials are done, according to the files in a run's folder."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self._reported: set[Path] = set()
        #: Result files that were read -> time and size, which show whether they have changed.
        self._good: dict[Path, tuple[int, int]] = {}

    def folder(self, trial: Trial) -> Path:
        return self.output / trial.key.path

    def left(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the trials that have no readable result and have not failed."""
        return [trial for trial in trials if not self._is_over(trial)]

    @contextmanager
    def work(self, trial: Trial) -> Iterator[Path]:
        """Yield an empty folder for the files of a trial, which is deleted afterwards.

        What other attempts left is deleted first.
        """
        folder = self.folder(trial)
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in _LEFT_BEHIND:
            for left in folder.glob(pattern):
                _delete(left)
        work = folder / _WORK_NAME
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def finish(self, trial: Trial, result: TrialResult, work: Path) -> None:
        """Move images and adapter from ``work`` to the trial's folder, and write the result last.

        Raises:
            ResultFileError: as ``write_result``.
            OSError: the disk is full, or gone. The trial is not done.
        """
        folder = self.folder(trial)
        for name in (IMAGES, ADAPTER):
            shutil.rmtree(folder / name, ignore_errors=True)  # left by another attempt
            if (work / name).exists():
                os.replace(work / name, folder / name)
        write_result(result, folder)
        (folder / FAILURE_NAME).unlink(missing_ok=True)

    def fail(self, trial: Trial, failure: Failure) -> None:
        """Save why a trial failed; it is not repeated until the user asks for it."""
        folder = self.folder(trial)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / FAILURE_NAME) as temporary:
            temporary.write_text(json.dumps(failure._asdict(), indent=1), encoding="utf-8")

    def failures(self) -> list[Unreadable]:
        """Return which trials failed, and why."""
        return [
            Unreadable(path, f"the trial failed: {_why(path)}")
            for path in sorted((self.output / TRIALS_FOLDER).glob(f"*/*/*/*/{FAILURE_NAME}"))
        ]

    def forget_failures(self, trials: Sequence[Trial]) -> None:
        """Delete the failures of these trials, so that they are repeated."""
        for trial in trials:
            (self.folder(trial) / FAILURE_NAME).unlink(missing_ok=True)

    def _is_over(self, trial: Trial) -> bool:
        folder = self.folder(trial)
        return self._has_result(trial, folder / RESULT_NAME) or (folder / FAILURE_NAME).exists()

    def _has_result(self, trial: Trial, path: Path) -> bool:
        try:
            facts = path.stat()
        except OSError:
            return False
        same = facts.st_mtime_ns, facts.st_size
        if self._good.get(path) == same:
            return True
        try:
            if (key := read_result(path).key) != trial.key:
                raise ResultFileError(f"{path}: belongs to another trial ({key}) than its folder")
        except ResultFileError as error:
            if path not in self._reported:
                logger.warning("%s. The trial is repeated", error)
                self._reported.add(path)
            return False
        self._good[path] = same
        return True


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _why(path: Path) -> str:
    """Return the error in the file of a failed trial."""
    try:
        return str(read_object(path)["error"])
    except (OSError, ValueError, KeyError):
        return "the reason is not known, because the file cannot be read"
