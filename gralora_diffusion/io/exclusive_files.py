"""Files that only one of several processes creates."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def create_once(path: Path, content: bytes, mode: int = 0o666) -> bool:
    """Create a file with this content, unless there is one; return whether this call created it.

    A reader sees all of the content or no file. On file systems without hard links, such as exFAT,
    it may see a file that is still empty for an instant.

    Args:
        mode: permissions, less those that the process's umask removes.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        _write_new(temporary, content, mode)
        try:
            os.link(temporary, path)  # fails if it exists
            return True
        except FileExistsError:
            return False
        except OSError:  # there are no links here
            pass
    finally:
        temporary.unlink(missing_ok=True)
    try:
        _write_new(path, content, mode)
    except FileExistsError:
        return False
    return True


def _write_new(path: Path, content: bytes, mode: int) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, mode)  # nothing is removed if it is somebody else's
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
