"""Convert outputs to another dtype, with fp8 in ComfyUI's format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .plan import Owned
from .rounding import DTYPES
from .streaming import OutputTensor, Piece

_FP8 = DTYPES["fp8_e4m3"]


def converted(
    outputs: Sequence[Owned], dtype: str, denoiser: str, scale_prefix: str | None = None
) -> list[OutputTensor]:
    """Return the tensors in a dtype of ``choices.DTYPE_CHOICES``.

    Only floating-point tensors of components are converted. For fp8, only the matrices of the
    denoiser's linear layers are converted; norms, biases, convolutions and the other components
    keep their dtype.

    Args:
        denoiser: name of the denoiser.
        scale_prefix: prefix of the denoiser's keys; if given, fp8 has a scale per tensor. The names
            are those of ComfyUI up to 0.3.64 (``scaled_fp8``, ``scale_weight``), which later
            versions convert on loading (``convert_old_quants``). Two values in ``scaled_fp8``
            request products in full precision.
    """
    if dtype == "keep":
        return [output for _, output in outputs]
    wanted, made = DTYPES[dtype], []
    for component, output in outputs:
        if not component or not output.dtype.is_floating_point:
            made.append(output)
        elif wanted != _FP8:
            made.append(replace(output, dtype=wanted))
        elif component == denoiser and len(output.shape) == 2 and output.key.endswith(".weight"):
            scale_key = output.key.removesuffix("weight") + "scale_weight"
            made.append(
                replace(output, dtype=_FP8, scale_key=None if scale_prefix is None else scale_key)
            )
        else:
            made.append(output)
    if wanted == _FP8 and scale_prefix is not None:
        marker = Piece(torch.zeros(2).to(_FP8), 0, 2)
        made.append(OutputTensor(f"{scale_prefix}scaled_fp8", (2,), _FP8, (marker,)))
    return made
