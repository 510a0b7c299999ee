"""The runs in a folder, as their own files describe them, whoever started them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.file_names import WEIGHTS_NAME
from gralora_diffusion.io.regular_files import is_regular, read_regular
from gralora_diffusion.io.yaml_files import compose
from gralora_diffusion.training.checkpoints.store import CheckpointStore
from gralora_diffusion.training.outputs.metrics import METRICS_NAME, read_metrics
from gralora_diffusion.training.outputs.published import VALIDATION_NAME
from gralora_diffusion.training.runtime.control import RunStatus, read_status, request
from gralora_diffusion.training.runtime.folder_lock import BENCHMARK_NAME, CONFIG_NAME

from .jobs import Job, gralora

#: States of a status after which the process ends.
_ENDED = ("finished", "stopped", "ended")
#: States of a job that was stopped itself: a run that has begun is asked to stop, and ends its job.
_STOPPED = ("stopped", "cancelled")
#: Options with the prompts of its validation images.
_PROMPTS = ("validation_prompt", "validation_prompts_file")
#: Name in a job's folder of the options that its run was started with.
JOB_CONFIG = "config.yaml"
#: Levels of folders below the studio's folder in which runs are found.
_DEPTH = 3
#: Of a file of options, in bytes.
_MOST_BYTES = 1 << 20
#: Items of a list of options that are shown.
_MOST_ITEMS = 100
#: Larger steps are no number of a run: a float does not have them.
_MOST_STEPS = 1 << 53


@dataclass(frozen=True)
class Run:
    """A folder with the output of a training.

    Attributes:
        name: its path in the studio's folder.
        job: the last command of the studio that wrote to it, if there is one.
    """

    folder: Path
    name: str
    job: Job | None = None

    @property
    def state(self) -> str:
        """One of waiting, running, finished, failed, stopped and interrupted."""
        status, of_job = self.status, self.job.state if self.job else None
        if of_job == "waiting":
            return "waiting"
        # on a file system without locks, only the status says so
        alive = status is not None and status.alive is not False and status.state not in _ENDED
        if alive or of_job == "running":
            return "running"
        if of_job == "failed":
            return "failed"
        if status is not None and status.state in ("finished", "stopped"):
            return status.state
        if of_job in _STOPPED:
            return "stopped"
        return "finished" if self.adapter is not None else "interrupted"

    @property
    def status(self) -> RunStatus | None:
        """What the run says about itself; None if it has not begun."""
        with suppress(ConfigError):
            return read_status(self.folder)
        return None

    @property
    def config(self) -> Path:
        """The file of its options: in the folder of its job until it has one of its own."""
        own = self.folder / CONFIG_NAME
        return self.job.folder / JOB_CONFIG if self.job and not own.exists() else own

    @property
    def options(self) -> dict[str, str | list[str]]:
        """The options that it was started with, as they are written; defaults are left out."""
        path = self.config
        with suppress(OSError):
            status = path.stat()
            return dict(_options(path, status.st_mtime_ns, status.st_size))
        return {}

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The numbers of its steps so far."""
        path = self.folder / METRICS_NAME
        with suppress(OSError):
            status = path.stat()
            return _rows(path, status.st_mtime_ns, status.st_size)
        return ()

    @property
    def steps(self) -> int | None:
        """How many steps it is to take, if it or its options say so."""
        status, steps = self.status, self.options.get("max_train_steps")
        if status is not None and status.steps is not None:
            return status.steps
        if isinstance(steps, str) and steps.isascii() and steps.isdecimal() and len(steps) < 16:
            return int(steps)
        return None

    @property
    def adapter(self) -> Path | None:
        """The finished adapter."""
        path = self.folder / WEIGHTS_NAME
        return path if path.is_file() else None

    @property
    def checkpoints(self) -> list[int]:
        """The steps at which there are checkpoints to resume from."""
        return [step for step, _ in CheckpointStore(self.folder).list()]

    @property
    def validations(self) -> list[tuple[int, list[Path]]]:
        """(step, images) of its validations, the first step first."""
        found = []
        for folder in sorted((self.folder / VALIDATION_NAME).glob("step-*")):
            step = folder.name.removeprefix("step-")
            images = sorted(folder.glob("[0-9]*-[0-9]*.png"))
            if step.isdecimal() and images:
                found.append((int(step), images))
        return found

    def ask(self, what: str) -> None:
        """Ask the run for one of ``training.runtime.control.REQUESTS``; return at once.

        Raises:
            ConfigError: the run cannot be asked, because it is not alive or has not begun, or has
                nothing to sample.
        """
        status = self.status
        if status is not None and status.alive is not False:
            options = self.options
            if what == "sample" and options and not any(options.get(name) for name in _PROMPTS):
                text = "the run has no validation_prompt, so it cannot sample"
                raise ConfigError([f"{text}. Duplicate it and fill one in"])
            request(self.folder, what)
        elif what == "stop" and self.job is not None and self.job.state in ("waiting", "running"):
            self.job.stop()  # it does not own its folder yet
        else:
            state = self.state
            if state == "running":
                text = f"the run cannot {what} yet: it is loading. Ask again after its first step"
                raise ConfigError([text])
            raise ConfigError([f"the run is {state}, so it cannot {what} now"])

    def resume_command(self, steps: str = "") -> tuple[str, ...]:
        """Return the arguments of Python that continue the run from its last checkpoint.

        Args:
            steps: how many it has in all, as a user writes it; "" for as many as it has now.

        Raises:
            ConfigError: there is no checkpoint, or no step is left.
        """
        if not self.checkpoints:
            text = "the run has no checkpoint to resume from. Duplicate it to start again"
            raise ConfigError([text])
        line = ["--config", str(self.folder / CONFIG_NAME), f"--output_dir={self.folder}"]
        last, of = max(self.checkpoints), self.steps
        if self.state == "finished" and (rows := self.rows):
            last = max(last, rows[-1]["step"])  # the last steps need no checkpoint
        if steps.strip():
            of = int(steps) if steps.strip().isdecimal() and len(steps) < 16 else None
            if of is None:
                raise ConfigError([f"the steps in all are {steps!r:.40}; give a whole number"])
            line.append(f"--max_train_steps={of}")
        if of is not None and of <= last:
            raise ConfigError([f"the run has {last} steps already. Give more steps in all"])
        return gralora("train", *line, "--resume_from_checkpoint=latest")


