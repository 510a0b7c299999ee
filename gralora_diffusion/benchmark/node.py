"""A job of a benchmark on any machine: files come in as bytes, and go out as bytes.

Only the machine where the benchmark was started has the run's folder. The others work in a
temporary folder of their own, read base, encoders and images from the same paths or from the Hub,
and check that the images are the same.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from gralora_diffusion.benchmark.evaluation.results import Failure
from gralora_diffusion.io.errors import ConfigError, DataError

from .jobs import Files, Job, Reply, read_files, write_files
from .ledger import Trial
from .methods import Method
from .node_check import node_name, node_problems
from .runner import Runner, device_error
from .settings import BenchmarkSettings
from .shared_images import files_of, shared_images
from .tasks import Task, read_tasks


def run_job(job: Job, shared: Files) -> Reply:
    """Run a job in this process, which keeps base and encoders for the next one.

    Args:
        shared: files of the run's folder that the job needs.
    """
    node = node_name()
    if problems := node_problems(job.requirements):
        return Reply(node, "refused", problems=tuple(problems))
    with _heard() as warnings:
        try:
            reply = _run(job, shared, node)
        except OSError as error:
            reply = Reply(node, "disk", Failure.of(error))
        except Exception as error:
            broken = device_error(error) is not None
            reply = Reply(node, "lost" if broken else "failed", Failure.of(error))
    return replace(reply, warnings=tuple(dict.fromkeys(warnings)))


#: The runner of this process, with its settings; a process has one at a time.
_loaded: list[tuple[BenchmarkSettings, Runner]] = []


def _run(job: Job, shared: Files, node: str) -> Reply:
    with tempfile.TemporaryDirectory(prefix="gralora-benchmark-") as made:
        folder = Path(made)
        write_files(shared, folder)
        settings = replace(job.settings, output_dir=made)
        try:
            task = _task(settings, job)
            runner = _runner(job.settings, task)
        except (ConfigError, DataError) as error:
            return Reply(node, "refused", problems=tuple(error.problems))
        runner.settings = settings
        if job.method is None:
            found: dict[str, bytes] = {}
            for images in shared_images(settings, task, job.seed):
                if images.folder.relative_to(folder).as_posix() == job.share:
                    runner.share(task, job.seed, [images])
                    found |= files_of(images, folder)
            return Reply(node, "done", files=found)
        trial, work = Trial(task, Method.parse(job.method), job.seed), folder / "work"
        work.mkdir()
        result = runner.run(task, trial.method, trial.seed, work, folder / trial.key.path)
        return Reply(node, "done", result=replace(result, folder=None), files=read_files(work))


def _task(settings: BenchmarkSettings, job: Job) -> Task:
    """Read the job's task on this machine.

    Raises:
        ConfigError, DataError: it cannot be read, or is not the one of the job.
    """
    if "captioned" not in (settings.protocols or ()):
        settings = replace(settings, subjects=[job.subject])
    (task,) = read_tasks(settings)
    if task.digest != job.digest:
        raise ConfigError(
            [
                f"the images or prompts of {job.subject} differ from those where the benchmark "
                "was started. Copy them again"
            ]
        )
    return task


def _runner(settings: BenchmarkSettings, task: Task) -> Runner:
    if not _loaded or _loaded[0][0] != settings:
        _loaded.clear()
        _loaded.append((settings, Runner(settings, task.config)))
    return _loaded[0][1]


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Collect the warnings that are logged inside."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    ours = logging.getLogger("gralora_diffusion")
    ours.addHandler(handler)
    try:
        yield heard
    finally:
        ours.removeHandler(handler)
