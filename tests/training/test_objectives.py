"""Noise, targets and weights against the formulas, at every timestep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

from gralora_diffusion.training.objectives import DDPM

STEPS = torch.arange(1000)
SHAPE = torch.Size((4, 2, 3))


def snr(objective: DDPM) -> torch.Tensor:
    a = objective.scheduler.alphas_cumprod.double()
    return a / (1 - a)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_at_every_timestep(gamma: float) -> None:
    weights = {
        "epsilon": lambda s: s.clamp(max=gamma) / s,
        "v_prediction": lambda s: s.clamp(max=gamma) / (s + 1),
        "sample": lambda s: s.clamp(max=gamma),
    }
    for kind, formula in weights.items():
        objective = DDPM(DDPMScheduler().config, kind, snr_gamma=gamma)
        expected = formula(snr(objective)).float()
        torch.testing.assert_close(objective.weights(STEPS), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_weights_are_finite_at_zero_terminal_snr(kind: str) -> None:
    config = DDPMScheduler(rescale_betas_zero_snr=True).config
    objective = DDPM(config, kind, snr_gamma=5.0)
    assert float(objective.scheduler.alphas_cumprod[-1]) < 1e-7
    weights = objective.weights(STEPS)
    assert weights.isfinite().all()
    assert float(weights[-1]) == pytest.approx(1.0 if kind == "epsilon" else 0.0, abs=1e-6)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler, PNDMScheduler])
def test_noise_is_that_of_the_bases_betas(scheduler: Any) -> None:
    config = scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").config
    objective = DDPM(config)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    a = (1 - betas).cumprod(0)[STEPS].view(-1, 1, 1, 1)
    x, noise = torch.randn(1000, *SHAPE), torch.randn(1000, *SHAPE)
    noisy = objective.add_noise(x, noise, STEPS)
    torch.testing.assert_close(noisy, a.sqrt() * x + (1 - a).sqrt() * noise)
    assert objective.prediction_type == "epsilon"
    assert torch.equal(objective.target(x, noise, STEPS), noise)


def test_draws_depend_on_seed_and_position_only() -> None:
    objective = DDPM(DDPMScheduler().config, noise_offset=0.1)
    noise, timesteps = objective.draw(3, [10, 11, 12], SHAPE)
    again, steps = objective.draw(3, [12, 10], SHAPE)
    assert torch.equal(noise[[2, 0]], again)
    assert torch.equal(timesteps[[2, 0]], steps)
    other, _ = objective.draw(4, [10], SHAPE)
    assert not torch.equal(other[0], noise[0])


def test_distribution_of_noise_and_timesteps() -> None:
    objective = DDPM(DDPMScheduler().config, noise_offset=0.5)
    noise, timesteps = objective.draw(0, range(4000), SHAPE)
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    # 0.25 of the variance is the offset's, the same in each place of a channel
    assert float(noise.var()) == pytest.approx(1.25, rel=0.05)
    assert float(noise.mean((2, 3)).var()) == pytest.approx(1 / 6 + 0.25, rel=0.05)
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert float(timesteps.float().mean()) == pytest.approx(499.5, rel=0.05)


def test_loss_is_per_row_in_fp32() -> None:
    objective = DDPM(DDPMScheduler().config)
    prediction = torch.randn(3, *SHAPE).bfloat16()
    target = torch.randn(3, *SHAPE)
    expected = ((prediction.float() - target) ** 2).mean((1, 2, 3))
    assert torch.equal(objective.loss(prediction, target, torch.tensor([1, 2, 3])), expected)
