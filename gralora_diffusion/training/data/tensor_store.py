"""Named tensors by key, in memory or in a folder that several processes fill and read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from gralora_diffusion.io.errors import AdapterFileError, DataError
from gralora_diffusion.io.tensor_files import read_header, write_safetensors

from .store_index import StoreIndex, stamp_of

logger = logging.getLogger(__name__)

#: The field of a file's metadata for a hash of its tensors; files of earlier versions lack it.
_HASH_FIELD = "content_sha256"


def hash_of(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hash settings, and the names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(data)
    return digest.hexdigest()


class TensorStore:
    """Named tensors by key, on the CPU.

    Without a folder, each process keeps everything in its memory. With a folder, each key has a
    file, which is read on demand. Several processes may fill and read one folder, since a file
    appears under its name only when it is complete.

    Args:
        folder: created if it does not exist.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder else None
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._damaged: list[Path] = []
        self._index = StoreIndex(self.folder) if self.folder else None

    def __contains__(self, key: str) -> bool:
        """Return whether the tensors are there; see :meth:`finish_looking`.

        Only the header and the length of their file are checked, unless they were before. Its
        content is checked when it is read, because reading a large folder takes minutes.
        """
        if self._index is None:
            return key in self._memory
        path, digest = self._path(key), _digest(key)
        try:
            status = os.stat(path)
        except OSError:
            return False
        if not stat.S_ISREG(status.st_mode):
            return False
        if self._index.knows(digest, stamp_of(status)):
            return True
        try:
            _read_checked_header(Path(path))
        except (AdapterFileError, OSError):  # OSError: another process has just removed it
            self._damaged.append(Path(path))
            return False
        self._index.add(digest, stamp_of(status))
        return True

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        """Return the tensors by name.

        Raises:
            KeyError: they were never stored.
            DataError: their file has been removed or damaged. A damaged file is removed, so that
                the next start encodes its content again.
        """
        if self.folder is None:
            return self._memory[key]
        path = Path(self._path(key))
        try:
            metadata = _read_checked_header(path)
            tensors = load(path.read_bytes())  # not mapped: another process may replace the file
            if metadata.get(_HASH_FIELD, found := hash_of({}, tensors)) != found:
                raise AdapterFileError(f"{path}: its content is not what was written")
        except (AdapterFileError, OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                path.unlink()
            problem = f"{error}. Start again; whatever is missing will be encoded again"
            raise DataError(f"cache {self.folder}", [problem]) from error
        return tensors

    def __setitem__(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors, which must be on the CPU and must not share memory.

        Raises:
            DataError: the folder cannot be written.
        """
        if self.folder is None or self._index is None:
            self._memory[key] = dict(tensors)
            return
        path = self._path(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            metadata = {"format": "pt", _HASH_FIELD: hash_of({}, tensors)}
            write_safetensors(tensors, Path(path), metadata)
            with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                self._index.add(_digest(key), stamp_of(os.stat(path)))
        except (OSError, SafetensorError) as error:
            problem = (
                f"cannot be written: {error}. Free some space, give another folder, or leave it "
                "out to keep everything in memory"
            )
            raise DataError(f"--latent_cache_dir {str(self.folder)!r}", [problem]) from error

    def finish_looking(self) -> None:
        """Remember the files that are complete, and warn of others found since the last call."""
        if self._index is not None:
            self._index.save()
        if self._damaged:
            logger.warning(
                "cache %s: %d damaged files, which are encoded again: %s%s",
                self.folder,
                len(self._damaged),
                ", ".join(path.name for path in self._damaged[:3]),
                ", ..." if len(self._damaged) > 3 else "",
            )
        self._damaged.clear()

    def _path(self, key: str) -> str:
        # a text, because a path takes ten times as long, and there may be 100,000 of them
        return f"{self.folder}{os.sep}{key}.safetensors"


def _digest(key: str) -> bytes:
    """Return a key as the index has it."""
    return hashlib.sha256(key.encode()).digest()


def _read_checked_header(path: Path) -> dict[str, str]:
    """Return a file's metadata; raise an AdapterFileError unless its header can be read."""
    stored, metadata = read_header(path)
    for tensor in stored.values():
        _ = tensor.dtype  # raises if torch does not have it
    return metadata
