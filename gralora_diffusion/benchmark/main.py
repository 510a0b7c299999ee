"""A benchmark: every trial once, in this process or on a cluster, then the report."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

from gralora_diffusion.benchmark.evaluation.results import Failure, TrialKey, read_results
from gralora_diffusion.io.errors import ConfigError, DataError
from gralora_diffusion.io.process import print_safely
from gralora_diffusion.training.runtime.acceleration import accelerate_left_as_it_was
from gralora_diffusion.training.runtime.folder_lock import owned

from .ledger import Ledger, Trial, in_order
from .report import write_report
from .report.blind import blind_choices, write_blind_page
from .run_config import check_same_run, public_paths, save_run_config
from .runner import Runner, device_error
from .settings import BenchmarkSettings
from .tasks import Task, read_tasks

logger = logging.getLogger(__name__)

REPORT_FOLDER = "report"


def benchmark(settings: BenchmarkSettings) -> int:
    """Run all remaining trials and write the report; return how many failed.

    Raises:
        ConfigError, DataError: raised before any trial starts.
    """
    settings.check()
    check_same_run(settings)
    if settings.report_only:
        return _report(settings, _tasks_if_there(settings))
    _check_alone()
    for warning in settings.warnings():
        logger.warning(warning)
    with owned(settings.folder, f"--output_dir {settings.output_dir!r}"):
        check_same_run(settings)  # another command may have ended just before
        tasks = read_tasks(settings)
        trials = [Trial(*found) for found in in_order(settings, tasks)]
        ledger = Ledger(settings.folder)
        if settings.retry_failed:
            ledger.forget_failures(trials)
        with trial_bar(len(trials), len(ledger.left(trials))) as bar:
            if settings.ray:
                from .ray_cluster import on_ray

                on_ray(settings, trials, ledger, bar)
            else:
                _run_here(settings, trials, ledger, bar)
        return _report(settings, tasks)


def _check_alone() -> None:
    """Check that no launcher has started several processes.

    Raises:
        ConfigError: one has.
    """
    if (number := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(
            [
                f"a launcher has started {number} processes, but a benchmark is one process. To "
                "use several GPUs or machines, start it without a launcher and with --ray auto"
            ]
        )


def trial_bar(trials: int, left: int) -> tqdm:
    """Return the progress bar of a run."""
    # without smoothing, the time is estimated from all trials of this command
    return tqdm(initial=trials - left, total=trials, desc="benchmark", unit="trial", smoothing=0)


@contextmanager
def _without_launcher() -> Iterator[None]:
    """Inside, accelerate does not see that a launcher started this one process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _run_here(
    settings: BenchmarkSettings, trials: Sequence[Trial], ledger: Ledger, bar: tqdm
) -> None:
    """Run the trials that are left, one after the other, in this process."""
    runner: Runner | None = None
    with _without_launcher(), accelerate_left_as_it_was():
        for trial in ledger.left(trials):
            bar.set_postfix_str(str(trial.key))
            if runner is None:
                runner = Runner(settings, trial.task.config)
                save_run_config(settings)  # after base and encoders were loaded
            _do(runner, trial, ledger)
            bar.update()


def _do(runner: Runner, trial: Trial, ledger: Ledger) -> None:
    """Run a trial. If it fails, its error is saved and the other trials continue.

    Raises:
        OSError: the disk is full, or gone.
        DeviceBroken: the device can no longer be used. The trial counts as failed.
    """
    try:
        with ledger.work(trial) as work:
            result = runner.run(trial.task, trial.method, trial.seed, work, ledger.folder(trial))
            ledger.finish(trial, result, work)
    except OSError:
        raise  # the next trial would fail as well
    except Exception as error:
        ledger.fail(trial, Failure.of(error))
        logger.error("%s failed: %s", trial.key, error)
        if broken := device_error(error):
            raise DeviceBroken(
                f"{trial.key}: {str(broken).splitlines()[0]}. After this error, the process can "
                "no longer use the device. Run the same command again to continue with the other "
                "trials; add --retry_failed to repeat this one"
            ) from error


class DeviceBroken(RuntimeError):
    """An error of the device after which everything that a process does on it fails."""


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
