"""The dtypes of weights, by the short names that options, files and reports use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Short name -> torch's name. torch itself takes seconds to import.
NAMES = {
    "fp64": "float64",
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a short name. ``no``, accelerate's word for no mixed precision, is fp32.

    Raises:
        KeyError: there is no such name.
    """
    import torch

    dtype: torch.dtype = getattr(torch, NAMES["fp32" if name == "no" else name])
    return dtype


def short_name(dtype: torch.dtype) -> str:
    """Return the short name of a dtype, or torch's own name if it has none."""
    name = str(dtype).removeprefix("torch.")
    return next((short for short, full in NAMES.items() if full == name), name)
