"""The first signal may be put off, the second may not."""

from __future__ import annotations

import os
import pty
import signal
import sys
import time
from pathlib import Path

import pytest

from gralora_diffusion.io.stop_signals import StopSignals
from tests import ROOT
from tests.forked import Forked

PROGRAM = """
import os, signal, sys, time
from gralora_diffusion.io.cleanup_on_exit import cleanup_on_exit
from gralora_diffusion.io.stop_signals import StopSignals
numbers = [getattr(signal, name) for name in sys.argv[2:]]
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may be run by nohup
with StopSignals() as signals, cleanup_on_exit(lambda: print("cleaned", flush=True)):
    if sys.argv[1] == "put_off":
        signals.put_off("stopping")
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
    print("asked", signals.asked, flush=True)
"""


@pytest.mark.parametrize(
    ("line", "code", "output"),
    [
        ("now SIGTERM", -signal.SIGTERM, ["ended by SIGTERM", "cleaned"]),
        ("now SIGHUP", -signal.SIGHUP, ["ended by SIGHUP", "cleaned"]),
        ("put_off SIGTERM", 0, ["stopping", "asked True", "cleaned"]),
        ("put_off SIGINT", 0, ["stopping", "asked True", "cleaned"]),
        ("put_off SIGHUP SIGHUP", 0, ["stopping", "asked True", "cleaned"]),
        ("put_off SIGINT SIGTERM", -signal.SIGTERM, ["stopping", "ended by SIGTERM", "cleaned"]),
        ("put_off SIGTERM SIGTERM", -signal.SIGTERM, ["stopping", "ended by SIGTERM", "cleaned"]),
    ],
)
def test_one_signal_and_two(line: str, code: int, output: list[str]) -> None:
    found, text = Forked(PROGRAM, *line.split()).wait(20)
    assert (found, [part for part in text.split("\n") if part]) == (code, output)


def test_ctrl_c_twice_is_an_interrupt() -> None:
    # the tests themselves may be in a shell's background, where it is ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopSignals() as signals:
            signals.put_off()
            signal.raise_signal(signal.SIGINT)
            assert signals.asked
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_a_launcher_passes_on_is_not_a_second_signal() -> None:
    """torchrun gets Ctrl-C as its processes do, and then ends them by SIGTERM."""
    code, text = Forked(PROGRAM, "put_off", "SIGINT", "SIGTERM", WORLD_SIZE=2).wait(20)
    assert (code, "asked True" in text) == (0, True)


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignals() as signals:
            signals.put_off()
            signal.raise_signal(signal.SIGHUP)
            assert not signals.asked
    finally:
        signal.signal(signal.SIGHUP, before)


IN_TERMINAL = """
import signal, sys, time
from pathlib import Path
from gralora_diffusion.io.stop_signals import StopSignals
signal.signal(signal.SIGHUP, signal.SIG_DFL)
with StopSignals() as signals:
    signals.put_off("stopping")
    print("begun", flush=True)
    while not signals.asked:
        time.sleep(0.01)
    print("a line to nowhere", flush=True)
    Path(sys.argv[1]).touch()
"""


def test_work_goes_on_when_the_terminal_is_gone(tmp_path: Path) -> None:
    """As when an SSH connection breaks: the kernel says SIGHUP, and printing would fail."""
    done = tmp_path / "done"
    process, terminal = pty.fork()
    if process == 0:
        line = [sys.executable, "-c", IN_TERMINAL, str(done)]
        os.execve(sys.executable, line, {**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        assert os.read(terminal, 100).startswith(b"begun")
        os.close(terminal)
        deadline = time.monotonic() + 20
        while not done.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert done.exists()
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
