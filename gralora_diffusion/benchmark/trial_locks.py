"""Which process runs which trial: claims in a folder that processes and machines share.

A claim is a file that one process creates and touches while it works. A process that cannot create
the file leaves the trial alone. A claim that has not been touched for long belongs to a process
that was killed, and is taken over. Only files are used, created exclusively, so a network file
system is enough.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from gralora_diffusion.io.json_files import read_object

#: A claim's file, and the prefix of the name of its folder.
LOCK_NAME, WORK_NAME = "claim.json", ".work."
#: Seconds between touches, and seconds without one after which a claim is taken over.
TOUCH_SECONDS, PATIENCE_SECONDS = 20.0, 300.0
#: Seconds between checks of other processes' progress.
WAIT_SECONDS = 5.0
#: More than a claim has.
_MOST_BYTES = 1 << 16


class TrialLock:
    """This process's claim on a trial, as a context inside which the claim is kept alive.

    Attributes:
        folder: of the trial.
        work: a folder in it for this claim alone, which is empty at first and deleted with the
            claim. Folders that other claims left behind are deleted at the start.
    """

    def __init__(self, folder: Path, token: str, touch_seconds: float = TOUCH_SECONDS) -> None:
        self.folder, self.path, self.token = folder, folder / LOCK_NAME, token
        self.work = folder / f"{WORK_NAME}{token}"
        self._done = threading.Event()
        self._toucher = threading.Thread(target=self._touch, args=(touch_seconds,), daemon=True)

    def __enter__(self) -> TrialLock:
        for left in self.folder.glob(f"{WORK_NAME}*"):
            shutil.rmtree(left, ignore_errors=True)
        self.work.mkdir()
        self._toucher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._toucher.join()
        shutil.rmtree(self.work, ignore_errors=True)
        if self.is_held():
            self.path.unlink(missing_ok=True)

    def is_held(self) -> bool:
        """Return whether no other process took it over, as may happen if this one is suspended."""
        return _read(self.path).get("token") == self.token

    def hand_over(self, *names: str) -> None:
        """Move these files of ``work`` to the trial's folder, replacing those of the same names.

        Names that are missing from ``work`` are then missing from the trial's folder, too.
        """
        for name in names:
            shutil.rmtree(self.folder / name, ignore_errors=True)  # left by another attempt
            if (self.work / name).exists():
                os.replace(self.work / name, self.folder / name)

    def _touch(self, seconds: float) -> None:
        while not self._done.wait(seconds):
            if _read(self.path).get("token", self.token) != self.token:
                return
            try:
                os.utime(self.path)
            except OSError:  # the file system is away for a moment; the next touch may succeed
                continue


def claim(
    folder: Path, patience: float = PATIENCE_SECONDS, touch_seconds: float = TOUCH_SECONDS
) -> TrialLock | None:
    """Claim a trial's folder, creating it if needed; returns None if another process has it.

    Args:
        patience: seconds without a touch after which a claim is void. The claim of a process on
            this machine that has ended is void at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, token = folder / LOCK_NAME, uuid.uuid4().hex
    if _make(path, token):
        return TrialLock(folder, token, touch_seconds)
    theirs = _read(path)
    if not _is_dead(path, theirs, patience):
        return None
    # a claim has one successor: the process that creates this file
    successor = folder / f"{LOCK_NAME}.{theirs.get('token', 'unreadable')}.heir"
    if not _make(successor, token):
        if age(successor) > patience:  # it died in turn, between here and the end of this function
            successor.unlink(missing_ok=True)
        return None
    # an earlier successor may already have deleted that file before it was created here
    inherits = _read(path).get("token") == theirs.get("token")
    if inherits:
        fresh = folder / f".{LOCK_NAME}.{token}"
        _make(fresh, token)
        os.replace(fresh, path)
    successor.unlink(missing_ok=True)
    return TrialLock(folder, token, touch_seconds) if inherits else None


def holder(folder: Path) -> str | None:
    """Return who has a trial, as text, or None if nobody has it."""
    facts = _read(folder / LOCK_NAME)
    return f"process {facts.get('pid')} on {facts.get('host')}" if facts else None


def _make(path: Path, token: str) -> bool:
    """Create a claim file with its content, exclusively; returns False if it already exists."""
    facts = {
        "token": token,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "time": time.time(),
    }
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as file:
        json.dump(facts, file)
    return True


def _read(path: Path) -> dict[str, Any]:
    """Return the facts of a claim; none if it is gone, not written yet, or damaged."""
    try:
        facts = read_object(path, _MOST_BYTES)
    except (OSError, ValueError):
        return {}
    # a token becomes part of a file's name
    return facts if re.fullmatch("[0-9a-f]{32}", str(facts.get("token"))) else {}


def _is_dead(path: Path, facts: dict[str, Any], patience: float) -> bool:
    if facts.get("machine") == _machine() and not _runs(facts.get("pid")):
        return True
    return age(path) > patience


@cache
def _machine() -> str:
    """Identify the scope within which process ids are unique.

    Host names do not, because containers, and machines of a cluster, often share one.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {uuid.getnode():x}"


def _runs(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, TypeError, ValueError, OverflowError):
        return True
    return True


def age(path: Path) -> float:
    """Return the seconds since a file was touched, by the clock of its file system; 0 if gone."""
    now = path.parent / f".now.{uuid.uuid4().hex}"
    try:
        now.touch()
        return now.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return 0.0
    finally:
        now.unlink(missing_ok=True)
