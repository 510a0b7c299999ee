"""A frozen linear product and its GraLoRA updates as one autograd function.

:func:`blockwise.linear_update` says what is computed; here it is computed with as little as can be.
Where an implementation by autograd makes temporaries of the output's size (the update, the scaled
update, the sum) and keeps a converted copy of the input,

- the factors, which are small, are converted to the input's dtype and not the input to theirs;
- products add into the output and into the input's gradient where those lie, scaled as they do;
- kept for backward are the input as it came, which layers that share it keep once, the hidden
  tensor (k r values per token) and, if they had to be converted, the converted factors.

There are two ways, and :func:`choose_way` tells which one is taken:

*added*: the products with A and B follow the frozen one. 2 r (in + out) operations per token
forward and 4 r (in + out) backward.

*merged*: the frozen weight plus the updates, formed anew forward and backward for 2 r in out / k
operations each, stands for both. It saves a third of the above, and keeps no hidden tensor. Only in
fp32 or better: in half precision the sum would round small updates away.

The legend is that of :mod:`blockwise`; ``tokens`` is the input's leading dimensions as one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .functional import add_delta

ArtifactLoader = Literal["added", "merged"]

#: How many operations must be saved for each that forms merged weights. Measured: the blocks of an
#: update are thin products, and the weight is copied (docs/performance.md).
_WORTH_MERGING = 3.0
#: And how many at least: in small layers the calls that form weights cost more than they save.
_WORTH_CALLING = 20e6


class Update(NamedTuple):
    """One update of a linear layer: A (k, i, r), B (k, r, o), and what its product is scaled by."""

    A: Tensor
    B: Tensor
    scaling: float


def choose_way(
    tokens: int, updates: Sequence[Update], dtype: torch.dtype, differentiable: bool
) -> ArtifactLoader:
    """Return the way that costs less for so many tokens; a rule, so that every run takes the same.

    Args:
        differentiable: a backward pass may follow.
    """
    if dtype.itemsize < 4:
        return "added"
    saved = forming = 0  # operations
    for A, B, _ in updates:
        (k, i, r), o = A.shape, B.shape[2]
        saved += 2 * tokens * r * k * (i + o)
        forming += 2 * k * i * o * r * (2 if differentiable else 1)
    return "merged" if saved > max(_WORTH_MERGING * forming, _WORTH_CALLING) else "added"


def adapted_linear(
    x: Tensor,
    updates: Sequence[Update],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    way: ArtifactLoader = "added",
) -> Tensor:
    """Return ``x @ weight.T + bias`` plus the updates; without a weight, the updates alone.

    Differentiable once, by ``x`` and the factors; weight and bias are frozen.

    Args:
        x: (..., in).
        updates: at least one; each may have a k and r of its own.
        weight: (out, in).
        bias: (out,), only with a weight.
        dtype: that of the products and of the result; default: the dtype of ``x``.
        way: "merged" only with a weight.

    Returns:
        (..., out), in memory of its own.
    """
    factors = [factor for update in updates for factor in (update.A, update.B)]
    call = _Call(tuple(update.scaling for update in updates), dtype or x.dtype, way)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *factors)):
        result: Tensor = _AdaptedLinear.apply(x, weight, bias, call, *factors)
        return result
    return call.forward(x, weight, bias, factors)[0]


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        call: _Call,
        *factors: Tensor,
    ) -> Tensor:
        result, weight, converted, hidden = call.forward(x, weight, bias, factors)
        ctx.save_for_backward(x, weight, *converted, *hidden)
        ctx.call = call
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight, *kept = ctx.saved_tensors
        count = 2 * len(ctx.call.scalings)
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        gradient_x, gradients = ctx.call.backward(
            x, weight, kept[:count], kept[count:], gradient, needs
        )
        return gradient_x, None, None, None, *gradients


class _Call(NamedTuple):
    """What a call is given besides tensors. ``factors`` are A and B of each update in turn."""

    scalings: tuple[float, ...]
    dtype: torch.dtype
    way: ArtifactLoader

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, factors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None, Sequence[Tensor], list[Tensor]]:
        """Return the result and, for backward, the weight, the factors and the hidden tensors.

        Weight and factors are in the dtype of the products: autograd would keep the same of them.
        """
        inputs, result, hidden = _as_rows(x, self.dtype), None, []
        factors = [_as(factor, self.dtype) for factor in factors]
        if weight is not None:
            weight = _as(weight, self.dtype)
            bias = None if bias is None else _as(bias, self.dtype)
            result = F.linear(inputs, self._whole(weight, factors), bias)
        if self.way == "added":
            for A, B, scaling in zip(factors[::2], factors[1::2], self.scalings, strict=True):
                hidden.append(_exchanged(inputs, A))
                result = _add_products(result, hidden[-1], B, scaling)
        assert result is not None
        return result.view(*x.shape[:-1], result.shape[1]), weight, factors, hidden

    def backward(
        self,
        x: Tensor,
        weight: Tensor | None,
        factors: Sequence[Tensor],
        hidden: Sequence[Tensor],
        gradient: Tensor,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradients of ``x`` and of the factors, of those that ``needs`` asks for.

        All but ``x`` and ``gradient`` are what :meth:`forward` gave.
        """
        inputs, gradient = _as_rows(x, self.dtype), _as_rows(gradient, self.dtype)
        needs_x, *needs_factors = needs
        gradient_x = None
        if needs_x and weight is not None:
            gradient_x = gradient @ self._whole(weight, factors)
        gradients: list[Tensor | None] = []
        for u, scaling in enumerate(self.scalings):
            (A, B), (needs_A, needs_B) = (
                factors[2 * u : 2 * u + 2],
                needs_factors[2 * u : 2 * u + 2],
            )
            gradient_A = gradient_B = None
            adds_to_x = needs_x and self.way == "added"
            if needs_A or adds_to_x:
                gradient_hidden = _exchanged(gradient, B.mT)  # but for the scaling
            if needs_A:
                gradient_A = _transposed_products(gradient_hidden, inputs, scaling).mT
            if needs_B:
                h = hidden[u] if hidden else _exchanged(inputs, A)
                gradient_B = _transposed_products(h, gradient, scaling)
            if adds_to_x:
                gradient_x = _add_products(gradient_x, gradient_hidden, A.mT, scaling)
            gradients += [gradient_A, gradient_B]
        if gradient_x is not None:
            gradient_x = _as(gradient_x.view(x.shape), x.dtype)
        return gradient_x, gradients

    def _whole(self, weight: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """The weight that the frozen product takes: with the updates if they are merged."""
        if self.way == "added":
            return weight
        weight = weight.clone()
        for A, B, scaling in zip(factors[::2], factors[1::2], self.scalings, strict=True):
            add_delta(weight, A, B, scaling)
        return weight


def _as_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., features) as (tokens, features) in this dtype; a view where it can be one."""
    x = _as(x, dtype)
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, but for the call where nothing is to be done: layers are many, and small."""
    return x if x.dtype is dtype else x.to(dtype)


