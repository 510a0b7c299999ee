"""The mathematics of GraLoRA as pure functions of tensors (arXiv 2505.20355).

A GraLoRA update of a weight of shape (out, in) is a k x k grid of low-rank blocks. One legend is
used for shapes and einsum letters:

    k   blocks per side             n   input block (0..k-1)     j   output block (0..k-1)
    i   in / k, inputs per block    o   out / k, outputs per block
    r   rank                        s   r / k, rank of a block   h, w   kernel height and width

    A   (k, i, r)  or (k, i, r, h, w) for a convolution; one slice per *input* block n
    B   (k, r, o)                                      ; one slice per *output* block j

Block (j, n) of the update is ``(A[n][:, j*s:(j+1)*s] @ B[j][n*s:(n+1)*s, :]).T``. A has as many
parameters as a LoRA's down matrix and B as many as its up matrix, but the update has rank k * r.
Layout and meaning of A and B are PEFT's (``peft/tuners/gralora/layer.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def init_factors(
    in_features: int,
    out_features: int,
    rank: int,
    k: int,
    kernel_size: Sequence[int] = (),
    zero_update: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return new factors A (k, i, r, *kernel_size) and B (k, r, o).

    A is Kaiming-uniform per block, as in PEFT. B is zero, so that the update starts at zero, or
    Kaiming-uniform too if ``zero_update`` is False. Blocks are sampled in PEFT's order: for a
    linear layer, the same seed gives the same factors as PEFT.
    """
    i, o = in_features // k, out_features // k
    A, B = torch.empty(k, i, rank, *kernel_size), torch.empty(k, rank, o)
    if A.is_meta:  # there are no values to initialize, and the calls take long even so
        return A, B
    for n in range(k):
        a, b = torch.empty(rank, i, *kernel_size), torch.empty(o, rank)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if zero_update:
            nn.init.zeros_(b)
        else:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        A[n], B[n] = a.transpose(0, 1), b.T
    return A, B


