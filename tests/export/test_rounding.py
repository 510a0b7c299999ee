"""Rounding and what it costs, against float64 and the neighbours that ``nextafter`` gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gralora_diffusion.export.rounding import (
    DTYPES,
    Rounding,
    RoundingLoss,
    measure,
    round_to,
)

HALVES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def grid(dtype: torch.dtype) -> Tensor:
    """All finite values of a dtype, in order, in float64."""
    bits = torch.arange(2 ** (8 * dtype.itemsize), dtype=torch.int64)
    integer = torch.uint8 if dtype.itemsize == 1 else torch.uint16
    values = bits.to(integer).view(dtype).double()
    return values[values.isfinite()].unique()


def neighbours(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest value of the dtype that is not above, the smallest that is not below."""
    points, exact = grid(dtype), values.double()
    below = points[torch.searchsorted(points, exact, right=True) - 1]
    return below, points[torch.searchsorted(points, exact)]


def rounded(values: Tensor, dtype: torch.dtype, seed: int | None = None) -> Tensor:
    out = torch.empty(values.shape, dtype=dtype)
    rounding = Rounding(seed is not None, seed or 0)
    round_to(values, out, rounding.generator("key", 0))
    return out


def samples(dtype: torch.dtype) -> Tensor:
    """Values of both signs and of all sizes in the dtype's range, subnormal ones, and zero."""
    info = torch.finfo(dtype)
    low = max(math.log2(info.smallest_normal * info.eps) - 2, -140)
    exponents = torch.empty(4000).uniform_(low, math.log2(info.max) - 0.1)
    sizes = torch.exp2(exponents.double()).float()
    return torch.cat([sizes, -sizes, torch.tensor([0.0, -0.0])])


@pytest.mark.parametrize("dtype", HALVES)
def test_to_nearest(dtype):
    values = samples(dtype)
    below, above = neighbours(values, dtype)
    found = rounded(values, dtype).double()
    nearest = torch.minimum(values.double() - below, above - values.double())
    assert torch.equal((found - values.double()).abs(), nearest)


@pytest.mark.parametrize("dtype", HALVES)
def test_by_chance_gives_one_of_the_two_neighbours(dtype):
    values = samples(dtype)
    below, above = neighbours(values, dtype)
    found = torch.stack([rounded(values, dtype, seed).double() for seed in range(20)])
    assert ((found == below) | (found == above)).all()
    inside = (below < values.double()) & (values.double() < above)
    assert inside.sum() > 7000
    both = (found == below).any(0) & (found == above).any(0)
    assert both[inside].double().mean() > 0.8