def _blocks(x: Tensor, k: int) -> Tensor:
    """(tokens, features) as a view (k, tokens, features / k)."""
    tokens, features = x.shape
    return x.view(tokens, k, features // k).transpose(0, 1)


def _loops(x: Tensor) -> bool:
    """Whether to go through blocks one by one: on the CPU, bmm copies strided half precision.

    With few tokens that costs less than the calls do.
    """
    return x.is_cpu and x.dtype.itemsize < 4 and x.shape[0] > 256


def _exchanged(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply the blocks of ``x`` (tokens, k i) by ``factor`` (k, i, r), exchange rank chunks.

    Returns (k, tokens, r): chunk j of block n's product is chunk n of slice j. Forwards this takes
    the input and A to what B multiplies; backwards the output's gradient and B transposed to what A
    transposed multiplies, as the exchange is its own inverse.
    """
    tokens, (k, _, r) = x.shape[0], factor.shape
    if not _loops(x):
        products = torch.bmm(_blocks(x, k), factor)  # (n, tokens, j s)
        return products.view(k, tokens, k, r // k).permute(2, 1, 0, 3).reshape(k, tokens, r)
    hidden = x.new_empty(k, tokens, k, r // k)  # (j, tokens, n, s)
    for n, block in enumerate(_blocks(x, k)):
        hidden[:, :, n] = (block @ factor[n]).view(tokens, k, r // k).transpose(0, 1)
    return hidden.view(k, tokens, r)


def _add_products(total: Tensor | None, hidden: Tensor, factor: Tensor, scaling: float) -> Tensor:
    """Add ``scaling * hidden @ factor``, (k, tokens, r) and (k, r, o), to (tokens, k o), in place.

    Returns ``total``, or a new tensor of the products if it is None.
    """
    k, tokens, _ = hidden.shape
    beta = 1
    if total is None:
        total, beta = hidden.new_empty(tokens, k * factor.shape[2]), 0
    _blocks(total, k).baddbmm_(hidden, factor, beta=beta, alpha=scaling)
    return total


def _transposed_products(hidden: Tensor, x: Tensor, scaling: float) -> Tensor:
    """Return ``scaling * hidden.mT @ blocks of x`` (k, r, features / k).

    The gradient of B; and, transposed, that of A. Autograd brings it to the factor's dtype.
    """
    k, _, r = hidden.shape
    blocks = _blocks(x, k)
    products = x.new_empty(k, r, blocks.shape[2])
    if not _loops(x):
        return products.baddbmm_(hidden.mT, blocks, beta=0, alpha=scaling)
    for n in range(k):
        products[n].addmm_(hidden[n].T, blocks[n], beta=0, alpha=scaling)
    return products
