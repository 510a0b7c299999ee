"""Safetensors files by their bytes: a new header, reading and writing at any place."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock

import torch
from safetensors.torch import _TYPES
from torch import Tensor

from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.key_maps import Shape

_COPY_BYTES = 1 << 26
_BINARY = getattr(os, "O_BINARY", 0)
_TYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}
#: In the order in which safetensors lays out their tensors: the widest first.
_ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)


def count(shape: Shape) -> int:
    """How many values a tensor of this shape has."""
    return math.prod(shape)


def make_header(
    tensors: Sequence[tuple[str, torch.dtype, Shape]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """Return a header as safetensors writes it, where each tensor begins, and the file's size.

    Args:
        tensors: key, dtype and shape.
    """
    if len({key for key, *_ in tensors}) < len(tensors):
        raise ValueError("two tensors of one name")
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    begin, offsets = 0, {}
    # wide dtypes first, so that each value lies at a multiple of its size
    order = {_TYPES[name]: number for number, name in enumerate(_ORDER)}
    for key, dtype, shape in sorted(tensors, key=lambda tensor: (order[tensor[1]], tensor[0])):
        end = begin + count(shape) * dtype.itemsize
        entries[key] = {
            "dtype": _TYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
        offsets[key], begin = begin, end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = {key: len(header) + offset for key, offset in offsets.items()}
    return header, offsets, len(header) + begin


def check_space(path: Path, total: int) -> None:
    """Raise OSError if a file of so many bytes does not fit where it is to lie."""
    free = shutil.disk_usage(path.parent).free
    if free < total:
        raise OSError(
            f"{path}: {total / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free there"
        )


class Files:
    """An output of a known size and its sources, at any place and by several threads at once.

    Without a path there are sources only.
    """

    def __init__(self, path: Path | None = None, total: int = 0) -> None:
        self.path, self.total = path, total
        self.sources: dict[Path, int] = {}
        self.lock = Lock()

    def __enter__(self) -> Files:
        if self.path:
            self.output = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | _BINARY, 0o666)
            os.ftruncate(self.output, self.total)
        return self

    def __exit__(self, *_: object) -> None:
        for file in (*([self.output] if self.path else []), *self.sources.values()):
            os.close(file)

    def _source(self, path: Path) -> int:
        with self.lock:
            if path not in self.sources:
                self.sources[path] = os.open(path, os.O_RDONLY | _BINARY)
            return self.sources[path]

    def read(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from a source."""
        source = self._source(path)
        while buffer:
            if hasattr(os, "preadv"):
                count = os.preadv(source, [buffer], offset)
            else:
                with self.lock:
                    os.lseek(source, offset, os.SEEK_SET)
                    data = os.read(source, len(buffer))
                count = len(data)
                buffer[:count] = data
            if not count:
                raise AdapterFileError(f"{path}: it became shorter while it was read")
            buffer, offset = buffer[count:], offset + count

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write to the output."""
        rest = memoryview(data)
        while rest:
            if hasattr(os, "pwrite"):
                count = os.pwrite(self.output, rest, offset)
            else:
                with self.lock:
                    os.lseek(self.output, offset, os.SEEK_SET)
                    count = os.write(self.output, rest)
            rest, offset = rest[count:], offset + count

    def copy(self, path: Path, start: int, offset: int, count: int) -> None:
        """Copy bytes of a source to the output, by the kernel where it can."""
        source = self._source(path)
        while count and hasattr(os, "copy_file_range"):
            try:
                done = os.copy_file_range(source, self.output, count, start, offset)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                    raise
                break  # not between these file systems
            if not done:
                break
            start, offset, count = start + done, offset + done, count - done
        buffer = memoryview(bytearray(min(count, _COPY_BYTES)))
        while count:
            here = buffer[:count]
            self.read(path, start, here)
            self.write(here, offset)
            start, offset, count = start + len(here), offset + len(here), count - len(here)


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor in one piece."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
