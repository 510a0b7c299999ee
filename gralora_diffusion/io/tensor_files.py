"""Safetensors files that are whole: written all or not at all, and refused when they are not.

Headers, too, are read here, and here alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from .cleanup_on_exit import cleanup_on_exit
from .errors import AdapterFileError
from .json_files import parse_object
from .regular_files import is_regular

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Fields of the metadata that are hashes of the tensors -> room for them; see ``file_hashes``.
HASH_FIELDS = {
    "modelspec.hash_sha256": "0x" + "0" * 64,
    "sshs_model_hash": "0" * 64,
    "sshs_legacy_hash": "0" * 8,
}
#: The longest header that safetensors reads (``MAX_HEADER_SIZE`` in its ``tensor.rs``).
_MOST_HEADER_BYTES = 100_000_000
#: What torch holds: 64 dimensions, and bytes that a signed number of 64 bits counts in any dtype.
_MOST_DIMENSIONS, _MOST_ELEMENTS = 64, 1 << 59
#: The bytes of a file that its legacy hash is of.
_LEGACY_START, _LEGACY_END = 0x100000, 0x110000


_PICKLE = (
    "a pickle (.ckpt, .pt, .bin), which may run any program when it is read, so it was not read. "
    "Convert it to .safetensors in a place where that does no harm"
)
#: How files begin that are something else.
_OTHER_FILES = {
    b"PK\x03\x04": _PICKLE,
    b"\x80\x02": _PICKLE,
    b"\x80\x04": _PICKLE,
    b"GGUF": "a GGUF file, whose weights are quantized: they can be neither adapted nor fused. "
    "Give the .safetensors file that it was made of",
    b"<": "a web page in place of the file. Download it again, logged in if the site asks for it",
    b"version https://git-lfs": "a pointer of Git LFS in place of the file. Fetch it with "
    "`git lfs pull`",
}


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]
) -> None:
    """Write the file; it appears under its name only when it is whole.

    The same content makes the same bytes. Of ``HASH_FIELDS``, those that the metadata has get their
    values here.
    """
    from safetensors.torch import save_file

    metadata = {**metadata, **{key: HASH_FIELDS[key] for key in HASH_FIELDS if key in metadata}}
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(dict(tensors), temporary, metadata=metadata)
        temporary.chmod(mode)  # the usual one, where safetensors makes the file private
        finish_header(temporary)


def finish_header(path: Path) -> None:
    """Put the metadata in order, which safetensors writes in a random one, and fill in the hashes.

    The file is not longer afterwards: ``HASH_FIELDS`` kept room for them.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        metadata = header["__metadata__"]
        if HASH_FIELDS.keys() & metadata.keys():
            hashes = file_hashes(path)
            metadata |= {key: hashes[key] for key in HASH_FIELDS if key in metadata}
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = _as_text(header)
        if len(text) <= size:  # the same text in another order; the rest is padding
            file.seek(8)
            file.write(text.ljust(size))


def file_hashes(path: Path) -> dict[str, str]:
    """Return ``HASH_FIELDS`` of a safetensors file, which depend on its tensors alone.

    Two are sha256 of all behind the header: ``modelspec.hash_sha256`` (Stability AI's ModelSpec
    1.0.1) and ``sshs_model_hash`` (kohya's sd-scripts, ``addnet_hash_safetensors``).
    ``sshs_legacy_hash`` is of 64 KiB from 1 MiB on, in a file of the same tensors with no metadata
    but what begins with "ss_" (``precalculate_safetensors_hashes``, ``addnet_hash_legacy``): for
    smaller files, of nothing.
    """
    whole = hashlib.sha256()
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        while chunk := file.read(1 << 20):
            whole.update(chunk)
        metadata = header.get("__metadata__", {})
        header["__metadata__"] = {k: v for k, v in metadata.items() if k.startswith("ss_")}
        text = _as_text(header)
        text += b" " * (-len(text) % 8)  # as safetensors pads it
        front = len(text).to_bytes(8, "little") + text
        legacy = front[_LEGACY_START:_LEGACY_END]
        file.seek(8 + size + max(0, _LEGACY_START - len(front)))
        legacy += file.read(_LEGACY_END - _LEGACY_START - len(legacy))
    return {
        "modelspec.hash_sha256": f"0x{whole.hexdigest()}",
        "sshs_model_hash": whole.hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
    }


