"""Safetensors files that are whole: written all or not at all, and refused when they are not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class AdapterFileError(ValueError):
    """An adapter file that cannot be used; says where, what was found and what to do."""


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]
) -> None:
    """Write the file; it appears under its name only when it is whole.

    The same content makes the same bytes.
    """
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        temporary.chmod(mode)  # the usual one, where safetensors makes the file private
        _sort_header(temporary)


def _sort_header(path: Path) -> None:
    """Put the metadata in order, which safetensors writes in a random one."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # the same text in another order; the rest is padding
            file.seek(8)
            file.write(text.ljust(size))


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """Give a name beside ``path`` to write to, and rename it into place if all went well.

    So neither a kill nor a full disk harms what was there.

    Args:
        sync: wait for the disk, so that a loss of power does not harm it either. That takes long
            for gigabytes.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        if sync:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file.

    Raises:
        AdapterFileError: truncated, or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise AdapterFileError(
            f"{path}: not a whole safetensors file ({size:,} bytes): {error}. If it was downloaded "
            "or copied, fetch it again."
        ) from error
