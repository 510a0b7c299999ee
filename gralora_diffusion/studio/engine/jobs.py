"""Commands that the studio starts: each a process of its own, kept in a folder of its own.

A job outlives the page and the studio: it is found again by its files. Its folder holds
``job.json`` (what to run), then ``started.json`` (which process runs it), ``log.txt`` and
``ended.json`` (the exit code). Jobs that wait their turn are the queue.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from gralora_diffusion.io.json_files import read_object
from gralora_diffusion.io.regular_files import is_regular

from .job_process import CANCELLED, ENDED, JOB, MOST_BYTES, STARTED, write
from .signatures import is_signed, signed
from .workspace import stamp

State = Literal["waiting", "running", "done", "failed", "stopped", "cancelled"]
_STOPPED, _LOG = "stopped.json", "log.txt"
_PROCESS = "gralora_diffusion.studio.engine.job_process"
# How the arguments of Python begin in the only commands that are run.
GRALORA = ("-m", "gralora_diffusion")
COMPARING = ("-m", "gralora_diffusion.studio.engine.comparing")
PROGRAMS = (GRALORA, COMPARING)
#: With it, one progress bar inside another goes back to the line of the outer one.
_UP = "\x1b[A"
#: Bytes at the end of a log that are shown.
_TAIL = 1 << 16
#: Seconds within which a new process says that it has started; else it is killed.
_PATIENCE = 120.0


@dataclass(frozen=True)
class Job:
    """A command and what became of it.

    Attributes:
        kind: what it is for, such as "train".
        title: its name for users.
        command: the arguments of Python; those of ``gralora`` come from :func:`gralora`.
        output: what it writes, a folder or a file; None if it only prints.
        queued: it waits until no other such job is running.
        own: this user has made it here; others are shown, and never started.
    """

    folder: Path
    kind: str
    title: str
    command: tuple[str, ...]
    output: Path | None
    queued: bool
    own: bool = True

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def state(self) -> State:
        """Where it stands, by its files and its process."""
        if (self.folder / CANCELLED).exists():
            return "cancelled"
        code = self.code
        if code is None and not (self.folder / STARTED).exists():
            return "waiting" if self.own else "cancelled"
        if code is None and self._process() is not None:
            return "running"
        if code == 0:
            return "done"
        return "stopped" if (self.folder / _STOPPED).exists() else "failed"

    @property
    def code(self) -> int | None:
        """The exit code; None if it has not ended, or was killed with the process that ran it."""
        with suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
            return int(read_object(self.folder / ENDED, MOST_BYTES)["code"])
        return None

    def log(self) -> str:
        """Return the end of its output. Of a progress bar, the last state is shown."""
        path = self.folder / _LOG
        if path.is_symlink() or not is_regular(path):
            return ""
        try:
            with path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
                text = file.read(_TAIL).decode("utf-8", "replace")
        except OSError:
            return ""
        lines = text.replace(_UP, "").split("\n")
        return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)

    def stop(self) -> None:
        """Ask it to end: with SIGTERM if it is running, and before it starts if it waits."""
        if self.state == "waiting":
            write(self.folder / CANCELLED, {})
            if not (self.folder / STARTED).exists():
                return
            # it has started in the meantime, and may not have seen the file
            write(self.folder / _STOPPED, {})
            (self.folder / CANCELLED).unlink()
        if (process := self._process()) is not None:
            write(self.folder / _STOPPED, {})
            with suppress(psutil.Error):
                process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> State:
        """Wait until it has ended, for at most this time; return its state."""
        end = time.monotonic() + seconds
        while (state := self.state) in ("waiting", "running") and time.monotonic() < end:
            time.sleep(0.1)
        return state

    def _process(self) -> psutil.Process | None:
        """Return the process that runs it, if it is alive and not a later one of this number."""
        with suppress(OSError, ValueError, KeyError, TypeError, OverflowError, psutil.Error):
            facts = read_object(self.folder / STARTED, MOST_BYTES)
            process = psutil.Process(int(facts["pid"]))
            line = process.cmdline()  # not its start: the clock may have been set since
            if _PROCESS in line and Path(line[-1]).name == self.name:
                return process
        return None


def gralora(*arguments: str) -> tuple[str, ...]:
    """Return the arguments of Python that run the command ``gralora``."""
    return (*GRALORA, *arguments)


class Jobs:
    """All jobs in a folder; those that are ``queued`` run one at a time, in order.

    Args:
        at_once: queued jobs that may run at the same time.
        programs: how the commands of jobs must begin; others are left alone.
    """

    def __init__(
        self, folder: Path, at_once: int = 1, programs: Sequence[tuple[str, ...]] = PROGRAMS
    ) -> None:
        self.folder, self.at_once, self.programs = folder, at_once, programs
        self._lock = threading.Lock()
        self._known: dict[Path, Job] = {}

    def add(
        self,
        kind: str,
        title: str,
        command: Sequence[str],
        output: Path | None = None,
        *,
        queued: bool = False,
        files: dict[str, str] | None = None,
    ) -> Job:
        """Write a job to its folder, and start it now unless it is ``queued``.

        Args:
            command: arguments of Python; ``{folder}`` in them is the job's folder.
            files: name -> content of text files that the command reads there.
        """
        order = f"{time.time_ns() % 10**9:09d}"  # within a second
        folder = self.folder / f"{stamp()}-{order}-{kind}-{secrets.token_hex(2)}"
        folder.mkdir(parents=True)
        files = files or {}
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
        facts = {
            "kind": kind,
            "title": title,
            "command": [part.replace("{folder}", str(folder)) for part in command],
            "output": str(output) if output else None,
            "queued": queued,
        }
        write(folder / JOB, signed(folder, facts, files))
        job = self._read(folder)
        assert job is not None
        if queued:
            self.start_waiting()
        else:
            _start(job)
        return job

    def list(self) -> list[Job]:
        """Return all jobs, the oldest first."""
        folders = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        return [job for folder in folders if (job := self._read(folder)) is not None]

    def find(self, name: str) -> Job | None:
        """Return the job with this name."""
        return next((job for job in self.list() if job.name == name), None)

    def start_waiting(self) -> None:
        """Start waiting jobs of the queue while fewer than ``at_once`` are running."""
        with self._lock:
            queue = [(job, job.state) for job in self.list() if job.queued]
            free = self.at_once - sum(state == "running" for _, state in queue)
            for job in [job for job, state in queue if state == "waiting"][: max(0, free)]:
                _start(job)

    def _read(self, folder: Path) -> Job | None:
        """Return the job in a folder.

        None while it is being written, if it is damaged, if it would run another program, or if
        the folder is a link.
        """
        if folder not in self._known:
            if folder.is_symlink():
                return None
            try:
                facts = read_object(folder / JOB, MOST_BYTES)
                job = Job(
                    folder,
                    str(facts["kind"]),
                    str(facts["title"]),
                    tuple(map(str, facts["command"])),
                    Path(facts["output"]) if facts["output"] else None,
                    bool(facts["queued"]),
                    is_signed(folder, facts),
                )
            except (OSError, ValueError, KeyError, TypeError):
                return None
            if not any(job.command[: len(begin)] == begin for begin in self.programs):
                return None
            self._known[folder] = job
        return self._known[folder]


def _start(job: Job) -> None:
    """Start the process of a job, in a session of its own, and wait until it has begun."""
    line = [sys.executable, "-m", _PROCESS, str(job.folder)]
    environment = {
        **os.environ,
        # a bar is written to the log every two seconds, and a line at once
        "TQDM_MININTERVAL": "2",
        "PYTHONUNBUFFERED": "1",
        # the current folder may be somebody else's: no modules from there
        "PYTHONSAFEPATH": "1",
    }
    log_path = job.folder / _LOG
    log_path.unlink(missing_ok=True)  # a link or a pipe: no job has a log before it has begun
    with log_path.open("xb") as log:
        process = subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    # reaps it, so that it does not stay as a zombie while the studio lives
    threading.Thread(target=process.wait, daemon=True).start()
    end = time.monotonic() + _PATIENCE
    while not (job.folder / STARTED).exists() and process.poll() is None:
        if time.monotonic() > end:
            process.kill()
            process.wait()
        time.sleep(0.02)
    if not (job.folder / STARTED).exists() and process.poll() is not None:
        write(job.folder / ENDED, {"code": process.returncode or 1})
