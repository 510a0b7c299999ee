"""The singular values of low-rank updates, computed from their factors, and what they say.

This module uses numpy alone, because ``gralora inspect`` should not wait for torch. Factors have
the shapes of :mod:`.low_rank` and :mod:`gralora_diffusion.adapters.layers.functional`. Everything
is computed in float64; see :mod:`.low_rank` for the method.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Values = NDArray[np.float64]


def matrix_singular_values(matrix: Array) -> Values:
    """Return the singular values of a matrix, largest first; NaN if it is not finite."""
    if not np.isfinite(matrix).all():
        return np.full(min(matrix.shape), math.nan)
    values: Values = np.linalg.svd(matrix.astype(np.float64, copy=False), compute_uv=False)
    return values


def singular_values(down: Array, up: Array) -> Values:
    """Return the update's singular values in float64, largest first: at most min(R, out, c).

    All others are zero. The update of a convolution is treated as a matrix (out, c).

    Args:
        down: (R, in, ...).
        up: (out, R).
    """
    rows = down.reshape(len(down), math.prod(down.shape[1:]))
    with np.errstate(over="ignore", invalid="ignore"):  # the result says so
        core = _triangle(up) @ _triangle(rows.T).T
    return matrix_singular_values(core)


def gralora_singular_values(
    A: Array, B: Array, general: tuple[Array, Array] | None = None
) -> Values:
    """Return the singular values of an unscaled GraLoRA update in float64, largest first.

    The result is that of :func:`singular_values` of the pair from ``functional.lora_factors``, but
    the matrix of k (r + hybrid) rows and columns takes k times fewer operations: input and output
    blocks do not overlap, so each has its own basis.

    Args:
        A, B: (k, i, r, ...) and (k, r, o).
        general: the hybrid's pair, (hybrid, in, ...) and (out, hybrid).
    """
    (k, _, r), s = A.shape[:3], A.shape[2] // A.shape[0]
    inputs, outputs = np.moveaxis(A, 2, -1).reshape(k, -1, r), B.transpose(0, 2, 1)
    if general:
        down, up = general
        rows = down.reshape(len(down), k, -1).transpose(1, 2, 0)
        inputs = np.concatenate([inputs, rows], axis=-1)
        outputs = np.concatenate([outputs, up.reshape(k, -1, up.shape[1])], axis=-1)
    with np.errstate(over="ignore", invalid="ignore"):
        inputs, outputs = _triangle(inputs), _triangle(outputs)
        # block (j, n) joins chunk n of output block j and chunk j of input block n
        ours = outputs[..., :r].reshape(k, -1, k, s), inputs[..., :r].reshape(k, -1, k, s)
        core = np.einsum("jpns,nqjs->jpnq", *ours, optimize=True)
        core = core + np.einsum("jph,nqh->jpnq", outputs[..., r:], inputs[..., r:], optimize=True)
    return matrix_singular_values(core.reshape(k * outputs.shape[1], -1))


def effective_rank(values: Values) -> float:
    """Return exp(-sum p ln p), where p are the singular values over their sum.

    It lies between 1 and the rank: n equal singular values give n. An update of zeros gives 0. This
    is the definition of Roy and Vetterli, "The effective rank: a measure of effective
    dimensionality", EUSIPCO 2007. It uses the values themselves, not their squares.
    """
    total = values.sum()
    if not total > 0:
        return 0.0
    parts = values / total
    logs = np.log(parts, out=np.zeros_like(parts), where=parts > 0)
    return float(np.exp(-(parts * logs).sum()))


def stable_rank(values: Values) -> float:
    """Return the sum of the squared singular values over the largest square.

    It lies between 1 and the rank, and hardly counts values that are small beside the largest, such
    as those of noise, which the effective rank does. An update of zeros gives 0. The definition is
    that of Rudelson and Vershynin, "Sampling from large matrices", J. ACM 54, 2007.
    """
    if not len(values) or not values[0] > 0:
        return 0.0
    return float(np.square(values / values[0]).sum())


def _triangle(matrix: Array) -> Array:
    """Return R (..., q, columns) of the QR decomposition of ``matrix`` (..., rows, columns)."""
    return np.asarray(np.linalg.qr(matrix.astype(np.float64, copy=False), mode="r"))