def _as_text(header: Mapping[str, object]) -> bytes:
    """A header as safetensors writes it."""
    return json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """Give a name beside ``path`` to write to, and rename it into place if all went well.

    So neither a kill nor a full disk harms what was there.

    Args:
        sync: wait for the disk, so that a loss of power does not harm it either. That takes long
            for gigabytes.
    """
    # on a folder that machines share, processes of two of them may have the same number
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with cleanup_on_exit(lambda: temporary.unlink(missing_ok=True)):
        yield temporary
        if sync:
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a safetensors file says of a tensor, and where it lies.

    Attributes:
        key: there.
        dtype_name: as the format calls it, such as "BF16".
        offset: its first byte, counted from the beginning of the file.
    """

    path: Path
    key: str
    dtype_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The same in torch.

        Raises:
            AdapterFileError: the format has it, torch has not.
        """
        from safetensors.torch import _TYPES

        if (dtype := _TYPES.get(self.dtype_name)) is None:
            raise AdapterFileError(
                f"{self.path}: {self.key} is stored as {self.dtype_name}, which torch cannot read."
            )
        return dtype


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of a safetensors file, in their order there, and its metadata.

    Raises:
        AdapterFileError: truncated, not safetensors, no file at all, or of a header that
            contradicts itself or that torch has no room for.
    """
    if path.exists() and not is_regular(path):  # to open a named pipe would block for ever
        raise AdapterFileError(f"{path}: it is no file that can be read, such as a named pipe.")
    try:
        # checks length, shapes, gaps and overlaps; without torch, which takes seconds to import
        with safe_open(path, framework="np"):
            pass
        with open(path, "rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            header = parse_object(file.read(begin - 8))
        # serde, which safetensors reads JSON with, also takes lists for objects, objects for names
        if odd := [key for key, entry in header.items() if not _is_plain(key, entry)]:
            raise ValueError(f"{odd[0]!r:.80} is not described as the format has it")
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(f"{path}: {_why_unreadable(path, error)}") from error
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        # a tensor without elements may have any shape as far as the format is concerned
        if len(shape) > _MOST_DIMENSIONS or math.prod(max(n, 1) for n in shape) > _MOST_ELEMENTS:
            raise AdapterFileError(
                f"{path}: {key!r:.80} has {len(shape)} dimensions or more elements than torch can "
                "address. The file is damaged: fetch it again."
            )
        tensors[key] = StoredTensor(path, key, entry["dtype"], shape, begin + start, stop - start)
    return tensors, metadata


def _is_plain(key: str, entry: object) -> bool:
    """Whether an entry of a header that safetensors reads has the form that it writes."""
    if key == "__metadata__" and entry is None:
        return True
    return isinstance(entry, dict) and isinstance(entry.get("dtype", ""), str)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file.

    Raises:
        AdapterFileError: as :func:`read_header`.
    """
    read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path}: {_why_unreadable(path, error)}") from error


def _why_unreadable(path: Path, error: Exception) -> str:
    """What a file is that safetensors does not read, and what to do."""
    if not path.is_file():
        return f"no such file ({error})"
    size = path.stat().st_size
    with open(path, "rb") as file:
        beginning = file.read(64)
    declared = int.from_bytes(beginning[:8], "little")  # how long the header is
    # the length of a header may look like the beginning of another file
    is_ours = declared <= _MOST_HEADER_BYTES and beginning[8:9] in (b"{", b"")
    if not is_ours or size < 8:
        for start, what in _OTHER_FILES.items():
            if beginning.startswith(start):
                return what
    if size > 8 and not is_ours:
        return f"not a safetensors file ({size:,} bytes): {error}"
    what = f"damaged or truncated ({error})" if size else "an empty file"
    return (
        f"not a whole safetensors file ({size:,} bytes): {what}. If it was downloaded or copied, "
        "fetch it again"
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor, on whatever device, has neither NaN nor infinity.

    A sum is finite only if its terms are, and to form it takes a tenth of the time that looking at
    each does, which is left to do where large terms sum to infinity.
    """
    import torch

    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if torch.isfinite(tensor.sum(dtype=torch.float32)):
        return True
    return bool(torch.isfinite(tensor.float() if tensor.itemsize < 2 else tensor).all())
