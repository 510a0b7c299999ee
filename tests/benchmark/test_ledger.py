"""Which units are done, failed or left, by the files in a run's folder; nothing is trained."""

import os
import shutil
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

from gralora_diffusion.benchmark import ledger as ledgers
from gralora_diffusion.benchmark import main
from gralora_diffusion.benchmark.evaluation.results import RESULT_NAME, read_result, write_result
from gralora_diffusion.benchmark.ledger import FAILURE_NAME, Ledger, Trial
from gralora_diffusion.benchmark.main import DeviceBroken
from gralora_diffusion.benchmark.methods import Method
from gralora_diffusion.benchmark.runner import ADAPTER, IMAGES
from gralora_diffusion.benchmark.trial_locks import LOCK_NAME, claim
from tests.benchmark.trials import trial as result_of

DOG = SimpleNamespace(protocol="subject", subject="dog")


def trial(seed=0):
    return Trial(DOG, Method.parse("lora-r4"), seed)


def fail(ledger, which, error="ValueError: no"):
    ledger.folder(which).mkdir(parents=True, exist_ok=True)
    try:
        raise ValueError(error)
    except ValueError as caught:
        ledger.fail(which, caught)
    return ledger.folder(which) / FAILURE_NAME


def finish(ledger, which):
    return write_result(result_of(which.key), ledger.folder(which))


def test_a_folder_that_was_copied_is_done_again(tmp_path):
    """The report leaves it out, so that it must not count as done either."""
    ledger = Ledger(tmp_path)
    finish(ledger, trial(0))
    shutil.copytree(ledger.folder(trial(0)), ledger.folder(trial(1)))
    assert ledger.left([trial(0), trial(1)]) == [trial(1)]


def test_a_file_is_read_once_and_again_when_it_changes(tmp_path, monkeypatch):
    """A log of many layers takes megabytes, and every process looks after each unit."""
    ledger, read = Ledger(tmp_path), []
    path = finish(ledger, trial())
    monkeypatch.setattr(ledgers, "read_result", lambda p: read.append(p) or read_result(p))
    assert ledger.left([trial()]) == ledger.left([trial()]) == []
    assert read == [path]
    path.write_text(path.read_text()[:100])
    assert ledger.left([trial()]) == [trial()]
    finish(ledger, trial())
    assert ledger.left([trial()]) == []


def test_only_old_failures_are_forgotten(tmp_path):
    """Of processes that start together one may be at work when another begins to look."""
    ledger = Ledger(tmp_path)
    old, new = fail(ledger, trial(0)), fail(ledger, trial(1))
    before = time.time() - 60
    os.utime(old, (before, before))
    ledger.forget_failures([trial(0), trial(1), trial(2)], before=30)
    assert (old.exists(), new.exists()) == (False, True)
    assert ledger.left([trial(0), trial(1)]) == [trial(0)]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"error"', "null"])
def test_a_failure_that_cannot_be_read_is_one(tmp_path, content):
    ledger = Ledger(tmp_path)
    fail(ledger, trial()).write_text(content)
    (failure,) = ledger.failures()
    assert "cannot be read" in failure.reason
    assert ledger.left([trial()]) == []


class Worker:
    """In the place of a runner: ends a unit with an error, or with a result."""

    def __init__(self, then, error=None):
        self.then, self.error = then, error

    def run(self, task, method, seed, folder, home):
        self.then(folder, home)
        if self.error:
            raise self.error
        return result_of(Trial(task, method, seed).key)


def taken_over(folder, home):
    (home / LOCK_NAME).write_text('{"token": "theirs", "host": "elsewhere", "pid": 7}')


@pytest.mark.parametrize("error", [None, ValueError("no"), FileNotFoundError("gone")])
def test_a_process_that_woke_too_late_leaves_nothing(tmp_path, error):
    """Neither a result nor a failure, and it goes on with other units."""
    ledger = Ledger(tmp_path)
    with claim(ledger.folder(trial())) as mine:
        main._do(Worker(taken_over, error), trial(), ledger, mine)
    assert os.listdir(ledger.folder(trial())) == [LOCK_NAME]


def image(folder, text):
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    (folder / IMAGES / text).write_text(text)


