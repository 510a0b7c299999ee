"""One owner per folder, so that two runs do not write into the same one.

The owner holds a lock of the operating system (flock, or its equivalent on Windows), which is
released when its process ends for any reason. A file beside the lock says who the owner is.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from gralora_diffusion.io.cleanup_on_exit import cleanup_on_exit
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.json_files import read_object
from gralora_diffusion.io.tensor_files import replacing

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

LOCK_NAME, OWNER_NAME = ".gralora.lock", ".gralora.owner"
#: Maximum size of an owner's file in bytes.
_ENOUGH = 1000
#: Files that identify the folder of a training and of a benchmark.
CONFIG_NAME, BENCHMARK_NAME = "training_config.yaml", "benchmark.yaml"
#: Seconds to wait for the folder, which :func:`is_owned` holds for less than a thousandth of one.
_A_MOMENT = 0.1
#: Errors of file systems without locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextmanager
def owned(folder: Path, label: str) -> Iterator[None]:
    """Make this process the only owner of ``folder`` inside.

    The folder is created, and removed again if it is left empty. If its file system has no locks,
    as with some network file systems, a warning says so.

    Args:
        label: name of the folder in messages, such as ``--output_dir 'out'``.

    Raises:
        ConfigError: another process owns it, which the error names, or it cannot be created.
    """
    lock = FileLock(folder / LOCK_NAME)
    owner = folder / OWNER_NAME
    made = _missing(folder)

    def tidy() -> None:
        if not lock.is_locked:
            return
        owner.unlink(missing_ok=True)
        # deleted while locked: whoever opened it meanwhile finds it gone and starts over
        with suppress(OSError):
            (folder / LOCK_NAME).unlink(missing_ok=True)
        lock.release()
        _remove_empty(made)

    with cleanup_on_exit(tidy):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_own(folder / LOCK_NAME)
            lock.acquire(timeout=_A_MOMENT)
            with replacing(owner, sync=False) as temporary:
                temporary.write_text(json.dumps(_facts()), encoding="utf-8")
        except Timeout:
            raise ConfigError(
                [
                    f"{label} is in use by {owner_name(folder)}; two processes would overwrite "
                    "each other's files. Wait until it has ended, end it, or give another folder"
                ]
            ) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                _remove_empty(made)
                raise ConfigError(
                    [f"{label} cannot be written to ({error}). Give another folder"]
                ) from error
            logger.warning(
                "%s is on a file system without locks (%s), so a second run in this folder would "
                "not be noticed. Do not start one",
                label,
                error,
            )
        yield


@contextmanager
def owned_by_run(accelerator: Accelerator, folder: Path, label: str) -> Iterator[None]:
    """Make this run the owner of ``folder`` inside; its first process owns it for all.

    Every process must enter it; see :func:`owned`.
    """
    from .agreement import from_first  # accelerate takes seconds to import

    with ExitStack() as held:
        from_first(accelerator, lambda: held.enter_context(owned(folder, label)))
        yield


def is_owned(folder: Path) -> bool | None:
    """Whether a living process owns ``folder``; None if its file system has no locks, or its lock
    is a link or no file.

    The lock of a process that was killed is free, whatever it left behind. Nothing is written.
    """
    path = folder / LOCK_NAME
    if not path.exists():
        return False
    try:
        _check_own(path)
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return None


def _check_own(path: Path) -> None:
    """Check that a lock is not a link: some versions of filelock empty the file it leads to.

    Raises:
        OSError: it is a link, or no file.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OSError(errno.ELOOP, "it is a link or no file, delete it", str(path))


def owner_facts(folder: Path) -> tuple[int, str, float] | None:
    """Return process id, host and start, in seconds since 1970, by the owner's file.

    Returns None if there is no such file or it is damaged. Its values may be anything.
    """
    try:
        facts = read_object(folder / OWNER_NAME, _ENOUGH)
        host = re.sub("[^A-Za-z0-9._-]", "?", str(facts["host"]))[:100]
        pid = int(facts["pid"])
        return (pid, host, float(facts["since"])) if 0 <= pid < 1 << 31 else None
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return None


def _facts() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}


def owner_name(folder: Path) -> str:
    """Return who owns a folder, by its owner's file."""
    facts = owner_facts(folder)
    if facts is None:
        return "another process"  # it has not written the file yet
    pid, host, since = facts
    try:
        start = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
    except (OSError, ValueError, OverflowError):
        return "another process"
    return f"process {pid} on {host} since {start}"


def _missing(folder: Path) -> list[Path]:
    """Return the folder and its parents that do not exist yet, the innermost first."""
    return [path for path in (folder, *folder.absolute().parents) if not path.exists()]


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # stops at the first that is not empty
        for path in folders:
            path.rmdir()
