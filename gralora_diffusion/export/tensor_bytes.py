"""Create, read and write safetensors files as bytes at any offset."""

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
#: safetensors' names of dtypes in the order of their tensors in a file, the widest first.
_ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)


def count(shape: Shape) -> int:
    """Return the number of values of a tensor with this shape."""
    return math.prod(shape)


def make_header(
    tensors: Sequence[tuple[str, torch.dtype, Shape]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """Return a header as safetensors writes it, the offset of each tensor, and the file's size.

    Args:
        tensors: key, dtype and shape.
    """
    if len({key for key, *_ in tensors}) < len(tensors):
        raise ValueError("two tensors have the same name")
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    begin, offsets = 0, {}
    # wide dtypes first, so that each value's offset is a multiple of its size
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
    """Raise OSError if there is not enough space for a file of this many bytes at ``path``."""
    free = shutil.disk_usage(path.parent).free
    if free < total:
        raise OSError(
            f"{path}: not enough space; {total / 2**30:.2f} GiB are needed, and "
            f"{free / 2**30:.2f} GiB are free"
        )


class Files:
    """An output of a known size and its sources, used by several threads at any offset.

    Without a path, there are only sources.
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
                raise AdapterFileError(
                    f"{path} became shorter while it was read. Check that no other program "
                    "changes it, and try again"
                )
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
        """Copy bytes of a source to the output, in the kernel if possible."""
        source = self._source(path)
        while count and hasattr(os, "copy_file_range"):
            try:
                done = os.copy_file_range(source, self.output, count, start, offset)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                    raise
                break  # not supported between these file systems
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
    """Return the memory of a tensor as one contiguous view."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
