"""Signals that ask a command to end: the first may be put off, the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType

from .process import are_several, end_by

#: Windows has the first and the last, other systems the first three.
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
#: Seconds within which a launcher of several processes passes on what it got itself.
_PASSED_ON = 10.0


class StopSignals:
    """Hears Ctrl-C, SIGTERM and SIGHUP inside; both as a context and as an answer to ``asked``.

    At first a signal ends the process as usual, except that partial outputs are removed. After
    :meth:`put_off` the first signal only sets ``asked``, and the second ends the process. Ctrl-C
    ends it by a KeyboardInterrupt. Signals that are ignored, as by nohup, stay ignored.

    Attributes:
        asked: a signal was put off.
    """

    def __init__(self) -> None:
        self.asked = False
        self._text: str | None = None
        self._first: tuple[int, float] = (0, 0.0)
        self._handlers: dict[int, object] = {}
        self._terminals: list[int] = []

    def put_off(self, text: str = "") -> None:
        """From now on the first signal writes ``text`` to the terminal and sets ``asked``."""
        self._text = text

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self  # no other thread can set handlers
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._handlers.clear()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        hangs_up = number == getattr(signal, "SIGHUP", None)
        if hangs_up:
            self._leave_terminal()
        if self._text is not None and not self.asked:
            self.asked, self._first = True, (number, time.monotonic())
            _write(self._text)
        elif self.asked and (hangs_up or self._is_passed_on(number)):
            return  # a shell and its terminal both say that they end
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            _write(f"ended by {signal.Signals(number).name}")
            end_by(number)

    def _is_passed_on(self, number: int) -> bool:
        """Whether a launcher, which got the first signal too, ends its processes by another."""
        first, moment = self._first
        return are_several() and number != first and time.monotonic() - moment < _PASSED_ON

    def _leave_terminal(self) -> None:
        """Let what is printed go nowhere, because printing to a terminal that is gone fails."""
        for number in self._terminals:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def _write(text: str) -> None:
    """Write to the standard error; ``print`` may not be entered again while it is interrupted."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode() if text else b"")
