"""Low-rank pairs against the dense update and its decomposition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gralora_diffusion.adapters.layers import functional
from gralora_diffusion.lora_files import low_rank
from tests.reference import dense_update, relative_error

# in, out, R, kernel: wide, tall, a rank above both sides, convolutions
SHAPES = [
    (24, 40, 6, ()),
    (40, 24, 6, ()),
    (8, 12, 20, ()),
    (16, 24, 5, (3, 3)),
    (8, 4, 7, (1, 1)),
    (4, 16, 6, (3, 1)),
]


def pair(width, height, rank, kernel=(), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, width, *kernel, generator=generator, dtype=torch.float64)
    up = torch.randn(height, rank, generator=generator, dtype=torch.float64)
    return down.to(dtype), up.to(dtype)


def dense(down: Tensor, up: Tensor) -> Tensor:
    return torch.einsum("or,ri...->oi...", up.double(), down.double())


def left_out(actual: Tensor, whole: Tensor) -> float:
    return float((actual - whole).norm() / whole.norm())


def best(update: Tensor, rank: int) -> Tensor:
    U, values, Vh = torch.linalg.svd(update.flatten(1), full_matrices=False)
    return (U[:, :rank] * values[:rank] @ Vh[:rank]).reshape(update.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_truncated_is_the_best_of_its_rank_and_tells_what_it_leaves_out(shape, rank):
    down, up = pair(*shape)
    whole = dense(down, up)
    new_down, new_up, error = low_rank.truncate(down, up, rank=rank)
    assert new_down.shape == (rank, *down.shape[1:])
    assert new_up.shape == (len(up), rank)
    assert relative_error(dense(new_down, new_up), best(whole, rank)) < 1e-13
    assert error == pytest.approx(left_out(dense(new_down, new_up), whole), rel=1e-12)
    assert error > 0.01


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99])
def test_energy_keeps_the_smallest_rank_that_has_it(shape, energy):
    down, up = pair(*shape)
    values = torch.linalg.svdvals(dense(down, up).flatten(1))
    new_down, _, error = low_rank.truncate(down, up, energy=energy)
    part = values.square().cumsum(0) / values.square().sum()
    rank = len(new_down)
    assert part[rank - 1] >= energy
    assert rank == 1 or part[rank - 2] < energy
    expected = float(values[rank:].norm() / values.norm())
    assert error == pytest.approx(expected, rel=1e-9, abs=1e-14)


def test_all_the_energy_is_the_rank_that_the_update_really_has():
    down, up = pair(24, 40, 4)
    twice = torch.cat([down, 2 * down]), torch.cat([up, up], dim=1)
    new_down, new_up, error = low_rank.truncate(*twice, energy=1.0)
    assert len(new_down) == 4
    assert error < 1e-15
    assert relative_error(dense(new_down, new_up), 3 * dense(down, up)) < 1e-13


def test_of_rank_and_energy_the_smaller_counts():
    down, up = pair(24, 40, 6)
    by_energy = len(low_rank.truncate(down, up, energy=0.6)[0])
    assert 1 < by_energy < 6
    assert len(low_rank.truncate(down, up, rank=by_energy + 1, energy=0.6)[0]) == by_energy
    assert len(low_rank.truncate(down, up, rank=by_energy - 1, energy=0.6)[0]) == by_energy - 1


@pytest.mark.parametrize("rank", [6, 100])
def test_a_rank_that_is_not_smaller_leaves_the_pair_as_it_is(rank):
    down, up = pair(24, 40, 6, dtype=torch.float32)
    new_down, new_up, error = low_rank.truncate(down, up, rank=rank)
    assert torch.equal(new_down, down)
    assert torch.equal(new_up, up)
    assert error == 0.0


def test_a_rank_above_what_the_widths_allow_is_brought_down_without_loss():
    down, up = pair(8, 12, 20)
    new_down, new_up, error = low_rank.truncate(down, up, rank=15)
    assert len(new_down) == 8
    assert error == 0.0
    assert relative_error(dense(new_down, new_up), dense(down, up)) < 1e-13


@pytest.mark.parametrize("options", [{"rank": 2}, {"energy": 0.9}, {"rank": 1, "energy": 1.0}])
def test_an_update_of_zeros(options):
    down, up = pair(24, 40, 6, (3, 3))
    new_down, new_up, error = low_rank.truncate(down, torch.zeros_like(up), **options)
    assert new_down.shape == (1, 24, 3, 3)
    assert new_up.shape == (40, 1)
    assert not new_down.any()
    assert not new_up.any()
    assert error == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_double_and_returned_in_single(dtype):
    down, up = pair(24, 40, 6, dtype=dtype)
    new_down, new_up, _ = low_rank.truncate(down, up, rank=3)
    assert new_down.dtype == new_up.dtype == torch.float32
    assert relative_error(dense(new_down, new_up), best(dense(down, up), 3)) < 1e-6
    A, _, _ = low_rank.gralora_factors(down, up, 8, 4)
    assert A.dtype == torch.float32


def test_both_factors_are_of_one_size():
    down, up = pair(24, 40, 6)
    new_down, new_up, _ = low_rank.truncate(1e-6 * down, 1e6 * up, rank=6, energy=1.0)
    sizes = new_down.norm(dim=1), new_up.norm(dim=0)
    torch.testing.assert_close(*sizes, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_norm(shape):
    down, up = pair(*shape)
    assert low_rank.norm(down, up) == pytest.approx(float(dense(down, up).norm()), rel=1e-13)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_rows_joined(kernel):
    pairs = [pair(24, out, rank, kernel, seed=rank) for out, rank in ((40, 6), (8, 3), (16, 1))]
    down, up = low_rank.join_rows(pairs)
    assert down.shape == (10, 24, *kernel)
    assert torch.equal(dense(down, up), torch.cat([dense(*each) for each in pairs]))


def test_rows_joined_of_a_layer_without_an_update():
    down, up = pair(24, 8, 3)
    nothing = (torch.zeros(0, 24), torch.zeros(16, 0))
    joined = low_rank.join_rows([nothing, (down, up), nothing])
    expected = torch.cat([torch.zeros(16, 24), dense(down, up), torch.zeros(16, 24)])
    assert torch.equal(dense(*joined), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4])
def test_split(shape, rank):
    down, up = pair(*shape)
    first, rest = low_rank.split(down, up, rank)
    assert len(first[0]) == rank
    assert relative_error(dense(*first), best(dense(down, up), rank)) < 1e-13
    assert relative_error(dense(*first) + dense(*rest), dense(down, up)) < 1e-13


GRIDS = [  # in, out, R, kernel, r, k: room for the whole rank in each block
    (24, 40, 2, (), 8, 4),
    (40, 24, 3, (), 12, 4),
    (48, 16, 2, (), 16, 8),
    (16, 24, 1, (3, 3), 8, 4),
    (20, 30, 2, (3, 1), 10, 5),
    (7, 11, 3, (), 3, 1),
]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("spare", [0, 1])
def test_a_lora_that_the_blocks_have_room_for_is_copied_exactly(grid, spare):
    *shape, r, k = grid
    r += spare * k
    down, up = pair(*shape)
    down, up = (down * 64).round() / 64, (up * 64).round() / 64  # products and sums not rounded
    A, B, error = low_rank.gralora_factors(down, up, r, k)
    assert A.shape == (k, shape[0] // k, r, *shape[3])
    assert B.shape == (k, r, shape[1] // k)
    assert A.is_contiguous()
    assert B.is_contiguous()
    assert error == 0.0
    assert torch.equal(functional.delta_weight(A, B), dense(down, up))
    assert torch.equal(dense_update(A, B), dense(down, up))


@pytest.mark.parametrize(
    "grid",
    [
        (24, 40, 6, (), 8, 4),
        (40, 24, 5, (), 4, 4),
        (48, 32, 9, (), 16, 8),
        (16, 24, 7, (3, 3), 8, 4),
        (8, 12, 20, (), 4, 2),
    ],
)
def test_else_each_block_is_the_best_of_its_rank(grid):
    width, height, rank, kernel, r, k = grid
    down, up = pair(width, height, rank, kernel)
    A, B, error = low_rank.gralora_factors(down, up, r, k)
    whole = dense(down, up)
    expected, i, o = torch.empty_like(whole), width // k, height // k
    for j in range(k):
        for n in range(k):
            block = slice(j * o, (j + 1) * o), slice(n * i, (n + 1) * i)
            expected[block] = best(whole[block], r // k)
    assert relative_error(dense_update(A, B), expected) < 1e-13
    assert relative_error(functional.delta_weight(A, B), expected) < 1e-13
    assert error == pytest.approx(left_out(expected, whole), rel=1e-12)
    assert error > 0.01


def test_blocks_too_small_for_the_rank_lose_nothing():
    """Blocks of 2 x 3: rank 2 is all they have, whatever the pair's rank."""
    down, up = pair(8, 12, 6)
    A, B, error = low_rank.gralora_factors(down, up, 12, 4)
    assert error == 0.0
    assert A.shape == (4, 2, 12)
    assert relative_error(dense_update(A, B), dense(down, up)) < 1e-13


