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


def is_gguf(path: str) -> bool:
    """Whether this is the name of a GGUF file."""
    return path.lower().endswith(SUFFIX)


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
