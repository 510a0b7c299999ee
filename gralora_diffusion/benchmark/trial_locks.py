"""Who does which unit: claims in a folder that processes, and machines, share.

A claim is a file that one process makes and touches while it works. What another cannot make, it
leaves alone; what nobody has touched for long belongs to a process that was killed, and is taken
over. Only files are used, made exclusively, so a network file system will do.
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

#: A claim's file, and the beginning of the name of its folder.
LOCK_NAME, WORK_NAME = "claim.json", ".work."
#: Seconds between two touches, and after how many without one a claim is taken over.
TOUCH_SECONDS, PATIENCE_SECONDS = 20.0, 300.0
#: Seconds between two looks at what other processes do.
WAIT_SECONDS = 5.0
#: More than a claim has.
_MOST_BYTES = 1 << 16


class TrialLock:
    """A unit that is this process's own, as a context: inside, the claim is kept alive.

    Attributes:
        folder: of the unit.
        work: a folder in it of this claim alone, empty at first, gone with the claim. What others
            left of theirs goes at the beginning.
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
        """Whether no other process has taken it over, as it may after this one was suspended."""
        return _read(self.path).get("token") == self.token

    def hand_over(self, *names: str) -> None:
        """Move these of the work to the unit, in place of what it has of these names.

        What the work lacks, the unit lacks then, too.
        """
        for name in names:
            shutil.rmtree(self.folder / name, ignore_errors=True)  # of another attempt
            if (self.work / name).exists():
                os.replace(self.work / name, self.folder / name)

    def _touch(self, seconds: float) -> None:
        while not self._done.wait(seconds):
            if _read(self.path).get("token", self.token) != self.token:
                return
            try:
                os.utime(self.path)
            except OSError:  # for a moment the file system is away; there will be a next time
                continue


def claim(
    folder: Path, patience: float = PATIENCE_SECONDS, touch_seconds: float = TOUCH_SECONDS
) -> TrialLock | None:
    """Claim a unit's folder, which is made if it lacks; None if another process has it.

    Args:
        patience: seconds without a touch after which a claim counts for nothing. That of a process
            of this machine that is no more counts for nothing at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, token = folder / LOCK_NAME, uuid.uuid4().hex
    if _make(path, token):
        return TrialLock(folder, token, touch_seconds)
    theirs = _read(path)
    if not _is_dead(path, theirs, patience):
        return None
    # of a given claim there is one heir: who makes this file
    successor = folder / f"{LOCK_NAME}.{theirs.get('token', 'unreadable')}.heir"
    if not _make(successor, token):
        if age(successor) > patience:  # it died in turn, between here and the end of this function
            successor.unlink(missing_ok=True)
        return None
    # the claim may have had an heir already, who was done with that file when it was made anew
    inherits = _read(path).get("token") == theirs.get("token")
    if inherits:
        fresh = folder / f".{LOCK_NAME}.{token}"
        _make(fresh, token)
        os.replace(fresh, path)
    successor.unlink(missing_ok=True)
    return TrialLock(folder, token, touch_seconds) if inherits else None


def holder(folder: Path) -> str | None:
    """Who has a unit, as text; None if nobody."""
    facts = _read(folder / LOCK_NAME)
    return f"process {facts.get('pid')} on {facts.get('host')}" if facts else None


def _make(path: Path, token: str) -> bool:
    """Make a claim file with its content, exclusively; False if it is there already."""
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
    """The facts of a claim; none if it is gone, not written yet, or damaged."""
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
    """What tells within which numbers of processes are one another's.

    Names of hosts do not: containers, and machines of a cluster, often go by the same one.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
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
