"""A frozen linear product and its GraLoRA updates as one autograd function.

:func:`functional.linear_update` defines the result; this module computes it with less memory and
time. An implementation by autograd makes temporaries of the output's size (the update, the scaled
update, the sum) and keeps a converted copy of the input. Here instead

- the small factors are converted to the input's dtype, not the input to theirs;
- products are scaled and added in place, into the output and into the input's gradient;
- the backward pass needs the unchanged input, which layers that share it keep once, the hidden
  tensor (k r values per token) and, if they had to be converted, the converted factors.

There are three backends, and :func:`select_backend` chooses between them:

*added*: the products with A and B follow the frozen product. They take 2 r (in + out) operations
per token forward and 4 r (in + out) backward.

*merged*: one product with the frozen weight plus the updates. The sum is formed forward and again
backward, with 2 r in out / k operations each. This saves a third of the operations above, and keeps
no hidden tensor.

*dense*: as merged, but the sum is kept for the backward pass, which forms the gradient of the whole
weight (2 in out operations per token) and derives those of the factors from it. Nothing of the
input's size is computed besides the two products with the sum and that gradient, and all of it is
recorded by autograd, without Python in the backward pass. It is used where the layer is small.

Merged and dense are only used in fp32 or better, because in half precision the sum would round
small updates away.

Autograd can neither transform sums in place nor differentiate a backward pass that it does not
record. So under ``torch.func``, forward-mode AD and ``create_graph``, torch's own operations take
over (:func:`functional.linear_update`).

The legend is that of :mod:`functional`; ``tokens`` stands for all leading dimensions of the input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .functional import adapted_weight, add_delta, linear_update

#: Most operations of the dense backend for each operation of the added one, where it is used:
#: products with a whole weight are faster than thin ones (docs/performance.md).
_WORTH_DENSE = 1.5
#: Operations that take less time than the calls that the dense backend saves.
_FEW = 1.5e6
#: Operations that must be saved for each operation that forms merged weights. It is measured: the
#: blocks of an update are thin products, and the weight is copied (docs/performance.md).
_WORTH_MERGING = 3.0
#: Least number of saved operations: in small layers, forming the weights costs more than it saves.
_WORTH_CALLING = 20e6


class Backend(Enum):
    """How the frozen product and the updates are combined."""

    ADDED = "added"
    MERGED = "merged"
    DENSE = "dense"


class Update(NamedTuple):
    """One update of a linear layer: A (k, i, r), B (k, r, o), and the scaling of their product."""

    A: Tensor
    B: Tensor
    scaling: float


def select_backend(
    tokens: int, updates: Sequence[Update], dtype: torch.dtype, differentiable: bool
) -> Backend:
    """Return the backend that costs less for this number of tokens.

    It follows a rule and not a measurement, so that every run uses the same backend.

    Args:
        differentiable: a backward pass may follow.
    """
    if dtype.itemsize < 4:
        return Backend.ADDED
    thin = forming = 0  # operations of one product with A and one with B, and of one dense update
    for A, B, _ in updates:
        (k, i, r), o = A.shape, B.shape[2]
        thin += 2 * tokens * r * k * (i + o)
        forming += 2 * k * i * o * r
    if differentiable:
        dense = 2 * tokens * k * i * k * o + 3 * forming
        if dense <= _WORTH_DENSE * 3 * thin + _FEW:
            return Backend.DENSE
        forming *= 2
    worth_it = thin > max(_WORTH_MERGING * forming, _WORTH_CALLING)
    return Backend.MERGED if worth_it else Backend.ADDED


def adapted_linear(
    x: Tensor,
    updates: Sequence[Update],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: Backend = Backend.ADDED,
) -> Tensor:
    """Return ``x @ weight.T + bias`` plus the updates; without a weight, the updates alone.

    Differentiable by ``x`` and the factors; weight and bias are frozen.

    Args:
        x: (..., in).
        updates: at least one; each may have its own k and r.
        weight: (out, in).
        bias: (out,), only with a weight.
        dtype: dtype of the products and of the result; default: the dtype of ``x``.
        backend: MERGED and DENSE only with a weight.

    Returns:
        (..., out), in new memory.
    """
    dtype = dtype or x.dtype
    weight = None if weight is None else _as(weight, dtype)
    bias = None if bias is None else _as(bias, dtype)
    if torch.compiler.is_compiling() or transforms_active():
        return _by_operations(x, weight, bias, *_split(updates, dtype))
    return fused_linear(x, updates, weight, bias, dtype, backend)


def fused_linear(
    x: Tensor,
    updates: Sequence[Update],
    weight: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    backend: Backend,
) -> Tensor:
    """Return what :func:`adapted_linear` does, where nothing compiles or transforms operations.

    Weight and bias have ``dtype`` already.
    """
    scalings, factors = _split(updates, dtype)
    if backend is Backend.DENSE and weight is not None:
        for A, B, scaling in _updates(scalings, factors):
            weight = adapted_weight(weight, A, B, scaling)
        return F.linear(_as(x, dtype), weight, bias)
    if not torch.is_grad_enabled():  # the call of an autograd function costs time even then
        return _forward(x, weight, bias, backend, scalings, factors)[0]
    result: Tensor = _AdaptedLinear.apply(x, weight, bias, backend, scalings, *factors)
    return result


def _split(updates: Sequence[Update], dtype: torch.dtype) -> tuple[list[float], list[Tensor]]:
    """Return the scalings, and A and B of each update in turn, in this dtype.

    They are converted outside of the autograd function: a second derivative goes back to its
    inputs.
    """
    scalings: list[float] = []
    factors: list[Tensor] = []
    for A, B, scaling in updates:
        scalings.append(scaling)
        # without needless calls, whose time counts in small layers
        factors += A if A.dtype is dtype else A.to(dtype), B if B.dtype is dtype else B.to(dtype)
    return scalings, factors


def transforms_active() -> bool:
    """Whether ``torch.func`` or forward-mode AD transforms each operation."""
    # torch.autograd.Function checks the first one itself, to refuse; neither has a public function
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _AdaptedLinear(torch.autograd.Function):
    """``factors`` are A and B of each update in turn, in the dtype of the products."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        backend: Backend,
        scalings: Sequence[float],
        *factors: Tensor,
    ) -> Tensor:
        result, hidden = _forward(x, weight, bias, backend, scalings, factors)
        ctx.save_for_backward(x, weight, *factors, *hidden)
        ctx.backend, ctx.scalings = backend, scalings
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *kept = ctx.saved_tensors
        backend, scalings = ctx.backend, ctx.scalings
        factors, hidden = kept[: 2 * len(scalings)], kept[2 * len(scalings) :]
        needs_x, needs_factors = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        # is_grads_batched uses a vmap of its own, which only the tensor reveals
        batched = torch._C._functorch.is_legacy_batchedtensor(gradient)
        if batched or torch.is_grad_enabled() or transforms_active():
            gradient_x, *gradients = _gradients_by_operations(
                x, weight, scalings, factors, gradient, (needs_x, *needs_factors)
            )
            return gradient_x, None, None, None, None, *gradients
        inputs, gradient = _as_rows(x, gradient.dtype), _as_rows(gradient, gradient.dtype)
        adds_to_x = needs_x and backend is Backend.ADDED
        gradient_x = None
        if needs_x and weight is not None:
            gradient_x = gradient @ _whole(weight, backend, scalings, factors)
        gradients = []
        for u, scaling in enumerate(scalings):
            A, B = factors[2 * u : 2 * u + 2]
            needs_A, needs_B = needs_factors[2 * u : 2 * u + 2]
            gradient_A = gradient_B = None
            if needs_A or adds_to_x:
                gradient_hidden = _exchanged(gradient, B.mT)  # without the scaling
            if needs_A:
                gradient_A = _transposed_products(gradient_hidden, inputs, scaling).mT
            if needs_B:
                h = hidden[u] if hidden else _exchanged(inputs, A)
                gradient_B = _transposed_products(h, gradient, scaling)
            if adds_to_x:
                gradient_x = _add_products(gradient_x, gradient_hidden, A.mT, scaling)
            gradients += (gradient_A, gradient_B)
        if gradient_x is not None:
            gradient_x = _as(gradient_x.view(x.shape), x.dtype)
        return gradient_x, None, None, None, None, *gradients


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    backend: Backend,
    scalings: Sequence[float],
    factors: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Return the result and, if ADDED, the hidden tensor of each update."""
    inputs, result, hidden = _as_rows(x, factors[0].dtype), None, []
    if weight is not None:
        result = F.linear(inputs, _whole(weight, backend, scalings, factors), bias)
    if backend is Backend.ADDED:
        for u, scaling in enumerate(scalings):
            hidden.append(_exchanged(inputs, factors[2 * u]))
            result = _add_products(result, hidden[u], factors[2 * u + 1], scaling)
    assert result is not None
    return result if x.ndim == 2 else result.view(*x.shape[:-1], result.shape[1]), hidden


def _by_operations(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scalings: Sequence[float],
    factors: Sequence[Tensor],
) -> Tensor:
    """Compute the result of :class:`_AdaptedLinear` with operations that torch can transform."""
    x = _as(x, factors[0].dtype)
    parts = [] if weight is None else [F.linear(x, weight, bias)]
    parts += [linear_update(x, *update) for update in _updates(scalings, factors)]
    return sum(parts[1:], parts[0])


def _gradients_by_operations(
    x: Tensor,
    weight: Tensor | None,
    scalings: Sequence[float],
    factors: Sequence[Tensor],
    gradient: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Return differentiable gradients of ``x`` and the factors, where ``needs`` is true."""
    with torch.enable_grad():
        # aliases, because x may depend on the factors, whose gradients must not go through it
        x, *factors = [tensor.view_as(tensor) for tensor in (x, *factors)]
        result = _by_operations(x, weight, None, scalings, factors)
    wanted = [t for t, needed in zip((x, *factors), needs, strict=True) if needed]
    gradients = iter(
        torch.autograd.grad(result, wanted, gradient, create_graph=torch.is_grad_enabled())
    )
    return [next(gradients) if needed else None for needed in needs]


