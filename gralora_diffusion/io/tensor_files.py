"""Complete safetensors files: written as a whole or not at all, and refused if incomplete.

Headers are only read here.
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
from .json_files import check_separators, parse_object
from .regular_files import is_regular

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Fields of the metadata for hashes of the tensors -> placeholders; see ``file_hashes``.
HASH_FIELDS = {
    "modelspec.hash_sha256": "0x" + "0" * 64,
    "sshs_model_hash": "0" * 64,
    "sshs_legacy_hash": "0" * 8,
}
#: The longest header that safetensors reads (``MAX_HEADER_SIZE`` in its ``tensor.rs``).
_MOST_HEADER_BYTES = 100_000_000
#: torch's limits: 64 dimensions, and a number of bytes that fits into 64 bits for any dtype.
_MOST_DIMENSIONS, _MOST_ELEMENTS = 64, 1 << 59
#: Dtypes of less than a byte, with which torch cannot compute. They have neither NaN nor infinity,
#: because they have few bits (OCP's Microscaling Formats).
SUB_BYTE = ("F4", "F6_E2M3", "F6_E3M2")
#: The range of bytes for the legacy hash.
_LEGACY_START, _LEGACY_END = 0x100000, 0x110000


_PICKLE = (
    "a pickle (.ckpt, .pt, .bin), which may run any program when it is read, so it was not read. "
    "Convert it to .safetensors in a safe environment"
)
#: First bytes of files of other kinds -> a description of the kind.
_OTHER_FILES = {
    b"PK\x03\x04": "a zip archive or a pickle (.ckpt, .pt), which may run any program when it is "
    "read, so it was not read. Unpack the archive, or convert the pickle to .safetensors in a safe "
    "environment",
    b"\x80\x02": _PICKLE,
    b"\x80\x04": _PICKLE,
    b"GGUF": "a GGUF file, whose weights are quantized: they can be neither adapted nor fused. "
    "Pass the .safetensors file that it was made from",
    b"<": "a web page in place of the file. Download it again; log in if the site requires it",
    b"version https://git-lfs": "a pointer of Git LFS in place of the file. Fetch it with "
    "`git lfs pull`",
}


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]
) -> None:
    """Write the file. It appears under its name once it is complete.

    The same content gives the same bytes. Fields of ``HASH_FIELDS`` in the metadata are filled in.
    """
    from safetensors.torch import save_file

    metadata = {**metadata, **{key: HASH_FIELDS[key] for key in HASH_FIELDS if key in metadata}}
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(dict(tensors), temporary, metadata=metadata)
        temporary.chmod(mode)  # the usual mode, because safetensors makes the file private
        finish_header(temporary)


def finish_header(path: Path) -> None:
    """Sort the metadata, which safetensors writes in random order, and fill in the hashes.

    The file does not get longer, because ``HASH_FIELDS`` reserved room for the hashes.
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
    """Return ``HASH_FIELDS`` of a safetensors file.

    Two are sha256 of everything after the header: ``modelspec.hash_sha256`` (Stability AI's
    ModelSpec 1.0.1) and ``sshs_model_hash`` (kohya's sd-scripts, ``addnet_hash_safetensors``).
    ``sshs_legacy_hash`` covers 64 KiB from 1 MiB on, in a file with the same tensors and only the
    metadata that starts with "ss_" (``precalculate_safetensors_hashes``, ``addnet_hash_legacy``).
    For smaller files, it is the hash of an empty string.
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
    """Return a header as safetensors writes it."""
    return json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and rename it to ``path`` if the body succeeds.

    Neither a kill nor a full disk then damages an existing file.

    Args:
        sync: wait for the disk, so that a power failure does not damage it either. This takes long
            for gigabytes.
    """
    # in a folder that machines share, two processes may have the same number
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with cleanup_on_exit(lambda: temporary.unlink(missing_ok=True)):
        yield temporary
        if sync:
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of a safetensors file describes it.

    Attributes:
        key: its key in the file.
        dtype_name: the format's name of the dtype, such as "BF16".
        offset: position of its first byte in the file.
    """

    path: Path
    key: str
    dtype_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in torch.

        Raises:
            AdapterFileError: torch does not have this dtype.
        """
        from safetensors.torch import _TYPES

        if self.dtype_name in SUB_BYTE or (dtype := _TYPES.get(self.dtype_name)) is None:
            raise AdapterFileError(
                f"{self.path}: {self.key} is stored as {self.dtype_name}, which torch cannot read."
            )
        return dtype


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of a safetensors file, in their order in the file, and its metadata.

    Raises:
        AdapterFileError: the file does not exist, is truncated or is not safetensors, or its header
            is inconsistent or exceeds torch's limits.
    """
    if path.exists() and not is_regular(path):  # opening a named pipe would block forever
        raise AdapterFileError(f"{path}: this is not a regular file. Pass a .safetensors file.")
    try:
        with open(path, "rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            text = file.read(min(begin - 8, _MOST_HEADER_BYTES))
        check_separators(text)  # millions of names would fill the memory of safetensors, too
        # it checks length, shapes, gaps and overlaps; numpy, because torch takes seconds to import
        with safe_open(path, framework="np"):
            pass
        header = parse_object(text)
        # safetensors' JSON reader, serde, also accepts lists for objects, and objects for names
        if odd := [key for key, entry in header.items() if not _is_plain(key, entry)]:
            raise ValueError(f"the entry of {odd[0]!r:.80} does not follow the format")
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(f"{path}: {_why_unreadable(path, error)}") from error
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        # the format allows any shape for a tensor without elements
        if len(shape) > _MOST_DIMENSIONS or math.prod(max(n, 1) for n in shape) > _MOST_ELEMENTS:
            raise AdapterFileError(
                f"{path}: {key!r:.80} has {len(shape)} dimensions or more elements than torch can "
                "address. The file is damaged: download it again."
            )
        tensors[key] = StoredTensor(path, key, entry["dtype"], shape, begin + start, stop - start)
    return tensors, metadata


def _is_plain(key: str, entry: object) -> bool:
    """Whether an entry of a header that safetensors accepts has the form that it writes."""
    if key == "__metadata__" and entry is None:
        return True
    return isinstance(entry, dict) and isinstance(entry.get("dtype", ""), str)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file.

    Raises:
        AdapterFileError: as :func:`read_header`, or torch cannot compute with the dtype of a
            tensor.
    """
    for stored in read_header(path)[0].values():
        if stored.dtype_name in SUB_BYTE:
            raise AdapterFileError(
                f"{path}: {stored.key!r:.200} is stored as {stored.dtype_name}, with which torch "
                "cannot compute. Save the file in fp16, bf16 or fp32."
            )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path}: {_why_unreadable(path, error)}") from error


