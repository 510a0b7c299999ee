"""Which jobs are the user's own: a signature that only a secret file of the user can make.

A studio's folder may come from somebody else, with jobs that wait in its queue. They could upload
or overwrite anything. So only what this user has put into this folder is started.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gralora_diffusion.io.exclusive_files import create_once
from gralora_diffusion.io.file_names import real_path
from gralora_diffusion.io.regular_files import read_regular

#: Environment variable with the folder of the key, if it is not the usual one.
STATE = "GRALORA_STATE"
_SIGNATURE, _FILES = "signature", "files"
_KEY_BYTES = 32
#: Of a file that a job reads, in bytes.
_MOST_BYTES = 16 << 20


def key_path() -> Path:
    """Return the path of the user's key."""
    if given := os.environ.get(STATE):
        return Path(given).expanduser() / "studio.key"
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    else:
        base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "gralora" / "studio.key"


def make_key() -> None:
    """Write the user's key unless there is one.

    Raises:
        OSError: it cannot be written or read, or is damaged.
    """
    path = key_path()
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # another process may be faster
        create_once(path, secrets.token_hex(_KEY_BYTES).encode(), 0o600)
    _key()


def signed(folder: Path, facts: dict[str, Any], files: Iterable[str]) -> dict[str, Any]:
    """Return what a job's file says, with the hashes of the files that it reads and a signature.

    Args:
        folder: the job's folder; elsewhere, the signature does not hold.
        files: names of the files there that the command reads.

    Raises:
        OSError: a file or the key cannot be read or written.
    """
    make_key()
    facts = {**facts, _FILES: {name: _hash(folder / name) for name in files}}
    return {**facts, _SIGNATURE: _signature(folder, facts)}


def is_signed(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether a job is this user's, for this folder, and it and its files are unchanged."""
    with suppress(OSError, ValueError, RecursionError):
        unsigned = {name: value for name, value in facts.items() if name != _SIGNATURE}
        given = str(facts.get(_SIGNATURE, "")).encode("utf-8", "replace")
        if hmac.compare_digest(given, _signature(folder, unsigned).encode()):
            return all(_hash(folder / name) == known for name, known in facts[_FILES].items())
    return False


def _signature(folder: Path, facts: dict[str, Any]) -> str:
    content = json.dumps([str(real_path(folder)), facts], sort_keys=True)
    return hmac.new(_key(), content.encode(), "sha256").hexdigest()


def _key() -> bytes:
    key = read_regular(key_path(), 2 * _KEY_BYTES)
    if len(key) != 2 * _KEY_BYTES:
        raise OSError(f"'{key_path()}' is damaged. Delete it")
    return key


def _hash(path: Path) -> str:
    return hashlib.sha256(read_regular(path, _MOST_BYTES)).hexdigest()
