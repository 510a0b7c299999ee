"""One owner per folder: what keeps two runs from writing into the same one.

The owner holds a lock of the operating system (flock, or its like on Windows), which ends with its
process, however that ends. A file beside it says who that is.
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
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout

from gralora_diffusion.io.cleanup_on_exit import cleanup_on_exit
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.json_files import read_object
from gralora_diffusion.io.tensor_files import replacing

from .agreement import from_first

logger = logging.getLogger(__name__)

LOCK_NAME, OWNER_NAME = ".gralora.lock", ".gralora.owner"
#: Bytes that an owner's file has at most.
_ENOUGH = 1000
#: By which files it is known what a folder is of.
CONFIG_NAME, BENCHMARK_NAME = "training_config.yaml", "benchmark.yaml"
#: How file systems say that they have no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextmanager
def owned(folder: Path, told: str, patience: float = 0.0) -> Iterator[None]:
    """Inside, ``folder`` belongs to this process and to no other one.

    It is made, and removed again if nothing was put into it. Where the file system has no locks,
    as some network file systems, a warning says so.

    Args:
        told: what names the folder in a message, such as ``--output_dir 'out'``.
        patience: seconds to wait for another owner.

    Raises:
        ConfigError: another process has it; says which, or that the folder cannot be made.
    """
    lock = FileLock(folder / LOCK_NAME)
    owner = folder / OWNER_NAME
    made = _missing(folder)

    def tidy() -> None:
        if not lock.is_locked:
            return
        owner.unlink(missing_ok=True)
        # while it is held: who opened it meanwhile finds that it is gone, and begins again
        with suppress(OSError):
            (folder / LOCK_NAME).unlink(missing_ok=True)
        lock.release()
        _remove_empty(made)

    with cleanup_on_exit(tidy):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=patience)
            with replacing(owner, sync=False) as temporary:
                temporary.write_text(json.dumps(_facts()), encoding="utf-8")
        except Timeout:
            raise ConfigError(
                [
                    f"{told} is in use by {_owner(owner)}; two at once would overwrite each "
                    "other's files. Wait until it has ended, end it, or give another folder"
                ]
            ) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                _remove_empty(made)
                raise ConfigError(
                    [f"{told} cannot be written to ({error}). Give another folder"]
                ) from error
            logger.warning(
                "%s: its file system has no locks (%s), so a second run in this folder would not "
                "be noticed. Start none",
                told,
                error,
            )
        yield


@contextmanager
def owned_by_run(accelerator: Accelerator, folder: Path, told: str) -> Iterator[None]:
    """Inside, ``folder`` belongs to this run: its first process owns it for all of them.

    Every process must enter it; see :func:`owned`.
    """
    with ExitStack() as held:
        from_first(accelerator, lambda: held.enter_context(owned(folder, told)))
        yield


def _facts() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}


def _owner(path: Path) -> str:
    """Who has a folder, as its file says; the file may hold anything."""
    try:
        facts = read_object(path, _ENOUGH)
        pid, host = int(facts["pid"]), str(facts["host"])
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(facts["since"])))
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return "another process"  # which has not written it yet
    return f"process {pid} on {re.sub('[^A-Za-z0-9._-]', '?', host)[:100]} since {since}"


def _missing(folder: Path) -> list[Path]:
    """The folder and those it lies in, as far as they are to be made; the innermost first."""
    return [path for path in (folder, *folder.absolute().parents) if not path.exists()]


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # the first that holds something ends it
        for path in folders:
            path.rmdir()