def _updates(
    scalings: Sequence[float], factors: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, float]]:
    return zip(factors[::2], factors[1::2], scalings, strict=True)


def _whole(
    weight: Tensor, backend: Backend, scalings: Sequence[float], factors: Sequence[Tensor]
) -> Tensor:
    """Return the weight for the frozen product, with the updates added if they are merged."""
    if backend is Backend.ADDED:
        return weight
    weight = weight.clone()
    for A, B, scaling in _updates(scalings, factors):
        add_delta(weight, A, B, scaling)
    return weight


def _as_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (..., features) as (tokens, features) in this dtype, as a view if possible."""
    x = x if x.dtype is dtype else x.to(dtype)
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x.to(dtype)`` without a needless call, whose time counts in small layers."""
    return x if x.dtype is dtype else x.to(dtype)


def _blocks(x: Tensor, k: int) -> Tensor:
    """Return (tokens, features) as a view (k, tokens, features / k)."""
    tokens, features = x.shape
    return x.view(tokens, k, features // k).transpose(0, 1)


def _loops(x: Tensor) -> bool:
    """Whether to multiply blocks one by one, because bmm copies strided half precision on the CPU.

    With few tokens or narrow layers, the copy costs less than the calls.
    """
    return x.dtype.itemsize < 4 and x.is_cpu and x.shape[0] > 256 and x.numel() > 2**18


def _exchanged(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply the blocks of ``x`` (tokens, k i) by ``factor`` (k, i, r) and exchange rank chunks.

    Returns (k, tokens, r): chunk j of block n's product is chunk n of slice j. In the forward pass,
    the arguments are the input and A, and B multiplies the result. In the backward pass, they are
    the output's gradient and B transposed, and A transposed multiplies the result, because the
    exchange is its own inverse.
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

    Returns ``total``, or a new tensor with the products if it is None.
    """
    k, tokens, _ = hidden.shape
    beta = 1
    if total is None:
        total, beta = hidden.new_empty(tokens, k * factor.shape[2]), 0
    _blocks(total, k).baddbmm_(hidden, factor, beta=beta, alpha=scaling)
    return total


def _transposed_products(hidden: Tensor, x: Tensor, scaling: float) -> Tensor:
    """Return ``scaling * hidden.mT @ blocks of x`` (k, r, features / k).

    This is the gradient of B and, transposed, that of A. Autograd converts its dtype to the
    factor's.
    """
    k, _, r = hidden.shape
    blocks = _blocks(x, k)
    if not _loops(x):
        if scaling == 1.0:
            return torch.bmm(hidden.mT, blocks)
        return x.new_empty(k, r, blocks.shape[2]).baddbmm_(hidden.mT, blocks, beta=0, alpha=scaling)
    products = x.new_empty(k, r, blocks.shape[2])
    for n in range(k):
        products[n].addmm_(hidden[n].T, blocks[n], beta=0, alpha=scaling)
    return products
