"""Commands that are quiet, and leave nothing half-written when they are ended."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers.utils import logging as of_diffusers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging as of_transformers

from gralora_diffusion.export import streaming
from gralora_diffusion.export.main import main as export
from gralora_diffusion.io import process
from gralora_diffusion.io.process import (
    cleanup_on_signals,
    guard_terminal,
    lasting_imports,
    quiet_libraries,
)
from gralora_diffusion.lora_import.main import main as import_lora
from tests import ROOT
from tests.models import adapt, stable_diffusion


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """What nohup, or a shell's background, had this process ignore is heard again."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    pipe = stable_diffusion()
    pipe.save_pretrained(folder / "base")
    adapt(pipe)
    pipe.save_gralora_weights(folder / "adapter")
    line = ["--adapter", str(folder / "adapter"), "--format", "lora", "--style", "diffusers"]
    export([*line, "--output", str(folder / "lora.safetensors")])
    return folder


# -- quiet -----------------------------------------------------------------------------------------


def test_libraries_are_quiet_and_then_as_before() -> None:
    logger = logging.getLogger("diffusers.loaders.lora_base")

    def state() -> tuple[object, ...]:
        bars = of_diffusers.is_progress_bar_enabled(), of_transformers.is_progress_bar_enabled()
        return (*bars, are_progress_bars_disabled(), logger.isEnabledFor(logging.WARNING))

    for library in (of_diffusers, of_transformers):  # whatever other tests left them at
        library.enable_progress_bar()
    enable_progress_bars()
    of_diffusers.set_verbosity_warning()
    before = state()
    assert before == (True, True, False, True)
    with quiet_libraries():
        assert state() == (False, False, False, False)  # bars of downloads stay
        assert logging.getLogger("diffusers").isEnabledFor(logging.WARNING)
    assert state() == before
    of_diffusers.disable_progress_bar()
    try:
        with quiet_libraries():
            pass
        assert not of_diffusers.is_progress_bar_enabled()
    finally:
        of_diffusers.enable_progress_bar()


@pytest.mark.parametrize("is_a_command", [True, False])
def test_a_command_leaves_its_imports_out_of_collections(monkeypatch, is_a_command) -> None:
    monkeypatch.setattr(process, "is_a_command", is_a_command)
    gc.unfreeze()
    try:
        with contextlib.suppress(ImportError), lasting_imports():
            assert gc.isenabled() is not is_a_command
            with lasting_imports():  # of a part of what is imported
                made = [[]]
            assert gc.isenabled() is not is_a_command
            raise ImportError
        assert gc.isenabled()
        frozen = gc.get_freeze_count()
        assert (frozen > 0) is is_a_command
        assert any(found is made for found in gc.get_objects()) is not is_a_command
    finally:
        gc.freeze()  # as the tests run


def test_messages_of_libraries_have_no_control_characters(monkeypatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    before, text = logging.getLogRecordFactory(), io.StringIO()
    handler, logger = logging.StreamHandler(text), of_diffusers.get_logger("diffusers.some.module")
    logger.addHandler(handler)
    logging.setLogRecordFactory(logging.LogRecord)  # Ray has one of its own once it is imported
    try:
        guard_terminal()
        logger.warning("\x1b[1mbold\x1b[0m, %s and %s", "a\x1b]0;title\x07", "a\rb")
        logger.warning("50% of it")
    finally:
        logger.removeHandler(handler)
        logging.setLogRecordFactory(before)
    assert text.getvalue() == "bold, a\\x1b]0;title\\x07 and a\\x0db\n50% of it\n"


def test_nothing_is_heard_of_a_verified_export(files: Path, tmp_path: Path) -> None:
    line = ["--adapter", str(files / "adapter"), "--base", str(files / "base"), "--format", "lora"]
    line += ["--output", str(tmp_path / "x.safetensors"), "--verify", "--verify_steps", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRANSFORMERS_VERBOSITY", None)
    result = subprocess.run(
        [sys.executable, "-m", "gralora_diffusion.cli", "export", *line],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0
    assert "passed" in result.stdout
    assert result.stderr == ""


# -- ended -----------------------------------------------------------------------------------------


def end(number: int) -> None:
    with cleanup_on_signals():
        os.kill(os.getpid(), number)
        time.sleep(5)


def test_interrupts_and_what_is_ignored_are_left_alone() -> None:
    with pytest.raises(KeyboardInterrupt):
        end(signal.SIGINT)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with cleanup_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_as_before() -> None:
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with cleanup_on_signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in numbers] == before
    thread = threading.Thread(target=cleanup_on_signals().__enter__)  # which has no handlers
    thread.start()
    thread.join()
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("command", ["checkpoint", "diffusers", "lora", "import"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_of_a_command_that_was_ended(
    command: str, number: int, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_BLOCK", 1 << 8)  # so that it takes its time
    output = tmp_path / ("out" if command == "diffusers" else "out.safetensors")
    if command == "import":
        line = ["--lora", str(files / "lora.safetensors"), "--family", "stable-diffusion"]
        line += ["--rank", "4", "--gralora_k", "2"]
    else:
        line = ["--adapter", str(files / "adapter"), "--base", str(files / "base")]
        line += ["--format", command]
    main = import_lora if command == "import" else export
    line += ["--output", str(output), "--overwrite"]
    processes = multiprocessing.get_context("fork")
    working = processes.Event()

    def run() -> None:
        with cleanup_on_signals():
            working.set()
            main(line)

    began = time.perf_counter()
    main(line)
    seconds = time.perf_counter() - began
    before = contents(output)
    ended = 0
    for attempt in range(40):
        working.clear()
        process = processes.Process(target=run)
        process.start()
        working.wait()
        time.sleep(seconds * random.random())
        os.kill(int(process.pid or 0), number)
        process.join(60)
        assert process.exitcode in (0, -number)
        ended += process.exitcode != 0
        assert [path.name for path in tmp_path.iterdir()] == [output.name], attempt
        assert contents(output) == before  # what was there, or the same anew
        if ended == 8:
            break
    assert ended > 2


def contents(output: Path) -> dict[str, bytes]:
    files = sorted(output.rglob("*")) if output.is_dir() else [output]
    return {path.name: path.read_bytes() for path in files if path.is_file()}
