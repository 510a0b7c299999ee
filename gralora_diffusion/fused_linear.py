"""GraLoRA's linear updates, and the frozen product before them, as one autograd function.

:func:`blockwise.linear_update` says what is computed; here it is computed with as little as can be:
2 r (in + out) multiplications per token forward and twice that backward, and no pass over the input
or the output that is not a product's own. Where an implementation by autograd makes temporaries of
the output's size (the update, the scaled update, the sum) and keeps a converted copy of the input,

- the scaling goes into B, which is small, and the factors are converted, not the input;
- products add into the output and into the input's gradient where those lie (strided ``baddbmm``);
- the exchange of rank chunks is part of writing the hidden tensor;
- kept for backward are the input as it came, which layers that share it keep once, and the hidden
  tensor (k r values per token).

The legend is that of :mod:`blockwise`; ``tokens`` is the input's leading dimensions as one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Update(NamedTuple):
    """One update of a linear layer: A (k, i, r), B (k, r, o), and what its product is scaled by."""

    A: Tensor
    B: Tensor
    scaling: float


def adapted_linear(
    x: Tensor,
    updates: Sequence[Update],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``x @ weight.T + bias`` plus the updates; without a weight, the updates alone.

    Differentiable once, by ``x`` and the factors; weight and bias are frozen.

    Args:
        x: (..., in).
        updates: at least one; each may have a k and r of its own.
        weight: (out, in).
        bias: (out,), only with a weight.
        dtype: that of the products and of the result; default: the dtype of ``x``.

    Returns:
        (..., out), in memory of its own.
    """
    factors = [factor for update in updates for factor in (update.A, update.B)]
    scalings = [update.scaling for update in updates]
    dtype = dtype or x.dtype
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *factors)):
        result: Tensor = _AdaptedLinear.apply(x, weight, bias, scalings, dtype, *factors)
        return result
    return _forward(x, weight, bias, scalings, dtype, factors)[0]


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scalings: Sequence[float],
        dtype: torch.dtype,
        *factors: Tensor,
    ) -> Tensor:
        result, weight, hidden = _forward(x, weight, bias, scalings, dtype, factors)
        # the weight as the product took it: the frozen layer's own backward keeps the same
        ctx.save_for_backward(x, weight, *factors, *hidden)
        ctx.scalings, ctx.dtype = scalings, dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight, *kept = ctx.saved_tensors
        count = len(ctx.scalings)
        factors, hidden = kept[: 2 * count], kept[2 * count :]
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        inputs, gradient = _as_rows(x, ctx.dtype), _as_rows(gradient, ctx.dtype)
        gradient_x = gradient @ weight if needs_x and weight is not None else None
        gradients: list[Tensor | None] = []
        for u, scaling in enumerate(ctx.scalings):
            A, B = factors[2 * u : 2 * u + 2]
            needs_A, needs_B = needs[2 * u : 2 * u + 2]
            gradient_A = gradient_B = None
            if needs_A or needs_x:
                gradient_hidden = _exchanged(gradient, _scaled(B, scaling, ctx.dtype).mT)
            if needs_A:
                gradient_A = _transposed_products(gradient_hidden, inputs, A).mT
            if needs_B:
                gradient_B = _transposed_products(hidden[u], gradient, B).mul_(scaling)
            if needs_x:
                gradient_x = _add_products(gradient_x, gradient_hidden, A.to(ctx.dtype).mT)
            gradients += [gradient_A, gradient_B]
        if gradient_x is not None:
            gradient_x = gradient_x.view(x.shape).to(x.dtype)
        return gradient_x, None, None, None, None, *gradients


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scalings: Sequence[float],
    dtype: torch.dtype,
    factors: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Return the result, the weight as it was used, and the hidden tensor of each update."""
    inputs = _as_rows(x, dtype)
    result = None
    if weight is not None:
        weight = weight.to(dtype)
        result = F.linear(inputs, weight, None if bias is None else bias.to(dtype))
    hidden = []
    for u, scaling in enumerate(scalings):
        A, B = factors[2 * u : 2 * u + 2]
        hidden.append(_exchanged(inputs, A.to(dtype)))
        result = _add_products(result, hidden[-1], _scaled(B, scaling, dtype))
    assert result is not None
    return result.view(*x.shape[:-1], result.shape[1]), weight, hidden


def _as_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., features) as (tokens, features) in this dtype; a view where it can be one."""
    return x.to(dtype).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _scaled(B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    return (B * scaling).to(dtype) if scaling != 1.0 else B.to(dtype)


def _blocks(x: Tensor, k: int) -> Tensor:
    """(tokens, features) as a view (k, tokens, features / k)."""
    return x.unflatten(1, (k, -1)).transpose(0, 1)


def _exchanged(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply the blocks of ``x`` (tokens, k i) by ``factor`` (k, i, r), exchange rank chunks.

    Returns (k, tokens, r): chunk j of block n's product is chunk n of slice j. Forwards this takes
    the input and A to what B multiplies; backwards the output's gradient and B transposed to what A
    transposed multiplies, as the exchange is its own inverse.
    """
    k, _, r = factor.shape
    hidden = x.new_empty(k, len(x), k, r // k)  # (j, tokens, n, s)
    if x.is_cpu:  # where bmm copies strided half-precision operands
        for n, block in enumerate(_blocks(x, k)):
            hidden[:, :, n] = (block @ factor[n]).unflatten(1, (k, -1)).transpose(0, 1)
    else:
        products = torch.bmm(_blocks(x, k), factor)  # (n, tokens, j s)
        hidden.copy_(products.unflatten(2, (k, -1)).permute(2, 1, 0, 3))
    return hidden.view(k, len(x), r)


def _add_products(total: Tensor | None, hidden: Tensor, factor: Tensor) -> Tensor:
    """Add ``hidden @ factor``, (k, tokens, r) and (k, r, o), to ``total`` (tokens, k o), in place.

    Returns ``total``, or a new tensor of the products if it is None.
    """
    k, tokens, _ = hidden.shape
    if total is None:
        total = hidden.new_empty(tokens, k * factor.shape[2])
        _blocks(total, k).baddbmm_(hidden, factor, beta=0)
    else:
        _blocks(total, k).baddbmm_(hidden, factor)
    return total


def _transposed_products(hidden: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """Return ``hidden.mT @ blocks of x`` (k, r, features / k), in the dtype of ``like``.

    The gradient of B; and, transposed, that of A.
    """
    k, _, r = hidden.shape
    blocks = _blocks(x, k)
    if not x.is_cpu:
        return torch.bmm(hidden.mT, blocks).to(like.dtype)
    products = like.new_empty(k, r, blocks.shape[2])
    for n in range(k):
        products[n] = hidden[n].T @ blocks[n]
    return products
