"""Cases, read in a process of their own that is used again, watched and, if need be, ended."""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

from .damage import PROGRAM_NAME, damage

#: What a case may take.
MOST_SECONDS, MOST_BYTES = 5.0, 1 << 30
#: After so many seconds of wall clock without an answer a process is ended.
PATIENCE = 40.0
_PREPARING = 300.0
#: Events of Python's that change files, with the places of their paths among the arguments.
_WRITING = {
    **dict.fromkeys(
        ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.utime"), 1
    ),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile"), 2),
}
_LEAVING = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
)
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        error: the type of the documented error by which it was refused.
        fault: what is wrong with how it was read, if anything is.
        details: for people: the damage, and where in the package the fault is.
        seconds: processor time of the reading.
        memory: bytes that the process gained at its peak.
    """

    number: int
    error: str | None = None
    fault: str | None = None
    details: str = ""
    seconds: float = 0.0
    memory: int = 0


class Worker:
    """A process that reads cases, as a context. After a hang or a crash it is a new one."""

    def __init__(self) -> None:
        self._root = tempfile.mkdtemp(prefix="fuzzing-")
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        shutil.rmtree(self._root, ignore_errors=True)

    def read(self, name: str, seed: int, number: int) -> Outcome:
        """Read a case.

        Raises:
            RuntimeError: the reader's undamaged samples cannot be read.
        """
        if self._process is None:
            self._start()
        assert self._pipe is not None
        self._pipe.send((name, seed, number))
        ready = self._answer(_PREPARING)
        if ready != "ready":
            self._end()
            raise RuntimeError(f"{name}: undamaged samples are not read: {ready}")
        outcome = self._answer(PATIENCE)
        if isinstance(outcome, Outcome):
            return outcome
        code = self._end()
        fault = "hang: no answer in time" if outcome is None else f"crash: exit code {code}"
        return Outcome(number, fault=fault)

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._root, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def _answer(self, seconds: float) -> Any:
        """What the process says; None if nothing in time; "" if it has ended."""
        assert self._pipe is not None
        try:
            return self._pipe.recv() if self._pipe.poll(seconds) else None
        except (EOFError, OSError):
            return ""

    def _end(self) -> int | None:
        """End the process; return the exit code that it had itself, if it has ended before."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.join(1)
        code = process.exitcode
        process.kill()
        process.join()
        return code


# -- in the process --------------------------------------------------------------------------------


class _Watch:
    """Python's audit events for writes that a reader must not make."""

    def __init__(self) -> None:
        self.inside: str | None = None  # where may be written; "" nowhere; None: not watched
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        paths: tuple[Any, ...] = ()
        if event == "open":
            paths = args[:1] if isinstance(args[2], int) and args[2] & _TO_WRITE else ()
        elif event in _WRITING:
            paths = args[: _WRITING[event]]
        elif event in _LEAVING:
            self.seen.append(event)
        for path in paths:
            if isinstance(path, int) or path == os.devnull:
                continue
            folder, file = os.path.split(os.path.abspath(os.fsdecode(path)))
            real = os.path.join(os.path.realpath(folder), file)
            if event == "open" and not args[2] & (os.O_EXCL | os.O_NOFOLLOW):  # it follows links
                real = os.path.realpath(real)
            if not (self.inside and f"{real}/".startswith(f"{self.inside}/")):
                self.seen.append(f"{event} {os.fsdecode(path)!r:.100}")


def _serve(root: str, pipe: Connection) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.dont_write_bytecode = True
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    tempfile.tempdir = tempfile.mkdtemp(dir=root)
    os.chdir(tempfile.tempdir)
    from .readers import READERS

    case, made = Path(tempfile.tempdir) / "case", dict[str, Path]()
    watch = _Watch()
    while True:
        try:
            name, seed, number = pipe.recv()
        except EOFError:
            return
        try:
            if name not in made:
                made[name] = _prepared(READERS[name], case)
            pipe.send("ready")
            done = damaged_case(name, seed, number, made[name], case)
        except BaseException:
            pipe.send(traceback.format_exc())
            return
        pipe.send(_read(READERS[name], case, number, done, watch))


def _prepared(reader: Any, case: Path) -> Path:
    """Samples of a reader, which are read once undamaged."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    samples = Path(tempfile.mkdtemp())
    reader.make(samples)
    for sample in sorted(samples.iterdir()):
        _remove(case)
        shutil.copytree(sample, case, symlinks=True)
        os.chdir(case)
        reader.read(case)
        os.chdir(case.parent)
    gc.collect()
    gc.freeze()  # what is imported by now is left out of the collections in each case
    # far above the limit, so that no case takes the machine down before it is measured
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + 4 * MOST_BYTES, hard))
    return samples


def damaged_case(name: str, seed: int, number: int, samples: Path, case: Path) -> str:
    """Put a damaged sample into a folder; return what was done."""
    _remove(case)
    chance = Random(f"{name} {seed} {number}")
    sample = chance.choice(sorted(samples.iterdir()))
    shutil.copytree(sample, case, symlinks=True)
    return f"{sample.name}/{damage(case, chance)}"


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _read(reader: Any, case: Path, number: int, done: str, watch: _Watch) -> Outcome:
    error, fault, details = None, None, done
    before, held = _contents(case), _reset_peak()
    watch.seen.clear()
    os.chdir(case)
    watch.inside = os.path.realpath(case) if reader.writes else ""
    start = time.process_time()
    try:
        reader.read(case)
    except reader.errors as refusal:
        error = type(refusal).__name__
        str(refusal)
    except BaseException as wrong:
        fault, details = _described(wrong, done)
    finally:
        watch.inside = None
        os.chdir(case.parent)
    seconds, peak = time.process_time() - start, _status("VmHWM") - held
    if fault is None and seconds > MOST_SECONDS:
        fault = f"slow: {seconds:.1f} s"
    if fault is None and peak > MOST_BYTES:
        fault = f"memory: {peak / 2**30:.1f} GiB"
    if watch.seen:
        fault = f"it wrote or left the process: {watch.seen[0]}"
    changed = _contents(case) != before
    if (changed and not reader.writes) or list(case.rglob(PROGRAM_NAME)):
        fault = "the folder is another one after reading"
    gc.collect(0)
    return Outcome(number, error, fault, details, seconds, peak)


def _described(error: BaseException, done: str) -> tuple[str, str]:
    """An error with the last place in the package that it passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/gralora_diffusion/" in f.filename] or frames[-1:]
    with contextlib.suppress(IndexError):
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
    text = "".join(traceback.format_exception(error))
    return f"{type(error).__name__} at {place}", f"{done}\n{text[-4000:]}"


def _contents(folder: Path) -> list[tuple[str, int, int]]:
    """Return path, size and modification time of everything in a folder."""
    found = []
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found.append((str(path), status.st_size, status.st_mtime_ns))
    return found


def _status(field: str) -> int:
    """Bytes, by Linux's account of this process; 0 on another system, where nothing is measured."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    return int(found[1]) << 10 if found else 0


def _reset_peak() -> int:
    """Reset the measured peak; return the bytes in memory."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")
