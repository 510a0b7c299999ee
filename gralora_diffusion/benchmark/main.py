"""A benchmark: every trial once, shared by any number of processes, then the report."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm.auto import tqdm

from gralora_diffusion.benchmark.evaluation.results import TrialKey, read_results, write_result
from gralora_diffusion.io.errors import ConfigError, DataError
from gralora_diffusion.io.process import print_safely
from gralora_diffusion.training.runtime.acceleration import accelerate_left_as_it_was

from .ledger import FAILURE_NAME, Ledger, Trial, in_order
from .report import write_report
from .report.blind import blind_choices, write_blind_page
from .run_config import check_same_run, public_paths, save_run_config
from .runner import ADAPTER, IMAGES, Runner
from .settings import BenchmarkSettings
from .tasks import Task, read_tasks
from .trial_locks import WAIT_SECONDS, TrialLock, claim, holder

logger = logging.getLogger(__name__)

REPORT_FOLDER = "report"


def benchmark(settings: BenchmarkSettings) -> int:
    """Run all remaining trials and write the report; return how many failed.

    Raises:
        ConfigError, DataError: raised before any trial starts.
    """
    began = time.monotonic()
    settings.check()
    check_same_run(settings)
    if settings.report_only:
        return _report(settings, _tasks_if_there(settings))
    for warning in settings.warnings():
        logger.warning(warning)
    tasks = read_tasks(settings)
    with _alone() as rank, accelerate_left_as_it_was():
        trials = [Trial(*found) for found in in_order(settings, tasks)]
        if settings.retry_failed:
            Ledger(settings.folder).forget_failures(trials, time.monotonic() - began)
        _run_all(settings, trials, show=rank == 0)
        return _report(settings, tasks) if rank == 0 else 0


@contextmanager
def _alone() -> Iterator[int]:
    """Make this process independent of others inside, on its own device; yields its number.

    Trials are assigned by files. Processes that a launcher starts together would wait for each
    other, and one that ends would end the others.
    """
    rank, local = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    try:
        yield rank
    finally:
        os.environ.update(before)


def _run_all(settings: BenchmarkSettings, trials: Sequence[Trial], show: bool) -> None:
    """Run the trials that nobody has run, and wait for those that others are running."""
    ledger = Ledger(settings.folder)
    runner: Runner | None = None
    bar = tqdm(
        initial=len(trials) - len(ledger.left(trials)),
        total=len(trials),
        desc="benchmark",
        unit="trial",
        smoothing=0,  # estimates the time from all trials of this run
        disable=not show,
    )
    with bar:
        while left := ledger.left(trials):
            idle = True
            for trial in left:
                mine = claim(ledger.folder(trial))
                if mine is None:
                    continue
                with mine:
                    if ledger.left([trial]):  # nobody finished it just before the claim
                        idle = False
                        bar.set_postfix_str(str(trial.key))
                        if runner is None:
                            runner = Runner(settings, trial.task.config)
                            save_run_config(settings)  # after base and encoders were loaded
                        _do(runner, trial, ledger, mine)
                bar.update(len(trials) - len(ledger.left(trials)) - bar.n)
            if idle and (waiting := ledger.left(trials)):
                bar.set_postfix_str(f"waiting for {holder(ledger.folder(waiting[0]))}")
                time.sleep(WAIT_SECONDS)


def _do(runner: Runner, trial: Trial, ledger: Ledger, mine: TrialLock) -> None:
    """Run a trial. If it fails, its error is saved and the other trials continue.

    Raises:
        OSError: the disk is full, or gone.
        DeviceBroken: the device can no longer be used. The trial counts as failed.
    """
    folder = ledger.folder(trial)
    try:
        result = runner.run(trial.task, trial.method, trial.seed, mine.work, folder)
        if mine.is_held():
            mine.hand_over(IMAGES, ADAPTER)
            write_result(result, folder)
            (folder / FAILURE_NAME).unlink(missing_ok=True)
    except Exception as error:
        if not mine.is_held():
            logger.warning(
                "%s was taken over by %s", trial.key, holder(folder) or "another process"
            )
        elif isinstance(error, OSError):
            raise  # the next trial would fail as well
        else:
            ledger.fail(trial, error)
            logger.error("%s failed: %s", trial.key, error)
        if broken := device_error(error):
            raise DeviceBroken(
                f"{trial.key}: {str(broken).splitlines()[0]}. After this error, the process can "
                "no longer use the device. Run the same command again to continue with the other "
                "trials; add --retry_failed to repeat this one"
            ) from error


class DeviceBroken(RuntimeError):
    """An error of the device after which everything that a process does on it fails."""


def device_error(error: BaseException | None) -> BaseException | None:
    """Return the first error of CUDA (or HIP) among an error and its causes.

    Returns None if there is none, or if it only ran out of memory.
    """
    while error is not None:
        text = str(error)
        is_of_device = isinstance(error, getattr(torch, "AcceleratorError", ())) or (  # torch 2.8
            isinstance(error, RuntimeError) and text.startswith(("CUDA error", "HIP error"))
        )
        if is_of_device and not re.search("out of memory|ALLOC_FAILED", text):
            return error
        error = error.__cause__ or error.__context__
    return None


def _report(settings: BenchmarkSettings, tasks: Sequence[Task]) -> int:
    """Write the report on all trials in the run's folder; return how many failed."""
    results, unreadable = read_results(settings.folder)
    failures = Ledger(settings.folder).failures()
    # without the images, subjects without any result are not known
    learned = [(t.protocol, t.subject) for t in tasks] or [(r.protocol, r.subject) for r in results]
    expected = [
        TrialKey(*place, method.name, seed)
        for place, method, seed in in_order(settings, dict.fromkeys(learned))
    ]
    real_images = {task.subject: task.real for task in tasks if task.protocol == "subject"}
    folder, declared = settings.folder / REPORT_FOLDER, settings.declared
    if settings.blind:
        page = write_blind_page(results, folder, declared=declared, real_images=real_images)
        print_safely(page)
        return 0
    answers = [Path(name).expanduser() for name in settings.blind_answers or ()]
    page = write_report(
        results,
        folder,
        title=settings.title,
        expected=expected,
        unreadable=[*unreadable, *failures],
        real_images=real_images,
        settings=public_paths(settings.record()),
        declared=declared,
        blind=blind_choices(answers, folder) if answers else (),
    )
    print_safely(page)
    return len(failures)


def _tasks_if_there(settings: BenchmarkSettings) -> list[Task]:
    """Return the tasks, or none if the results were copied here without the images."""
    try:
        return read_tasks(settings)
    except (ConfigError, DataError) as error:
        logger.warning("the real images are not shown: %s", error)
        return []