def init_plain_factors(
    in_features: int,
    out_features: int,
    rank: int,
    kernel_size: Sequence[int] = (),
    zero_update: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return new factors of a hybrid's plain LoRA, (rank, in, *kernel_size) and (out, rank, 1...).

    They are initialized as in :func:`init_factors`, but sampled twice, as in PEFT: when its two
    layers are created, and when they are set. The same seed therefore gives the same factors.
    """
    down = torch.empty(rank, in_features, *kernel_size)
    up = torch.empty(out_features, rank, *[1] * len(kernel_size))
    if down.is_meta:
        return down, up
    for factor in (down, up, down) if zero_update else (down, up, down, up):
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
    return down, up.zero_() if zero_update else up


def linear_update(x: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """Apply ``scaling`` times the update to ``x`` (..., in); returns (..., out).

    The update is never formed: there are two batched products with an exchange of rank chunks
    between them. B is scaled because it is small; scaling the result would need another pass over
    it and its gradient.
    """
    k, i, r = A.shape
    s, o = r // k, B.shape[2]
    tokens = x.reshape(-1, k, i).transpose(0, 1)  # (n, tokens, i)
    hidden = torch.bmm(tokens, A)  # (n, tokens, r = j s)
    # the exchange: chunk j of input block n becomes chunk n of output block j
    hidden = hidden.unflatten(2, (k, s)).permute(2, 1, 0, 3).reshape(k, -1, r)
    update = torch.bmm(hidden, scaling * B)  # (j, tokens, o)
    return update.transpose(0, 1).reshape(*x.shape[:-1], k * o)


def conv2d_update(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float = 1.0,
    stride: Sequence[int] = (1, 1),
    padding: str | int | Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """Apply ``scaling`` times the update to ``x`` (batch, in, height, width).

    There are two grouped convolutions with the exchange of rank chunks between them. The first has
    the layer's kernel, the second is 1 x 1. Returns (batch, out, height', width'); batch may be
    left out.
    """
    k, i, r, *kernel = A.shape
    s, o = r // k, B.shape[2]
    down = A.transpose(1, 2).reshape(k * r, i, *kernel)
    up = scaling * B.transpose(1, 2).reshape(k * o, r, 1, 1)
    hidden = F.conv2d(x, down, None, stride, padding, dilation, groups=k)
    hidden = hidden.unflatten(-3, (k, k, s)).transpose(-5, -4).flatten(-5, -3)
    return F.conv2d(hidden, up, groups=k)


def delta_weight(A: Tensor, B: Tensor) -> Tensor:
    """Return the dense update, unscaled: (out, in), or (out, in, h, w) for a convolution."""
    k, i, _, *kernel = A.shape
    delta = A.new_zeros(k * B.shape[2], k * i * math.prod(kernel))
    add_delta(delta, A, B)
    return delta.view(-1, k * i, *kernel)


def add_delta(target: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0) -> None:
    """Add ``scaling`` times the dense update to ``target`` (out, in * h * w), in place.

    A and B are converted to the target's dtype; see :func:`add_delta_rows`.
    """
    add_delta_rows(target, *row_factors(A.to(target.dtype), B.to(target.dtype)), 0, scaling)


def row_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B for :func:`add_delta_rows`: (n, r, i * h * w) and (j, r, o)."""
    k, _, r = A.shape[:3]
    return A.transpose(1, 2).reshape(k, r, -1).contiguous(), B.contiguous()


def add_delta_rows(
    target: Tensor, rows_A: Tensor, rows_B: Tensor, start: int, scaling: float = 1.0
) -> None:
    """Add ``scaling`` times rows ``start``... of the dense update to ``target``, in place.

    It takes r / k multiplications per value, and no temporary.

    Args:
        target: (rows, in * h * w), the weight's rows from ``start`` on.
        rows_A, rows_B: the factors from :func:`row_factors`.
    """
    (k, r, i), o = rows_A.shape, rows_B.shape[2]
    s, stop = r // k, start + len(target)
    for j in range(start // o, (stop - 1) // o + 1):
        first, last = max(start, j * o), min(stop, (j + 1) * o)
        here = target[first - start : last - start]
        up = rows_B[j, :, first - j * o : last - j * o].T
        for n in range(k):
            block, chunk = here[:, n * i : (n + 1) * i], slice(n * s, (n + 1) * s)
            block.addmm_(up[:, chunk], rows_A[n, j * s : (j + 1) * s], alpha=scaling)


def adapted_weight(weight: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """Return ``weight`` (out, in) plus ``scaling`` times the dense update, in three kernels.

    Unlike :func:`add_delta` it is differentiable, and makes temporaries of the weight's size.
    """
    (k, i, r), o = A.shape, B.shape[2]
    s = r // k
    down = A.reshape(k, i, k, s).permute(2, 0, 1, 3).reshape(k * k, i, s)  # (j n, i, s)
    blocks = torch.bmm(down, B.reshape(k * k, s, o))  # transposed
    blocks = blocks.view(k, k, i, o).permute(0, 3, 1, 2)  # (j, o, n, i)
    return torch.add(weight.reshape(k, o, k, i), blocks, alpha=scaling).reshape(k * o, k * i)


def lora_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ordinary LoRA pair of rank k * r with exactly the same update.

    ``down`` is (k * r, in, *kernel), 1/k dense; ``up`` is (out, k * r), and ``up @ down`` is
    :func:`delta_weight`. Row (n, j, s) of ``down`` reads input block n and feeds output block j.
    """
    k, i, r, *kernel = A.shape
    s, o = r // k, B.shape[2]
    block = torch.arange(k)
    down = A.new_zeros(k, r, k, i, *kernel)
    down[block, :, block] = A.transpose(1, 2)
    up = B.new_zeros(k, o, k, k, s)
    # up[j, o, n, j, s] = B[j, n s, o]
    up[block, :, :, block] = B.reshape(k, k, s, o).permute(0, 3, 1, 2)
    return down.reshape(k * r, k * i, *kernel), up.reshape(k * o, k * r)
