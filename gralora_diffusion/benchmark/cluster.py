"""The trials of a benchmark on other machines; only this process writes the run's folder.

Images that several trials share are generated first, once, and sent to the trials that need them.
Which trials are done is known from the run's folder alone. A machine that is lost costs the jobs
that it was running, which are run again elsewhere.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from tqdm.auto import tqdm

from gralora_diffusion.benchmark.evaluation.results import Failure, TrialKey
from gralora_diffusion.io.errors import ConfigError

from .jobs import Files, Job, Reply, write_files
from .ledger import Ledger, Trial
from .node_check import requirements
from .run_config import save_run_config, with_absolute_paths
from .settings import BenchmarkSettings
from .shared_images import SharedImages, files_of, is_complete, is_whole, shared_images

logger = logging.getLogger(__name__)

#: How often a job is begun before it counts as failed, if it is lost with its machine.
ATTEMPTS = 3
#: Jobs that wait on the cluster beyond those that it can run at once, so that no machine is idle,
#: and a cluster that grows by demand sees some.
_AHEAD = 8


class Engine(Protocol):
    """Runs jobs on other machines."""

    def slots(self) -> int:
        """Return how many jobs can run at once now."""

    def store(self, files: Files) -> Any:
        """Store files that several jobs need."""

    def submit(self, job: Job, stored: Any) -> Hashable:
        """Begin a job as soon as there is room for it; return a ticket."""

    def wait(self) -> tuple[Hashable, Reply]:
        """Wait until a job has ended; return its ticket and what became of it."""


class _Work(NamedTuple):
    """A trial, or images that it shares with others."""

    trial: Trial
    images: SharedImages | None = None

    @property
    def key(self) -> SharedImages | TrialKey:
        return self.images or self.trial.key

    def __str__(self) -> str:
        return f"images in {self.images.folder}" if self.images else str(self.trial.key)


class Driver:
    """Runs the trials of a run on an engine."""

    def __init__(self, settings: BenchmarkSettings, ledger: Ledger, bar: tqdm) -> None:
        self.settings, self.ledger, self.bar = settings, ledger, bar
        self._sent = with_absolute_paths(settings)
        self.requirements = requirements(self._sent)
        self._waiting: list[Trial] = []
        self._again: deque[_Work] = deque()
        #: Shared images -> whether they are there, or why they could not be generated.
        self._shared: dict[SharedImages, bool | Failure] = {}
        self._stored: dict[tuple[SharedImages, ...], Any] = {}
        self._lost: Counter[SharedImages | TrialKey] = Counter()
        self._warned: set[str] = set()
        self._saved = False

    def run(self, trials: Sequence[Trial], engine: Engine) -> None:
        """Run the trials that are left.

        Raises:
            ConfigError: a machine cannot run trials, or no machine with these options.
            OSError: the disk of this machine, or of all that were tried, is full or gone.
        """
        self._waiting = self.ledger.left(trials)
        running: dict[Hashable, _Work] = {}
        while True:
            while len(running) < engine.slots() + _AHEAD and (work := self._next()):
                running[engine.submit(self._job(work), self._files(work, engine))] = work
            if not running:
                return
            self.bar.set_postfix_str(f"{len(running)} on the cluster")
            ticket, reply = engine.wait()
            self._end(running.pop(ticket), reply)

    def _next(self) -> _Work | None:
        """Return what can begin: first the images that a trial shares, then the trial."""
        if self._again:
            return self._again.popleft()
        for trial in [*self._waiting]:
            shared = self._shared_by(trial)
            for images in shared:
                if images not in self._shared:
                    there = is_complete(self.settings, trial.task, images)
                    self._shared[images] = there
                    if not there:
                        return _Work(trial, images)
            states = [self._shared[images] for images in shared]
            if failures := [state for state in states if isinstance(state, Failure)]:
                self._waiting.remove(trial)
                self._fail(trial, failures[0])
            elif all(states):
                self._waiting.remove(trial)
                return _Work(trial)
        return None

    def _shared_by(self, trial: Trial) -> tuple[SharedImages, ...]:
        found = shared_images(self.settings, trial.task, trial.seed)
        if trial.method.kind == "base":  # which is not trained
            found = [images for images in found if images.beginning is not None]
        return tuple(found)

    def _job(self, work: _Work) -> Job:
        task, images = work.trial.task, work.images
        job = Job(self._sent, self.requirements, task.subject, task.digest, work.trial.seed)
        if images is None:
            return replace(job, method=work.trial.method.name)
        return replace(job, share=images.folder.relative_to(self.settings.folder).as_posix())

    def _files(self, work: _Work, engine: Engine) -> Any:
        """Return the shared images that a job needs, as the engine stores them."""
        needed = self._shared_by(work.trial) if work.images is None else (work.images,)
        if needed not in self._stored:
            if len(self._stored) > _AHEAD:  # jobs that need them keep them
                self._stored.pop(next(iter(self._stored)))
            found: dict[str, bytes] = {}
            for images in needed:
                found |= files_of(images, self.settings.folder)
            if work.images is not None:  # they change when the job is done
                return engine.store(found)
            self._stored[needed] = engine.store(found)
        return self._stored[needed]

    def _end(self, work: _Work, reply: Reply) -> None:
        """Write what became of a job."""
        for warning in reply.warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                logger.warning("%s: %s", reply.node, warning)
        if reply.kind == "refused":
            raise ConfigError([f"{reply.node}: {problem}" for problem in reply.problems])
        if reply.kind in ("lost", "disk"):
            self._lost[work.key] += 1
            if self._lost[work.key] < ATTEMPTS:
                logger.warning("%s: %s. It is run again", work, _first_line(reply))
                self._again.append(work)
                return
            if reply.kind == "disk":  # the next job would fail as well
                raise OSError(f"{reply.node}: {_first_line(reply)}")
        if reply.kind in ("done", "failed") and not self._saved:
            save_run_config(self.settings)  # a machine has loaded base and encoders
            self._saved = True
        if reply.failure is not None:
            self._fail_work(work, reply.failure)
        elif work.images is not None:
            self._write_shared(work.images, reply.files)
        else:
            self._write_trial(work.trial, reply)

    def _write_shared(self, images: SharedImages, files: Files) -> None:
        """Write the images that are not there yet; those that are there stay as they are."""
        folder = self.settings.folder
        write_files({n: data for n, data in files.items() if not is_whole(folder / n)}, folder)
        self._shared[images] = True

    def _write_trial(self, trial: Trial, reply: Reply) -> None:
        try:
            if reply.result is None or reply.result.key != trial.key:
                raise ValueError(f"{reply.node} has sent the result of another trial")
            with self.ledger.work(trial) as work:
                write_files(reply.files, work)
                self.ledger.finish(trial, reply.result, work)
        except ValueError as error:
            self._fail(trial, Failure.of(error))
        else:
            self.bar.update()

    def _fail_work(self, work: _Work, failure: Failure) -> None:
        if work.images is None:
            self._fail(work.trial, failure)
        else:  # of all trials that need them
            logger.error("%s failed: %s", work, failure.error)
            self._shared[work.images] = failure

    def _fail(self, trial: Trial, failure: Failure) -> None:
        self.ledger.fail(trial, failure)
        logger.error("%s failed: %s", trial.key, failure.error)
        self.bar.update()


def _first_line(reply: Reply) -> str:
    text = reply.failure.error if reply.failure else ""
    return text.splitlines()[0] if text else "its machine was lost"
