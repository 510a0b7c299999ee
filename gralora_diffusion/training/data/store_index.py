"""Which files of a folder of tensors were looked at before, so that a start need not open them.

Opening a hundred thousand files takes half a minute. An entry of a file counts while its size and
its times of modification and of status change stay the same. It is a promise that the header was
complete; the content is checked whenever a file is read.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gralora_diffusion.io.regular_files import check_regular
from gralora_diffusion.io.tensor_files import replacing

logger = logging.getLogger(__name__)

#: Name of the file in the folder.
INDEX_NAME = "checked-tensors.npy"
#: Bytes of the file at most: sixteen million entries.
_MOST_BYTES = 1 << 30
#: Digest of a key, and a file's size and times in nanoseconds. A digest compares as it should,
#: although numpy leaves out zeros at its end, because all are equally long.
_ROW = np.dtype([("key", "S32"), ("size", "<i8"), ("modified", "<i8"), ("changed", "<i8")])

#: Size in bytes, and the times of modification and status change in nanoseconds.
Stamp = tuple[int, int, int]


def stamp_of(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


class StoreIndex:
    """Stamps of files by the digests of their keys, in a file of the same folder.

    Several processes may use one folder: each adds its own entries to those that are there.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / INDEX_NAME
        self._rows: NDArray[Any] | None = None  # read at the first question
        self._new: list[tuple[bytes, int, int, int]] = []

    def knows(self, digest: bytes, stamp: Stamp) -> bool:
        """Return whether the file of a key was complete when it had this stamp."""
        if self._rows is None:
            self._rows = _read(self._path)
        place = int(self._rows["key"].searchsorted(digest))
        if place == len(self._rows):
            return False
        return bool(self._rows[place].item() == (digest.rstrip(b"\0"), *stamp))

    def add(self, digest: bytes, stamp: Stamp) -> None:
        """Note that the file of a key is complete."""
        self._new.append((digest, *stamp))

    def save(self) -> None:
        """Write new entries, and forget all, which take memory."""
        new, self._rows = np.array(self._new, _ROW), None
        self._new.clear()
        if not len(new):
            return
        rows = np.concatenate([new[::-1], _read(self._path)])
        # of several entries with one key, the first is the newest
        rows = rows[np.unique(rows["key"], return_index=True)[1]]
        try:
            with replacing(self._path) as temporary, temporary.open("wb") as file:
                np.save(file, rows, allow_pickle=False)
        except OSError as problem:
            logger.warning(
                "%s cannot be written: %s. The next start looks at the files again",
                self._path,
                problem,
            )


def _read(path: Path) -> NDArray[Any]:
    """Return the entries of a file, by key; none if it is gone, damaged, or of another version."""
    with contextlib.suppress(Exception):  # numpy may raise anything on damaged files
        if check_regular(path).st_size <= _MOST_BYTES:
            rows = np.load(path, allow_pickle=False)
            if (
                rows.dtype == _ROW
                and rows.ndim == 1
                and (rows["key"][:-1] <= rows["key"][1:]).all()
            ):
                return rows
    return np.empty(0, _ROW)
