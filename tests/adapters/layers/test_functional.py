from functools import partial

import pytest
import torch
import torch.nn.functional as F

from gralora_diffusion.adapters.layers import functional
from tests.reference import dense_update, relative_error

SHAPES = [  # in, out, r, k
    (24, 40, 8, 4),
    (40, 24, 12, 4),
    (48, 16, 16, 8),
    (30, 20, 5, 5),
    (12, 18, 6, 2),
    (7, 11, 3, 1),
]
KERNELS = [(), (1, 1), (3, 3), (3, 1)]


def factors(in_features, out_features, r, k, kernel=(), dtype=torch.float64):
    A, B = functional.init_factors(in_features, out_features, r, k, kernel, zero_update=False)
    return A.to(dtype), B.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_delta_weight_is_the_definition(shape, kernel):
    A, B = factors(*shape, kernel=kernel)
    assert relative_error(functional.delta_weight(A, B), dense_update(A, B)) < 1e-14


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [(), (5,), (2, 3), (2, 3, 4), (0, 3)])
def test_linear_update_is_a_product_with_the_dense_update(shape, tokens):
    A, B = factors(*shape)
    x = torch.randn(*tokens, shape[0], dtype=torch.float64)
    update = functional.linear_update(x, A, B, 0.7)
    expected = 0.7 * x @ dense_update(A, B).T
    assert update.shape == expected.shape
    torch.testing.assert_close(update, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS[1:])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (2, 1)},
        {"padding": (1, 2)},
        {"padding": "same"},
        {"stride": (2, 2), "padding": (2, 1), "dilation": (2, 1)},
    ],
)
def test_conv2d_update_is_a_convolution_with_the_dense_update(shape, kernel, options):
    A, B = factors(*shape, kernel=kernel)
    x = torch.randn(2, shape[0], 9, 8, dtype=torch.float64)
    expected = 0.7 * F.conv2d(x, dense_update(A, B), **options)
    torch.testing.assert_close(
        functional.conv2d_update(x, A, B, 0.7, **options), expected, rtol=0, atol=1e-13
    )
    torch.testing.assert_close(
        functional.conv2d_update(x[0], A, B, 0.7, **options), expected[0], rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_lora_factors_have_the_same_update_exactly_and_its_rank(shape, kernel):
    A, B = factors(*shape, kernel=kernel)
    down, up = functional.lora_factors(A, B)
    _, _, r, k = shape
    assert down.shape == (k * r, shape[0], *kernel)
    assert up.shape == (shape[1], k * r)
    assert (down.flatten(2) if kernel else down).count_nonzero() == down.numel() / k
    expected = dense_update(A, B)
    assert relative_error(torch.einsum("or,ri...->oi...", up, down), expected) < 1e-14
    rank = torch.linalg.matrix_rank(expected.flatten(1))
    assert rank == min(k * r, *expected.flatten(1).shape)


def test_lora_factors_are_exact_in_single_precision():
    """Each output is a sum of the same products as in the definition; the zeros add nothing."""
    A, B = factors(24, 40, 8, 4, dtype=torch.float32)
    A, B = (A * 64).round() / 64, (B * 64).round() / 64  # products and sums without rounding
    down, up = functional.lora_factors(A, B)
    assert torch.equal((up @ down).double(), dense_update(A, B))
    assert torch.equal(functional.delta_weight(A, B).double(), dense_update(A, B))


ROW_SHAPES = [*SHAPES, (32, 56, 8, 8)]


@pytest.mark.parametrize("shape", ROW_SHAPES)
@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3), (3, 1)])
@pytest.mark.parametrize("scaling", [1.0, -0.3])
def test_add_delta_rows_adds_rows_of_the_dense_update(shape, kernel, scaling):
    """Row ranges within a block, across one border and several, the whole, and none."""
    A, B = factors(*shape, kernel=kernel)
    rows, factor_rows = shape[1], functional.row_factors(A, B)
    o = rows // shape[3]
    expected = scaling * dense_update(A, B).flatten(1)
    ranges = {(0, rows), (0, 1), (rows - 1, rows), (o - 1, min(o + 1, rows)), (1, rows - 1)}
    ranges |= {(o, min(2 * o, rows)) if o < rows else (0, o), (o // 2, rows - o // 2), (o, o)}
    for start, stop in ranges:
        base = torch.randn(stop - start, expected.shape[1], dtype=torch.float64)
        target = base.clone()
        functional.add_delta_rows(target, *factor_rows, start, scaling)
        torch.testing.assert_close(target, base + expected[start:stop], rtol=0, atol=1e-13)
    A, B = A.float(), B.float()
    whole = torch.zeros(expected.shape)
    functional.add_delta_rows(whole, *functional.row_factors(A, B), 0, scaling)
    assert relative_error(whole, expected) < 1e-6


def test_gradients():
    A, B = (factor.requires_grad_() for factor in factors(8, 12, 4, 4))
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    update = partial(functional.linear_update, scaling=0.7)
    assert torch.autograd.gradcheck(update, (x, A, B))
    A, B = (factor.requires_grad_() for factor in factors(4, 8, 4, 4, (3, 3)))
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)

    def convolve(x, A, B):
        return functional.conv2d_update(x, A, B, 0.7, (2, 1), (1, 1))

    assert torch.autograd.gradcheck(convolve, (x, A, B))
    assert torch.autograd.gradcheck(functional.delta_weight, (A, B))


def test_new_factors_start_at_zero_with_bounded_random_a():
    A, B = functional.init_factors(64, 32, 8, 4, (3, 3))
    assert A.shape == (4, 16, 8, 3, 3)
    assert B.shape == (4, 8, 8)
    assert not B.any()
    bound = (16 * 9) ** -0.5  # Kaiming-uniform with a=sqrt(5): 1 / sqrt(fan in)
    assert 0.98 * bound < A.abs().max() <= bound
    assert all(abs(block.mean()) < 0.1 * bound for block in A)
