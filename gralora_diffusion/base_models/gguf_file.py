"""GGUF files as bases: a denoiser whose linear layers stay quantized, read by diffusers.

Such a file has the keys of an original single file, and weights in the formats of llama.cpp.
"""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

from gralora_diffusion.io.tensor_files import StoredTensor

SUFFIX = ".gguf"
#: Formats that are plain numbers.
_PLAIN = ("F32", "F16")
#: Kinds of values in a header -> bytes of the scalars; the others have lengths of their own.
_SCALARS = {**dict.fromkeys((0, 1, 7), 1), 2: 2, 3: 2, **dict.fromkeys((4, 5, 6), 4)}
_SCALARS |= dict.fromkeys((10, 11, 12), 8)
_STRING, _ARRAY = 8, 9
#: Values in a header, and how deep arrays are nested; vocabularies have far fewer.
_MOST_VALUES, _MOST_DEPTH = 4_000_000, 4


def is_gguf(path: str) -> bool:
    """Whether this is the name of a GGUF file."""
    return path.lower().endswith(SUFFIX)


def is_packed(parameter: object) -> bool:
    """Whether a model's parameter is a quantized weight of a GGUF file, as diffusers keeps it.

    It is recognized by its name, because its module needs the library.
    """
    return type(parameter).__name__ == "GGUFParameter"


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file, by key; only its header is read.

    Raises:
        ValueError: it is not a complete GGUF file, or has formats that diffusers cannot read.
        OSError: it cannot be read.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("it is a GGUF file, which needs: pip install gguf")
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES
    from gguf import GGUFReader

    if not path.is_file():
        raise ValueError("it is not a regular file")
    try:
        _check_lengths(path)
        reader: Any = GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
        raise ValueError(f"it is not a complete GGUF file ({error})") from error
    readable = {*_PLAIN, *(kind.name for kind in SUPPORTED_GGUF_QUANT_TYPES)}
    if others := sorted({t.tensor_type.name for t in reader.tensors} - readable):
        raise ValueError(
            f"it has weights in {', '.join(others)}, which cannot be read. The formats are "
            f"{', '.join(sorted(readable))}"
        )
    return {
        tensor.name: StoredTensor(
            path,
            tensor.name,
            tensor.tensor_type.name,
            tuple(int(size) for size in reversed(tensor.shape)),
            int(tensor.data_offset),
            int(tensor.n_bytes),
        )
        for tensor in reader.tensors
    }


def load_tensors(path: Path) -> dict[str, Any]:
    """Read the tensors of a file as diffusers takes them; quantized ones stay quantized."""
    from diffusers.models.model_loading_utils import load_gguf_checkpoint

    return dict(load_gguf_checkpoint(path, return_tensors=True))


def _check_lengths(path: Path) -> None:
    """Check that the values of a header end within the file, since GGUFReader reads on without end.

    Raises:
        ValueError: they do not, or there are too many.
        struct.error: the file ends within one.
    """
    size, values = path.stat().st_size, 0
    with path.open("rb") as file:

        def number(code: str) -> int:
            form = order + code
            return int(struct.unpack(form, file.read(struct.calcsize(form)))[0])

        def skip(length: int) -> None:
            if length > size - file.tell():
                raise ValueError("its header is longer than the file")
            file.seek(length, 1)

        def many(count: int) -> int:
            nonlocal values
            values += count
            if values > _MOST_VALUES:
                raise ValueError("its header has too many values")
            return count

        def skip_value(kind: int, depth: int = 0) -> None:
            if kind in _SCALARS:
                skip(_SCALARS[kind])
            elif kind == _STRING:
                skip(number("Q"))
            elif kind == _ARRAY and depth < _MOST_DEPTH:
                inner, count = number("I"), many(number("Q"))
                if inner in _SCALARS:
                    skip(count * _SCALARS[inner])
                else:
                    for _ in range(count):
                        skip_value(inner, depth + 1)
            else:
                raise ValueError(f"its header has values of an unknown kind {kind}")

        order = "<"
        skip(4)  # "GGUF", which the reader checks
        if number("I") & 0xFFFF == 0:  # the version, written on a machine of the other byte order
            order = ">"
        number("Q")  # of tensors
        for _ in range(many(number("Q"))):
            skip(number("Q"))
            skip_value(number("I"))
