"""The fused product and its derivatives against autograd through the reference, the definition."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from gralora_diffusion.adapters.layers import functional
from gralora_diffusion.adapters.layers.fused_linear import (
    Backend,
    Update,
    adapted_linear,
    select_backend,
)
from tests.reference import dense_update, relative_error

IN, OUT = 24, 40  # differ, so that no wrong exchange has the right shape


def make(dtype=torch.float64, sizes=((8, 4), (2, 1)), leading=(3, 5), grad=True, widths=(IN, OUT)):
    """x, weight, bias and an update for each (r, k)."""
    inputs, outputs = widths
    draw = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    updates = []
    for number, (r, k) in enumerate(sizes):
        A = random(k, inputs // k, r) / inputs**0.5
        B = random(k, r, outputs // k) / r**0.5
        updates.append(Update(A.requires_grad_(grad), B.requires_grad_(grad), 0.7 + number))
    x = random(*leading, inputs).requires_grad_(grad)
    return x, random(outputs, inputs) / inputs**0.5, random(outputs), updates


def leaves(x, updates):
    return [x, *(factor for update in updates for factor in update[:2])]


def expected(x, weight, bias, updates):
    whole = weight.double()
    for A, B, scaling in updates:
        whole = whole + scaling * dense_update(A.detach(), B.detach())
    return F.linear(x.double(), whole, None if bias is None else bias.double())


@pytest.mark.parametrize("backend", Backend)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("sizes", [((8, 4),), ((8, 2), (2, 1)), ((4, 1), (16, 8), (8, 4))])
@pytest.mark.parametrize("leading", [(3, 5), (7,), (), (0,), (2, 0), (2, 3, 4)])
def test_is_the_product_with_the_weight_and_its_updates(backend, with_bias, sizes, leading):
    x, weight, bias, updates = make(sizes=sizes, leading=leading)
    bias = bias if with_bias else None
    actual = adapted_linear(x, updates, weight, bias, backend=backend)
    torch.testing.assert_close(actual, expected(x, weight, bias, updates), rtol=0, atol=1e-13)
    with torch.no_grad():
        assert torch.equal(adapted_linear(x, updates, weight, bias, backend=backend), actual)


def test_without_a_weight_it_is_the_updates_alone():
    x, weight, _, updates = make()
    actual = adapted_linear(x, updates)
    whole = expected(x, torch.zeros_like(weight), None, updates)
    torch.testing.assert_close(actual, whole, rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(
        lambda x, a, b, c, d: adapted_linear(x, [Update(a, b, 0.7), Update(c, d, 2.0)]),
        leaves(x, updates),
    )


@pytest.mark.parametrize("backend", Backend)
@pytest.mark.parametrize("wanted", [w for w in itertools.product([0, 1], repeat=3) if any(w)])
def test_only_the_gradients_that_are_wanted(backend, wanted):
    x, weight, bias, (update,) = make(torch.float32, sizes=((8, 4),))
    for tensor, needed in zip((x, update.A, update.B), wanted, strict=True):
        tensor.requires_grad_(bool(needed))
    adapted_linear(x, [update], weight, bias, backend=backend).square().sum().backward()
    actual = [tensor.grad for tensor in (x, update.A, update.B)]
    for tensor in (x, update.A, update.B):
        tensor.grad = None
    result = F.linear(x, weight, bias) + functional.linear_update(x, *update)
    result.square().sum().backward()
    for gradient, tensor, needed in zip(actual, (x, update.A, update.B), wanted, strict=True):
        assert (gradient is not None) == bool(needed)
        if needed:
            assert relative_error(gradient, tensor.grad) < 1e-5


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [15, 300])
def test_half_precision_products_of_fp32_factors(dtype, x_dtype, tokens):
    """Every product is rounded once; the gradients come in the dtype of what they belong to."""
    x, weight, bias, updates = make(torch.float32, leading=(tokens,))
    x = x.detach().to(x_dtype).requires_grad_()
    actual = adapted_linear(x, updates, weight, bias, dtype)
    assert actual.dtype == dtype
    actual.backward(torch.ones_like(actual))
    exact = [t.detach().double().requires_grad_() for t in leaves(x, updates)]
    whole = F.linear(exact[0], weight.double(), bias.double())
    for number, update in enumerate(updates):
        A, B = exact[1 + 2 * number : 3 + 2 * number]
        whole = whole + functional.linear_update(exact[0], A, B, update.scaling)
    whole.sum().backward()
    bound = 4 * torch.finfo(dtype).eps
    assert relative_error(actual, whole) < bound
    for tensor, twin in zip(leaves(x, updates), exact, strict=True):
        assert tensor.grad.dtype == tensor.dtype
        assert relative_error(tensor.grad, twin.grad) < bound


@pytest.mark.parametrize("leading", [(5,), (2, 5)])
def test_strided_inputs_and_gradients(leading):
    x, weight, bias, updates = make(leading=leading)
    wide = torch.stack([x.detach(), -x.detach()], dim=-1)[..., 0]
    turned = x.detach().T.contiguous().T if x.dim() == 2 else x.detach()[:, ::2]
    for strided in (wide.requires_grad_(), turned.requires_grad_()):
        result = adapted_linear(strided, updates, weight, bias)
        whole = expected(strided, weight, bias, updates)
        torch.testing.assert_close(result, whole, rtol=0, atol=1e-13)
        gradient = torch.ones(1, dtype=torch.float64).expand_as(result)
        (given,) = torch.autograd.grad(result, strided, gradient)
        (exact,) = torch.autograd.grad(whole, strided, gradient)
        torch.testing.assert_close(given, exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_input_as_it_came_hidden_tensors_and_converted_factors(dtype):
    x, weight, bias, updates = make(torch.float32)
    weight = weight.to(dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapted_linear(x, updates, weight, bias, dtype)
    known = {t.data_ptr() for t in (*leaves(x, updates), weight)}
    new = [t for t in kept if t.data_ptr() not in known]
    hidden = [(4, 15, 8), (1, 15, 2)]
    factors = [] if dtype == torch.float32 else [factor.shape for factor in leaves(x, updates)[1:]]
    assert [(t.shape, t.dtype) for t in new] == [(s, dtype) for s in (*factors, *hidden)]
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapted_linear(x, updates, weight.float(), bias, backend=Backend.MERGED)
    assert {tuple(t.shape) for t in kept} == {tuple(t.shape) for t in (weight, *leaves(x, updates))}


class TestTransforms:
    """Derivatives of derivatives, ``torch.func`` and forward-mode AD."""

    @staticmethod
    def functions(backend, dtype=torch.float64, **changes):
        """The function, the same by the definition, and what both are differentiated by."""
        x, weight, bias, updates = make(dtype, **changes)
        scalings = [update.scaling for update in updates]

        def function(x, *factors):
            pairs = map(Update, factors[::2], factors[1::2], scalings)
            return adapted_linear(x, list(pairs), weight, bias, backend=backend)

        def definition(x, *factors):
            whole = weight.double()
            for A, B, scaling in zip(factors[::2], factors[1::2], scalings, strict=True):
                whole = whole + scaling * dense_update(A, B)
            return F.linear(x.double(), whole, bias.double())

        return function, definition, leaves(x, updates)

    @pytest.mark.parametrize("backend", Backend)
    @pytest.mark.parametrize("leading", [(1, 2), (), (0,)])
    def test_finite_differences(self, backend, leading):
        """Of first and second derivatives, in both modes, one by one and batched."""
        sizes, widths = ((4, 2), (2, 1)), (8, 12)  # the work grows with their square
        function, _, inputs = self.functions(backend, leading=leading, sizes=sizes, widths=widths)
        options = {"check_batched_grad": True, "fast_mode": leading != (1, 2)}
        assert torch.autograd.gradcheck(
            function, inputs, check_forward_ad=True, check_batched_forward_grad=True, **options
        )
        assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, **options)

    @pytest.mark.parametrize("backend", Backend)
    def test_gradients_of_gradients(self, backend):
        """Also where the input comes from the factors, as where a layer is called twice."""
        function, definition, inputs = self.functions(backend)
        back = torch.randn(OUT, IN, dtype=torch.float64) / OUT

        def second(function):
            once = function(*inputs)
            twice = function(torch.tanh(once @ back), *inputs[1:])
            penalty = once.new_zeros(())
            gradients = torch.autograd.grad(twice.square().sum(), inputs, create_graph=True)
            for gradient in gradients:
                penalty = penalty + gradient.square().sum()
            return [*gradients, *torch.autograd.grad(penalty, inputs)]

        for actual, exact in zip(second(function), second(definition), strict=True):
            assert relative_error(actual, exact) < 1e-12

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("wanted", [w for w in itertools.product([0, 1], repeat=3) if any(w)])
    def test_create_graph_changes_no_gradient(self, dtype, wanted):
        x, weight, bias, (update,) = make(torch.float32, sizes=((8, 4),))
        tensors = [x, *update[:2]]
        needed = [t.requires_grad_(bool(w)) for t, w in zip(tensors, wanted, strict=True) if w]
        for tensor, w in zip(tensors, wanted, strict=True):
            tensor.requires_grad_(bool(w))
        result = adapted_linear(x, [update], weight, bias, dtype)
        loss = result.float().square().sum()
        once = torch.autograd.grad(loss, needed, retain_graph=True)
        again = torch.autograd.grad(loss, needed, create_graph=True)
        for gradient, differentiable, tensor in zip(once, again, needed, strict=True):
            assert differentiable.requires_grad
            assert differentiable.dtype == gradient.dtype == tensor.dtype
            assert relative_error(differentiable, gradient) < 4 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("backend", Backend)
    def test_gradients_of_each_sample(self, backend):
        function, definition, (x, *factors) = self.functions(backend, leading=(4, 3))
        seed = torch.randn(4, 3, OUT, dtype=torch.float64)

        def loss(factors, x, seed):
            return (function(x, *factors) * seed).sum()

        frozen = [factor.detach() for factor in factors]
        each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(frozen, x.detach(), seed)
        for n in range(4):
            exact = torch.autograd.grad((definition(x[n], *factors) * seed[n]).sum(), factors)
            for actual, gradient in zip(each, exact, strict=True):
                assert relative_error(actual[n], gradient) < 1e-12

    @pytest.mark.parametrize("backend", Backend)
    def test_tangents(self, backend):
        function, definition, inputs = self.functions(backend)
        inputs = tuple(tensor.detach() for tensor in inputs)
        tangents = tuple(torch.randn_like(tensor) for tensor in inputs)
        result, tangent = torch.func.jvp(function, inputs, tangents)
        expected, exact = torch.autograd.functional.jvp(definition, inputs, tangents)
        assert relative_error(result, expected) < 1e-12
        assert relative_error(tangent, exact) < 1e-12
        with torch.no_grad(), forward_ad.dual_level():
            dual = function(*map(forward_ad.make_dual, inputs, tangents))
            assert torch.equal(forward_ad.unpack_dual(dual).tangent, tangent)

    @pytest.mark.parametrize("backend", Backend)
    def test_factors_of_several_adapters_at_once(self, backend):
        function, definition, (x, *factors) = self.functions(backend)
        stacked = [torch.stack([factor, -2 * factor]).detach() for factor in factors]
        with torch.no_grad():
            both = torch.func.vmap(function, (None, *[0] * len(stacked)))(x, *stacked)
        for n in range(2):
            assert relative_error(both[n], definition(x, *[f[n] for f in stacked])) < 1e-12


class TestBackend:
    def backend(self, tokens, width=640, r=32, k=2, dtype=torch.float32, differentiable=True):
        pair = torch.empty(k, width // k, r), torch.empty(k, r, width // k)
        return select_backend(tokens, [Update(*pair, 1.0)], dtype, differentiable)

    def test_merges_in_fp32_where_tokens_are_many(self):
        assert self.backend(4096) == self.backend(1024) == Backend.MERGED
        assert self.backend(77) == Backend.ADDED
        assert self.backend(1024, width=3072) == Backend.ADDED
        assert self.backend(1024, width=1280) == Backend.ADDED
        assert self.backend(1024, width=1280, k=8) == Backend.MERGED
        assert self.backend(77, width=320) == Backend.ADDED

    def test_forms_the_whole_gradient_where_layers_are_small_or_ranks_high(self):
        assert self.backend(1024, width=64) == self.backend(8, width=32) == Backend.DENSE
        assert self.backend(1024, r=128, k=4) == Backend.DENSE
        assert self.backend(1024, width=64, differentiable=False) == Backend.ADDED

    def test_without_a_backward_pass_the_weight_is_formed_once(self):
        assert self.backend(600) == Backend.ADDED
        assert self.backend(600, differentiable=False) == Backend.MERGED

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("width", [64, 640])
    def test_never_rounds_the_sum_to_half_precision(self, dtype, width):
        assert self.backend(10**6, width, dtype=dtype) == Backend.ADDED


def test_the_whole_gradient_is_recorded_by_autograd_alone():
    """There is no function written in Python behind the result."""
    x, weight, bias, updates = make()
    result = adapted_linear(x, updates, weight, bias, backend=Backend.DENSE)
    nodes, seen = [result.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    names = {type(node).__name__ for node in seen}
    assert "AddmmBackward0" in names
    assert not any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in seen)