def _why_unreadable(path: Path, error: Exception) -> str:
    """Describe a file that safetensors does not read, and what to do."""
    if not path.is_file():
        return f"no such file ({error})"
    size = path.stat().st_size
    with open(path, "rb") as file:
        beginning = file.read(64)
    declared = int.from_bytes(beginning[:8], "little")  # the length of the header
    # the length of a header may look like the first bytes of another kind of file
    is_ours = declared <= _MOST_HEADER_BYTES and beginning[8:9] in (b"{", b"")
    if not is_ours or size < 8:
        for start, what in _OTHER_FILES.items():
            if beginning.startswith(start):
                return what
    if size > 8 and not is_ours:
        return f"not a safetensors file ({size:,} bytes): {error}"
    what = f"damaged or truncated ({error})" if size else "an empty file"
    return (
        f"not a complete safetensors file ({size:,} bytes): {what}. If it was downloaded or "
        "copied, download or copy it again"
    )


def is_real(tensor: Tensor, factor: bool) -> bool:
    """Whether a tensor has a dtype of weights, with which torch can compute.

    torch would copy the real parts of complex numbers, with a warning at most.

    Args:
        factor: whether it belongs to an adapter's factors, which are no integers either.
    """
    if "float4" in str(tensor.dtype) or tensor.is_complex():
        return False
    return tensor.is_floating_point() or not factor


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor on any device has neither NaN nor infinity.

    A sum is only finite if all its terms are, and it takes a tenth of the time of checking each
    term. That check is only needed if the sum is not finite: large terms may sum to infinity.
    """
    import torch

    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if torch.isfinite(tensor.sum(dtype=torch.float32)):
        return True
    return bool(torch.isfinite(tensor.float() if tensor.itemsize < 2 else tensor).all())
