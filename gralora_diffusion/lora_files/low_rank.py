"""The mathematics of low-rank pairs, the form of every LoRA, without forming the dense update.

A pair is ``down`` (R, in), or (R, in, h, w) for a convolution, and ``up`` (out, R); its update of a
weight is ``up @ down``, (out, in) or (out, in, h, w). Below, c is in, or in * h * w.

Everything is computed in float64, from thin QR decompositions of both and a small matrix between
them::

    up = Q_up R_up,  down^T = Q_down R_down,  up @ down = Q_up (R_up R_down^T) Q_down^T

The matrix in the middle, at most R x R, has the singular values of the update. This takes
O((out + c) R^2) operations; a decomposition of the update itself would take O(out c min(out, c)).
Results are in float32, or in float64 if the pair is, so that the caller rounds them once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def truncate(
    down: Tensor, up: Tensor, rank: int | None = None, energy: float | None = None
) -> tuple[Tensor, Tensor, float]:
    """Return the best pair of lower rank (Eckart-Young), and its error.

    Each singular value is split evenly between the two factors, which keeps them in the range of
    half precision.

    Args:
        rank: the largest rank of the new pair. If the pair's own rank is not larger, the pair is
            returned unchanged.
        energy: in (0, 1]; the smallest rank that keeps this part of the squared Frobenius norm. If
            ``rank`` is given too, the smaller of both counts.

    Returns:
        ``down``, ``up`` and the Frobenius norm of the lost part of the update, relative to the
        whole. An update of zeros gives a pair of rank 1 (or the unchanged pair) and error 0.

    Raises:
        ValueError: rank and energy are both missing or invalid, the shapes do not form a pair, or
            there are NaN or infinite values.
    """
    if rank is None and energy is None:
        raise ValueError("truncate: pass rank, energy or both")
    if rank is not None and rank < 1:
        raise ValueError(f"truncate: rank should be at least 1 but is {rank}")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ValueError(f"truncate: energy should be in (0, 1] but is {energy}")
    matrix = _matrix(down, up)
    if energy is None and rank is not None and rank >= len(down):
        return _rounded(down, down), _rounded(up, down), 0.0
    U, values, V = _decompose(matrix, up)
    kept = len(values) if energy is None else _rank_of_energy(values, energy)
    kept = min(kept, rank or kept)
    if not values.any():
        kept = 1
    new_down, new_up = _balanced(U[:, :kept], values[:kept], V[:, :kept])
    new_down = new_down.reshape(kept, *down.shape[1:])
    return _rounded(new_down, down), _rounded(new_up, down), _relative(values[kept:], values)


def norm(down: Tensor, up: Tensor) -> float:
    """Return the Frobenius norm of the update."""
    return float(torch.linalg.matrix_norm(_core(_matrix(down, up), up)[1]))


def join_rows(pairs: Sequence[Pair]) -> Pair:
    """Return the pair of a layer that joins the outputs of several layers with the same input.

    This joins separately adapted queries, keys and values exactly: ``down`` (sum of R, in, ...) is
    stacked, ``up`` (sum of out, sum of R) is block-diagonal. A layer without an update is a pair of
    rank 0.

    Raises:
        ValueError: inputs or kernels differ, or there are no pairs.
    """
    inputs = [tuple(down.shape[1:]) for down, _ in pairs]
    if len(set(inputs)) != 1:
        got = ", ".join(map(str, inputs)) or "none"
        raise ValueError(f"join_rows: expected pairs of layers with the same input, got {got}")
    for down, up in pairs:
        if len(down) or up.shape[1]:
            _matrix(down, up)
    return torch.cat([down for down, _ in pairs]), torch.block_diag(*[up for _, up in pairs])


def split(down: Tensor, up: Tensor, rank: int) -> tuple[Pair, Pair]:
    """Return two pairs whose sum is the pair.

    The first has this rank and the update's largest singular values; the second has the rest.
    """
    U, values, V = _decompose(_matrix(down, up), up)
    halves = []
    for part in (slice(None, rank), slice(rank, None)):
        d, u = _balanced(U[:, part], values[part], V[:, part])
        halves.append((_rounded(d.reshape(-1, *down.shape[1:]), down), _rounded(u, down)))
    return halves[0], halves[1]


def gralora_factors(down: Tensor, up: Tensor, rank: int, k: int) -> tuple[Tensor, Tensor, float]:
    """Return the pair in GraLoRA's layout (:mod:`..adapters.layers.functional`), unscaled.

    Block (j, n) of the update is the j-th of k parts of ``up``'s rows times the n-th of ``down``'s
    columns: a pair of rank R. GraLoRA has room for rank / k there. If that is at least R, the parts
    are copied exactly. Otherwise each block becomes its best approximation of that rank. Unused
    room is zero, in A and in B.

    Returns:
        A (k, in / k, rank, ...), B (k, rank, out / k), and the Frobenius norm of the lost parts of
        all blocks, relative to the update.

    Raises:
        ValueError: k does not divide in, out and rank, the shapes do not form a pair, or there are
            NaN or infinite values.
    """
    matrix = _matrix(down, up)
    (own, width, *kernel), height = down.shape, len(up)
    numbers = {"in": width, "out": height, "rank": rank}
    wrong = [f"{name}={number}" for name, number in numbers.items() if number % k or number < k]
    if wrong:
        raise ValueError(f"gralora_factors: {', '.join(wrong)} must be divisible by k={k}")
    s = rank // k
    downs = matrix.unflatten(1, (k, -1)).transpose(0, 1)  # (n, R, c / k)
    ups = up.unflatten(0, (k, -1))  # (j, o, R)
    # for every block (j, n): (j, n, q, c / k) and (j, n, o, q)
    if own <= s:
        block_downs = downs.expand(k, *downs.shape)
        block_ups = ups.unsqueeze(1).expand(k, k, -1, -1)
        error = 0.0
    else:
        U, values, V = _decompose(downs.unsqueeze(0), ups.unsqueeze(1))
        block_downs, block_ups = _balanced(U[..., :s], values[..., :s], V[..., :s])
        error = _relative(values[..., s:], values)
    q = block_downs.shape[2]
    A = block_downs.new_zeros(k, width // k, *kernel, k, s)
    A[..., :q] = block_downs.permute(1, 3, 0, 2).reshape(*A.shape[:-1], q)
    B = block_ups.new_zeros(k, k, s, height // k)
    B[:, :, :q] = block_ups.mT
    A = A.flatten(-2).movedim(-1, 2).contiguous()
    return _rounded(A, down), _rounded(B.flatten(1, 2), down), error


# -- decompositions --------------------------------------------------------------------------------


def _core(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q_up (..., out, m), the matrix in the middle (..., m, l), and Q_down (..., c, l).

    ``down`` is (..., R, c) and ``up`` (..., out, R).
    """
    Q_up, R_up = torch.linalg.qr(up.double())
    Q_down, R_down = torch.linalg.qr(down.double().mT)
    return Q_up, R_up @ R_down.mT, Q_down


