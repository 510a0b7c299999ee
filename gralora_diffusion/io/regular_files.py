"""Read untrusted paths safely: only regular files are opened."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def is_regular(path: Path) -> bool:
    """Whether a path leads to a regular file, directly or through links.

    A name that no file can have, such as one that is too long, does not.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def check_regular(path: str | Path) -> os.stat_result:
    """Return the status of a regular file, so that it may be opened; links are followed.

    A named pipe would block forever, and a device may never end.

    Raises:
        OSError: there is no such file, or it is not a regular one.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(f"it is {kind}, not a file")
    return status


def read_regular(path: str | Path, limit: int) -> bytes:
    """Return the bytes of a regular file; links are followed.

    Args:
        limit: maximum number of bytes.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is longer than ``limit``.
    """
    status = check_regular(path)
    if status.st_size > limit:
        raise OSError(f"it has {status.st_size:,} bytes; at most {limit:,} are allowed")
    with open(path, "rb") as file:
        return file.read()