def test_zeros_in_blocks():
    down, up = pair(24, 40, 6)
    A, B, error = low_rank.gralora_factors(down, torch.zeros_like(up), 8, 4)
    assert not functional.delta_weight(A, B).any()
    assert error == 0.0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda d, u: low_rank.truncate(d, u), "rank, energy or both"),
        (lambda d, u: low_rank.truncate(d, u, rank=0), "at least 1 but is 0"),
        (lambda d, u: low_rank.truncate(d, u, energy=1.5), "but is 1.5"),
        (lambda d, u: low_rank.truncate(d, u.T, rank=2), r"down \(6, 24\) and up \(6, 40\)"),
        (lambda d, u: low_rank.truncate(d * math.nan, u, rank=2), "NaN"),
        (lambda d, u: low_rank.norm(d, u / 0), "NaN or infinite"),
        (lambda d, u: low_rank.gralora_factors(d, u, 6, 4), "rank=6 must be divisible by k=4"),
        (lambda d, u: low_rank.gralora_factors(d, u, 15, 5), "in=24 must be divisible by k=5"),
        (lambda d, u: low_rank.join_rows([(d, u), (d[:, :8], u)]), r"got \(24,\), \(8,\)"),
        (lambda d, u: low_rank.join_rows([]), "got none"),
    ],
)
def test_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call(*pair(24, 40, 6))