def _decompose(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (..., out, q), s (..., q) and V (..., c, q): the update is U diag(s) V^T."""
    Q_up, core, Q_down = _core(down, up)
    U, values, Vh = torch.linalg.svd(core, full_matrices=False)
    return Q_up @ U, values, Q_down @ Vh.mT


def _balanced(U: Tensor, values: Tensor, V: Tensor) -> Pair:
    """Return the pair of U (..., out, q), values and V (..., c, q), with roots on both sides."""
    roots = values.sqrt().unsqueeze(-2)
    return (V * roots).mT, U * roots


def _relative(left_out: Tensor, values: Tensor) -> float:
    whole = float(torch.linalg.vector_norm(values))
    return float(torch.linalg.vector_norm(left_out)) / whole if whole else 0.0


def _rank_of_energy(values: Tensor, energy: float) -> int:
    squares = values.square().cumsum(0)
    return min(int((squares < energy * squares[-1]).sum()) + 1, len(values))


def _rounded(factor: Tensor, given: Tensor) -> Tensor:
    """Return the factor in the dtype of the given pair, but at least in float32."""
    return factor.to(torch.promote_types(given.dtype, torch.float32))


# -- checks ----------------------------------------------------------------------------------------


def _matrix(down: Tensor, up: Tensor) -> Tensor:
    """Return ``down`` as (R, c).

    Raises:
        ValueError: the two do not form a pair, or have NaN or infinite values.
    """
    if down.dim() < 2 or up.dim() != 2 or len(down) != up.shape[1] or not len(down):
        raise ValueError(
            f"down {tuple(down.shape)} and up {tuple(up.shape)} are not a pair: expected (R, in) "
            "or (R, in, height, width), and (out, R)"
        )
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise ValueError("the pair has NaN or infinite values")
    return down.flatten(1)