@pytest.mark.parametrize("dtype", HALVES)
def test_by_chance_is_right_in_the_mean(dtype):
    """Chance of the upper neighbour = distance from the lower one, within 5 standard errors."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    fractions = torch.tensor([1 / 64, 0.25, 0.5, 0.6875, 63 / 64])
    draws = 40_000
    for start in (1.0, 3.0, 100.0, tiny, 0.0, float(torch.finfo(dtype).smallest_normal)):
        lower = torch.tensor(start).to(dtype).double()
        points = grid(dtype)
        step = points[torch.searchsorted(points, lower, right=True)] - lower
        for sign in (1, -1):
            values = (sign * (lower + fractions.double() * step)).float()
            assert torch.equal(values.double(), sign * (lower + fractions.double() * step))
            many = values[:, None].expand(-1, draws).contiguous()
            found = sign * rounded(many, dtype, seed=7).double()
            up = ((found - lower) / step).mean(1)
            bound = 5 * (fractions * (1 - fractions) / draws).sqrt()
            assert ((up - fractions).abs() <= bound).all(), (start, sign, up)


@pytest.mark.parametrize("dtype", HALVES)
def test_values_of_the_dtype_are_never_moved(dtype):
    values = grid(dtype).float()
    for seed in range(3):
        assert torch.equal(rounded(values, dtype, seed).float(), values)


def test_single_precision_is_not_rounded_by_chance():
    values = torch.randn(1000)
    assert torch.equal(rounded(values, torch.float32, 3), values)


def test_a_seed_a_key_and_a_block_make_the_chance():
    def draws(seed: int, key: str, block: int) -> Tensor:
        return torch.rand(8, generator=Rounding(True, seed).generator(key, block))

    first = draws(1, "a", 2)
    assert torch.equal(first, draws(1, "a", 2))
    for other in ((2, "a", 2), (1, "b", 2), (1, "a", 3), (12, "a", 2)):
        assert not torch.equal(first, draws(*other))
    assert Rounding().generator("a", 0) is None


def direct(base: Tensor, base_rounded: Tensor, total: Tensor, out: Tensor) -> RoundingLoss:
    """The definition, in float64."""
    weight, update = base_rounded.double(), total.double() - base.double()
    kept = out.double() - weight
    return RoundingLoss(
        float(weight.square().sum()),
        float(update.square().sum()),
        float((kept - update).square().sum()),
        float((kept * update).sum()),
    )


def cost(base: Tensor, base_rounded: Tensor, total: Tensor, out: Tensor) -> RoundingLoss:
    base = base.flatten()
    before = base if torch.equal(base, base_rounded.flatten()) else base_rounded.flatten()
    return measure(base, before, total.flatten().clone(), out.flatten().clone())


def close(found: RoundingLoss, expected: RoundingLoss) -> None:
    for name in ("weight", "update", "difference"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5), name
    assert found.agreement == pytest.approx(expected.agreement, abs=1e-5 * expected.update)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_loss_is_its_definition(dtype, same):
    base = torch.randn(50, 70)
    if same:
        base = base.to(dtype).float()
    before = base if same else base.to(dtype).float()
    total = base + 0.05 * torch.randn(50, 70)
    out = rounded(total, dtype).float()
    expected = direct(base, before, total, out)
    found = cost(base, before, total, out)
    close(found, expected)
    assert found.error == pytest.approx(math.sqrt(expected.difference / expected.update), rel=1e-4)
    assert found.gain == pytest.approx(expected.agreement / expected.update, rel=1e-4)
    assert found.ratio == pytest.approx(math.sqrt(expected.update / expected.weight), rel=1e-4)


def test_losses_add_up():
    base = torch.randn(60, 64).bfloat16().float()
    total = base + 0.02 * torch.randn(60, 64)
    out = rounded(total, torch.bfloat16).float()
    parts = [slice(0, 10), slice(10, 41), slice(41, 60)]
    losses = [cost(base[p], base[p], total[p], out[p]) for p in parts]
    close(sum(losses, start=RoundingLoss()), direct(base, base, total, out))


@pytest.mark.parametrize(
    ("ratio", "dtype", "lost"),
    [
        (0.02, "fp16", 0.01),
        (0.02, "bf16", 0.08),
        (0.02, "fp8_e4m3", 0.83),
        (0.005, "fp16", 0.04),
        (0.005, "bf16", 0.33),
        (0.005, "fp8_e4m3", 1.0),
    ],
)
def test_what_small_updates_lose(ratio, dtype, lost):
    """Normal weights and updates; in fp8, without a scale, standard deviation 0.04."""
    base = (0.04 * torch.randn(1000, 1000)).to(DTYPES[dtype]).float()
    total = base + ratio * 0.04 * torch.randn(1000, 1000)
    out = rounded(total, DTYPES[dtype]).float()
    loss = cost(base, base, total, out)
    assert loss.ratio == pytest.approx(ratio, rel=0.02)
    assert loss.error == pytest.approx(lost, abs=0.01)
    assert f"{loss.error:.1%}, strength {loss.gain:.3f}" in str(loss)


def test_nothing_and_exactly_kept():
    assert (RoundingLoss().error, RoundingLoss().gain, RoundingLoss().ratio) == (0, 1, math.inf)
    base, total = torch.randn(8, 8), torch.randn(8, 8)
    loss = cost(base, base, total, total)
    assert (loss.error, loss.gain) == (0, pytest.approx(1))