@lru_cache(maxsize=64)
def _rows(path: Path, changed: int, size: int) -> tuple[Mapping[str, Any], ...]:
    del changed, size  # another content
    return tuple(row for row in read_metrics(path) if 0 <= row["step"] < _MOST_STEPS)


@lru_cache(maxsize=256)
def _options(path: Path, changed: int, size: int) -> Mapping[str, str | list[str]]:
    """Return the plain values of a file of options, and lists of them; others are left out.

    Nothing is constructed from them: a run of another version, or of somebody else, may have any
    tag, and an alias may stand for more than fits into memory.
    """
    del changed, size  # another content
    try:
        text = read_regular(path, _MOST_BYTES).decode()
        root = compose(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    found: dict[str, str | list[str]] = {}
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if not isinstance(key, yaml.ScalarNode) or value.tag == "tag:yaml.org,2002:null":
            continue
        if isinstance(value, yaml.ScalarNode):
            found[key.value] = value.value
        elif isinstance(value, yaml.SequenceNode):
            parts = value.value[:_MOST_ITEMS]
            found[key.value] = [p.value for p in parts if isinstance(p, yaml.ScalarNode)]
    return found


def find_runs(folder: Path, jobs: Sequence[Job]) -> list[Run]:
    """Return the runs below a folder, and those that wait for their turn; the newest first.

    Args:
        jobs: those of the studio, the oldest first.
    """
    by_output = {job.output: job for job in jobs if job.kind == "train" and job.output}
    found = {path: by_output.get(path) for path in _run_folders(folder)}
    for path, job in by_output.items():
        if path not in found and (_has_run(path) or _has_no_folder_yet(job)):
            found[path] = job
    names = {path: _name(path, folder) for path in found}
    newest = sorted(found, key=lambda path: (_age(path, found[path]), names[path]), reverse=True)
    return [Run(path, names[path], found[path]) for path in newest]


def _has_no_folder_yet(job: Job) -> bool:
    """Whether a job tells of a run without a folder; if not, somebody has deleted it."""
    return job.state != "done" and (job.own or job.state != "cancelled")


def _has_run(folder: Path) -> bool:
    return any(is_regular(folder / name) for name in (CONFIG_NAME, METRICS_NAME))


def _run_folders(folder: Path) -> list[Path]:
    """Return the folders that a training has written to. Links are not followed."""
    found = []
    for here, folders, files in os.walk(folder):
        path = Path(here)
        if CONFIG_NAME in files or METRICS_NAME in files:
            found.append(path)
        deep = len(path.relative_to(folder).parts) >= _DEPTH
        if deep or path in found or BENCHMARK_NAME in files:
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]
    return found


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _age(path: Path, job: Job | None) -> float:
    """Return the time of a run's beginning: of its options' file, or of its job."""
    for file in (path / CONFIG_NAME, path / METRICS_NAME, *((job.folder,) if job else ())):
        with suppress(OSError):
            return file.stat().st_mtime
    return 0.0


def differing_options(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return option -> its value in each run, for options that are not the same in all of them.

    None stands for the default.
    """
    options = [run.options for run in runs]
    names = sorted({name for given in options for name in given})
    values = {name: [given.get(name) for given in options] for name in names}
    return {name: found for name, found in values.items() if any(v != found[0] for v in found)}
