"""The trials of a benchmark on a Ray cluster: a task for each, with its share of a GPU.

Ray pickles jobs and replies, which are sent between this project's own processes. Whoever reaches
the cluster's ports can run code on it, so it must be a trusted one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from gralora_diffusion.benchmark.evaluation.results import Failure
from gralora_diffusion.io.errors import ConfigError

from .cluster import Driver
from .jobs import Files, Job, Reply
from .ledger import Ledger, Trial
from .node_check import Requirements
from .ray_tasks import check_node, run_task
from .settings import BenchmarkSettings

logger = logging.getLogger(__name__)

#: Seconds after which Ctrl-C is heard, and the size of the cluster is looked at again.
_MOMENT = 1.0
#: Seconds within which a machine answers whether it can run trials.
_ANSWERS_WITHIN = 120.0


def on_ray(settings: BenchmarkSettings, trials: Sequence[Trial], ledger: Ledger, bar: tqdm) -> None:
    """Run the trials that are left on a Ray cluster. After an error, running tasks are cancelled.

    Raises:
        ConfigError: there is no cluster, or a machine of it cannot run trials.
        OSError: the disk of this machine, or of all that were tried, is full or gone.
    """
    if not ledger.left(trials):
        return
    driver = Driver(settings, ledger, bar)
    with connected(str(settings.ray)) as is_ours:
        engine = RayEngine(settings.ray_gpus_per_trial)
        engine.check(driver.requirements, is_ours)
        driver.run(trials, engine)


@contextmanager
def connected(address: str) -> Iterator[bool]:
    """Connect to a cluster inside; yield whether it was started here, for this process alone.

    Raises:
        ConfigError: it cannot be reached.
    """
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    is_ours = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Ray's own, about its next release
        try:
            try:
                ray.init(address, **quiet)
            except ConnectionError:
                if address != "auto":
                    raise
                # only this machine's processes reach it
                ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
                is_ours = True
        except Exception as error:  # Ray raises a bare one if it does not start in time
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                [
                    f"--ray {address}: the cluster cannot be reached ({text}). Give the address "
                    "that `ray start --head` prints, or auto"
                ]
            ) from error
    try:
        yield is_ours
    finally:
        ray.shutdown()  # which ends the tasks of this process


class RayEngine:
    """Runs jobs on the cluster to which this process is connected."""

    def __init__(self, gpus_per_trial: float | None) -> None:
        import ray

        self._ray = ray
        if gpus_per_trial is None:
            gpus_per_trial = min(1.0, ray.cluster_resources().get("GPU", 0.0))
        self.gpus = gpus_per_trial
        # a task with a GPU has a process of its own, as Ray has it by default: a process that has
        # used a GPU cannot change to another
        options = {"num_cpus": 1, "num_gpus": gpus_per_trial, "max_retries": 0}
        self._run = ray.remote(**options)(run_task)
        self._running: list[Any] = []

    def check(self, needed: Requirements, is_ours: bool) -> None:
        """Check every machine that has room for a trial.

        Raises:
            ConfigError: some cannot run trials, or a cluster of this machine alone has no room.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ray = self._ray
        nodes = [node for node in self._nodes() if self._room(node) > 0]
        if not nodes:
            text = f"no machine of the cluster has a CPU and {self.gpus:g} GPUs for a trial"
            if is_ours:
                raise ConfigError([f"--ray_gpus_per_trial: {text}. Give 0"])
            logger.warning("%s yet; waiting for one", text)
        ask = ray.remote(num_cpus=0, max_retries=0)(check_node)
        asked = [
            ask.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(needed)
            for node in nodes
        ]
        problems: dict[str, None] = {}
        ray.wait(asked, num_returns=len(asked), timeout=_ANSWERS_WITHIN) if asked else None
        for node, answer in zip(nodes, asked, strict=True):
            name = node["NodeManagerHostname"]
            try:
                name, found = ray.get(answer, timeout=0)
            except ray.exceptions.GetTimeoutError:
                continue  # each trial is checked again
            except ray.exceptions.RayTaskError as error:
                found = [_not_installed(error)]
            except ray.exceptions.RayError:
                continue  # it is gone
            problems |= {f"{name}: {problem}": None for problem in found}
        if problems:
            raise ConfigError(list(problems))
        kinds = {
            key.removeprefix("accelerator_type:")
            for node in nodes
            for key in node["Resources"]
            if key.startswith("accelerator_type:")
        }
        if self.gpus and len(kinds) > 1:
            logger.warning(
                "the cluster has several kinds of GPUs (%s), which round differently, so that "
                "the numbers of a trial depend on where it runs",
                ", ".join(sorted(kinds)),
            )
        logger.info("%d machines, room for %d trials at once", len(nodes), self.slots())

    def slots(self) -> int:
        """Return how many jobs can run at once now."""
        return sum(self._room(node) for node in self._nodes())

    def store(self, files: Files) -> Any:
        """Store files for several jobs."""
        return self._ray.put(files)

    def submit(self, job: Job, stored: Any) -> Any:
        """Begin a job as soon as there is room for it; return a ticket."""
        ticket = self._run.remote(job, stored)
        self._running.append(ticket)
        return ticket

    def wait(self) -> tuple[Any, Reply]:
        """Wait until a job has ended; return its ticket and what became of it."""
        done: list[Any] = []
        while not done:
            done, _ = self._ray.wait(self._running, timeout=_MOMENT)
        (ticket,) = done
        self._running.remove(ticket)
        return ticket, self._reply(ticket)

    def _reply(self, ticket: Any) -> Reply:
        errors = self._ray.exceptions
        try:
            reply: Reply = self._ray.get(ticket)
            return reply
        except errors.RayTaskError as error:  # a job returns its own errors
            return Reply("a machine", "refused", problems=(_not_installed(error),))
        except errors.RayError as error:
            return Reply("a machine", "lost", Failure(f"{type(error).__name__}: {error}", ""))

    def _nodes(self) -> list[Any]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _room(self, node: Any) -> int:
        """Return how many jobs a machine can run at once."""
        resources = node["Resources"]
        room = int(resources.get("CPU", 0))
        return min(room, int(resources.get("GPU", 0) / self.gpus)) if self.gpus else room


def _not_installed(error: Exception) -> str:
    """Describe an error before or beside the work itself."""
    last = str(error).strip().splitlines()[-1]
    return f"a task could not begin ({last}). Install the same packages on all machines"
