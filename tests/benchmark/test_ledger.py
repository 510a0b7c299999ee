"""Which units are done, failed or left, by the files in a run's folder; nothing is trained."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from gralora_diffusion.benchmark import ledger as ledgers
from gralora_diffusion.benchmark import main
from gralora_diffusion.benchmark.evaluation.results import (
    RESULT_NAME,
    Failure,
    read_result,
    write_result,
)
from gralora_diffusion.benchmark.ledger import ADAPTER, FAILURE_NAME, IMAGES, Ledger, Trial
from gralora_diffusion.benchmark.main import DeviceBroken
from gralora_diffusion.benchmark.methods import Method
from tests.benchmark.trials import trial as result_of

DOG = SimpleNamespace(protocol="subject", subject="dog")


def trial(seed=0):
    return Trial(DOG, Method.parse("lora-r4"), seed)


def fail(ledger, which, error="ValueError: no"):
    ledger.fail(which, Failure(error, "where"))
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


def test_failures_are_forgotten(tmp_path):
    ledger = Ledger(tmp_path)
    first, other = fail(ledger, trial(0)), fail(ledger, trial(1))
    ledger.forget_failures([trial(0), trial(2)])
    assert (first.exists(), other.exists()) == (False, True)
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


def image(folder, text):
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    (folder / IMAGES / text).write_text(text)


def test_what_another_attempt_left_is_gone(tmp_path):
    ledger = Ledger(tmp_path)
    home = ledger.folder(trial())
    home.mkdir(parents=True)
    image(home, "of a killed attempt")
    image(home / ".work", "half")
    image(home / ".work.0123", "of version 0.1")
    (home / "claim.json").write_text('{"token": "theirs"}')
    (home / ADAPTER).mkdir()
    main._do(Worker(lambda folder, home: image(folder, "new")), trial(), ledger)
    assert [path.name for path in (home / IMAGES).iterdir()] == ["new"]
    assert sorted(path.name for path in home.iterdir()) == [IMAGES, RESULT_NAME]


def test_a_disk_that_fails_ends_the_process(tmp_path):
    ledger = Ledger(tmp_path)
    error = OSError("no space left on device")
    with pytest.raises(OSError, match="no space"):
        main._do(Worker(lambda folder, home: image(folder, "half"), error), trial(), ledger)
    assert list(ledger.folder(trial()).iterdir()) == []
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
    with pytest.raises(DeviceBroken) as caught:
        main._do(worker, trial(0), ledger)
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
    main._do(Worker(lambda folder, home: None, error), trial(0), ledger)
    assert ledger.left([trial(0), trial(1)]) == [trial(1)]


def test_what_came_out_well_is_no_failure_any_more(tmp_path):
    ledger = Ledger(tmp_path)
    fail(ledger, trial())
    main._do(Worker(lambda folder, home: None), trial(), ledger)
    assert ledger.left([trial()]) == []
    assert ledger.failures() == []
