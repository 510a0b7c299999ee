"""Singular values from factors against the dense update's decomposition in torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gralora_diffusion.adapters.layers import functional
from gralora_diffusion.lora_files import spectrum
from tests.lora_files.test_low_rank import SHAPES, dense, pair
from tests.reference import dense_update


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_and_ranks(shape):
    down, up = pair(*shape)
    whole = dense(down, up)
    expected = torch.linalg.svdvals(whole.flatten(1)).numpy()
    values = spectrum.singular_values(down.numpy(), up.numpy())
    assert len(values) == min(shape[2], *whole.flatten(1).shape)
    np.testing.assert_allclose(values, expected[: len(values)], rtol=1e-12, atol=1e-12)
    p = expected / expected.sum()
    p = p[p > 0]
    entropy = -sum(float(x) * math.log(x) for x in p)
    assert spectrum.effective_rank(values) == pytest.approx(math.exp(entropy), rel=1e-9)
    stable = float((whole.norm() / torch.linalg.matrix_norm(whole.flatten(1), 2)) ** 2)
    assert spectrum.stable_rank(values) == pytest.approx(stable, rel=1e-9)
    assert spectrum.stable_rank(np.zeros(3)) == spectrum.stable_rank(np.zeros(0)) == 0


@pytest.mark.parametrize("shape", [(24, 40, 8, 4), (40, 24, 12, 4), (12, 18, 6, 2), (7, 11, 3, 1)])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("hybrid", [0, 3])
def test_singular_values_of_gralora(shape, kernel, hybrid):
    width, height, r, k = shape
    A, B = functional.init_factors(width, height, r, k, kernel, zero_update=False)
    whole, general = dense_update(A, B), None
    if hybrid:
        down, up = pair(width, height, hybrid, kernel)
        whole += dense(down, up)
        general = down.numpy(), up.numpy()
    expected = torch.linalg.svdvals(whole.flatten(1)).numpy()
    values = spectrum.gralora_singular_values(A.numpy(), B.numpy(), general)
    most = min(len(values), len(expected))
    np.testing.assert_allclose(values[:most], expected[:most], rtol=1e-11, atol=1e-11)
    assert not (values[most:] > 1e-11).any()
    assert not (expected[most:] > 1e-11).any()


def test_effective_rank_of_equal_values_is_their_number():
    assert spectrum.effective_rank(np.full(5, 0.3)) == pytest.approx(5, rel=1e-14)
    assert spectrum.effective_rank(np.array([2.0, 0.0, 0.0])) == 1.0
    assert spectrum.effective_rank(np.zeros(4)) == 0.0


def test_an_update_beyond_float64_has_no_singular_values():
    down, up = (1e200 * factor.numpy() for factor in pair(8, 12, 3))
    assert np.isnan(spectrum.singular_values(down, up)).tolist() == [True] * 3