def test_two_that_take_a_trial_over_from_each_other_do_not_mix(tmp_path):
    """One was suspended while it drew, and wakes while, or after, the other draws."""
    ledger = Ledger(tmp_path)
    home = ledger.folder(trial())
    theirs = ExitStack()

    def draw_and_sleep(folder, home):
        image(folder, "of the first")
        old = time.time() - 999
        os.utime(home / LOCK_NAME, (old, old))
        other = theirs.enter_context(claim(home))
        image(other.work, "of the second")
        image(folder, "of the first, awake")
        other.hand_over(IMAGES)

    with claim(home) as mine:
        main._do(Worker(draw_and_sleep), trial(), ledger, mine)
    with theirs:
        assert [path.name for path in (home / IMAGES).iterdir()] == ["of the second"]
    assert sorted(path.name for path in home.iterdir()) == [IMAGES]


def test_what_another_attempt_left_is_gone(tmp_path):
    ledger = Ledger(tmp_path)
    home = ledger.folder(trial())
    home.mkdir(parents=True)
    image(home, "of a killed attempt")
    (home / ADAPTER).mkdir()
    with claim(home) as mine:
        main._do(Worker(lambda folder, home: image(folder, "new")), trial(), ledger, mine)
    assert [path.name for path in (home / IMAGES).iterdir()] == ["new"]
    assert sorted(path.name for path in home.iterdir()) == [IMAGES, RESULT_NAME]


def test_a_disk_that_fails_ends_the_process(tmp_path):
    ledger = Ledger(tmp_path)
    error = OSError("no space left on device")
    with pytest.raises(OSError, match="no space"), claim(ledger.folder(trial())) as mine:
        main._do(Worker(lambda folder, home: None, error), trial(), ledger, mine)
    assert ledger.left([trial()]) == [trial()]


CUDA = "CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later"


def wrapped(error, how):
    """Another error, raised because of this one or while it was dealt with."""
    try:
        try:
            raise error
        except RuntimeError:
            if how == "cause":
                raise ValueError("no") from error
            raise ValueError("no")  # noqa: B904
    except ValueError as caught:
        return caught


BREAKING = [
    RuntimeError(CUDA),
    RuntimeError("HIP error: unspecified launch failure"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    wrapped(RuntimeError(CUDA), "cause"),
    wrapped(RuntimeError(CUDA), "context"),
]
HARMLESS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError(CUDA),
]
if hasattr(torch, "AcceleratorError"):
    BREAKING.append(torch.AcceleratorError("an illegal memory access was encountered"))
    HARMLESS.append(torch.AcceleratorError("CUDA error: out of memory"))


@pytest.mark.parametrize("error", BREAKING, ids=repr)
def test_a_device_that_breaks_ends_the_process(tmp_path, error):
    """All other units would fail as well; of them nothing is kept."""
    ledger = Ledger(tmp_path)
    worker = Worker(lambda folder, home: None, error)
    with pytest.raises(DeviceBroken) as caught, claim(ledger.folder(trial(0))) as mine:
        main._do(worker, trial(0), ledger, mine)
    said = str(caught.value)
    assert said.startswith("subject, dog, lora-r4, seed 0: ")
    assert "kernel errors might" not in said
    assert (
        "Run the same command again to continue with the other trials; add --retry_failed" in said
    )
    assert ledger.left([trial(0), trial(1)]) == [trial(1)]
    assert list(ledger.folder(trial(0)).iterdir()) == [ledger.folder(trial(0)) / FAILURE_NAME]


@pytest.mark.parametrize("error", HARMLESS, ids=repr)
def test_other_errors_are_of_their_trial(tmp_path, error):
    ledger = Ledger(tmp_path)
    with claim(ledger.folder(trial(0))) as mine:
        main._do(Worker(lambda folder, home: None, error), trial(0), ledger, mine)
    assert ledger.left([trial(0), trial(1)]) == [trial(1)]


def test_a_device_that_breaks_after_the_trial_was_taken_over(tmp_path):
    """Nothing is kept of the unit, which is the other's, and the process ends all the same."""
    ledger = Ledger(tmp_path)
    with pytest.raises(DeviceBroken), claim(ledger.folder(trial())) as mine:
        main._do(Worker(taken_over, RuntimeError(CUDA)), trial(), ledger, mine)
    assert os.listdir(ledger.folder(trial())) == [LOCK_NAME]


def test_what_came_out_well_is_no_failure_any_more(tmp_path):
    ledger = Ledger(tmp_path)
    with claim(ledger.folder(trial())) as mine:
        fail(ledger, trial())
        main._do(Worker(lambda folder, home: None), trial(), ledger, mine)
    assert ledger.left([trial()]) == []
    assert ledger.failures() == []
