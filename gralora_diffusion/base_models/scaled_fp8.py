"""ComfyUI's scaled fp8 files as bases: weights in fp8 with a scale for each tensor.

Older files have ``scale_weight`` beside each weight and one marker, ``scaled_fp8``
(``comfy/ops.py`` of ComfyUI 0.3.64). Newer ones have ``weight_scale``, and name each layer's format
in a tensor, ``comfy_quant``, or in the header (``QUANTIZATION.md`` of ComfyUI). Scales of inputs
only serve fp8 products. This package has none, so they are not used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gralora_diffusion.io.json_files import parse_object
from gralora_diffusion.io.tensor_files import StoredTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Formats by ComfyUI's names; the others pack several values, or have a scale for each block.
FORMATS = ("float8_e4m3fn", "float8_e5m2")
_DTYPES = ("F8_E4M3", "F8_E5M2")
_SCALES = (".scale_weight", ".weight_scale")
_OF_INPUTS = (".scale_input", ".input_scale")
#: Bytes of the text that names a format, at most.
_MOST_BYTES = 4096
_FORMAT, _MARKER = ".comfy_quant", "scaled_fp8"


def find_scales(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Return the keys of fp8 weights that have one scale -> the key of the scale."""
    found = {}
    for key in tensors:
        if key.endswith(_SCALES):
            weight = f"{key.rpartition('.')[0]}.weight"
            stored = tensors.get(weight)
            if stored and stored.dtype_name in _DTYPES and tensors[key].shape in ((), (1,)):
                found[weight] = key
    return found


def explained(tensors: Mapping[str, StoredTensor]) -> set[str]:
    """Return the keys that only scaled fp8 files have, of weights that :func:`read` can read."""
    scales = find_scales(tensors)
    keys = {*scales, *scales.values()}
    for key in tensors:
        start, _, end = key.rpartition(".")
        if end == _MARKER or (f".{end}" in (_FORMAT, *_OF_INPUTS) and f"{start}.weight" in scales):
            keys.add(key)
    return keys


def stored_formats(tensors: Mapping[str, StoredTensor]) -> set[str]:
    """Return the formats that the layers of a file name in tensors of their own.

    What is no name of a format is left out.
    """
    found = set()
    for key, tensor in tensors.items():
        if key.endswith(_FORMAT) and tensor.nbytes <= _MOST_BYTES:
            with open(tensor.path, "rb") as file:
                file.seek(tensor.offset)
                content = file.read(tensor.nbytes)
            try:
                name = parse_object(content)["format"]
            except (ValueError, KeyError):
                continue
            if isinstance(name, str) and name.isascii() and name.isidentifier():
                found.add(name)
    return found


def read(tensors: dict[str, Tensor], scales: Mapping[str, str], dtype: torch.dtype) -> None:
    """Replace weights by their values, and remove what else only these files have, in place.

    A value is ``weight * scale``, formed in fp32 and rounded once to ``dtype``.

    Args:
        scales: result of :func:`find_scales`.

    Raises:
        ValueError: a layer has another format, or a scale is not a positive finite number.
    """
    for weight, key in scales.items():
        start = weight.removesuffix(".weight")
        _check_format(start, tensors.pop(f"{start}{_FORMAT}", None))
        scale = _checked_scale(key, tensors.pop(key))
        tensors[weight] = (tensors[weight].float() * scale).to(dtype)
        for end in _OF_INPUTS:
            tensors.pop(f"{start}{end}", None)
    for key in [key for key in tensors if key.rpartition(".")[2] == _MARKER]:
        del tensors[key]


def read_scales(tensors: Mapping[str, StoredTensor]) -> dict[str, float]:
    """Return the keys of fp8 weights that have one scale -> its value. No weight is read.

    Raises:
        ValueError: as :func:`read`.
    """
    found = {}
    for weight, key in find_scales(tensors).items():
        start = weight.removesuffix(".weight")
        stored = tensors.get(f"{start}{_FORMAT}")
        _check_format(start, None if stored is None else _load(stored))
        found[weight] = _checked_scale(key, _load(tensors[key]))
    return found


def _load(stored: StoredTensor) -> Tensor:
    from safetensors import safe_open

    with safe_open(stored.path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(stored.key)
    return tensor


def _checked_scale(key: str, stored: Tensor) -> float:
    scale = stored.float().item()
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{key} is {scale:g}; a scale must be positive and finite")
    return scale


def _check_format(layer: str, stored: Tensor | None) -> None:
    """Check the JSON in a layer's ``comfy_quant`` tensor, if it has one."""
    if stored is None:
        return
    try:
        found = parse_object(bytes(stored.tolist()))["format"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{layer}{_FORMAT} cannot be read ({error})") from error
    if found not in FORMATS:
        raise ValueError(
            f"{layer} has the format {found!r}; only {' and '.join(FORMATS)} can be read"
        )
