"""Noise, targets and weights against the formulas, at every timestep."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from gralora_diffusion.families import get_family, list_families
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.checks.options import find_problems, find_warnings
from gralora_diffusion.training.data.seeds import generator
from gralora_diffusion.training.optimization.objectives import DDPM, FlowMatching, make_objective
from gralora_diffusion.training.optimization.pseudo_huber import PseudoHuber
from tests.models import PIPELINES
from tests.training.runs import config

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


LEVELS = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
FLOW = FlowMatchEulerDiscreteScheduler


def no_mu(shape: Any) -> float:
    raise AssertionError("asked for a shift by resolution")


def test_noise_levels_with_and_without_shift() -> None:
    plain = FlowMatching(FLOW().config, no_mu).sigmas(SHAPE)
    torch.testing.assert_close(plain.double(), LEVELS, rtol=1e-6, atol=0)
    fixed = FlowMatching(FLOW(shift=3.0).config, no_mu).sigmas(SHAPE)
    torch.testing.assert_close(fixed.double(), 3 * LEVELS / (1 + 2 * LEVELS), rtol=1e-6, atol=0)
    dynamic = FLOW(shift=3.0, use_dynamic_shifting=True).config
    by_size = FlowMatching(dynamic, lambda shape: 0.1 * shape[-1]).sigmas((4, 2, 7))
    expected = math.exp(0.7) / (math.exp(0.7) + 1 / LEVELS - 1)
    torch.testing.assert_close(by_size.double(), expected, rtol=1e-6, atol=0)
    chosen = FlowMatching(dynamic, no_mu, flow_shift=2.0).sigmas(SHAPE)
    torch.testing.assert_close(chosen.double(), 2 * LEVELS / (1 + LEVELS), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", list_families())
def test_shift_by_resolution_is_that_of_the_pipeline(name: str) -> None:
    """For images of two sizes, the level that the pipeline makes of 0.5."""
    family, pipe = get_family(name), PIPELINES[name]()
    if family.objective != "flow_matching":
        pytest.skip("no flow matching")
    objective = make_objective(config(), family, pipe)
    assert isinstance(objective, FlowMatching)
    for height, width in ((16, 16), (64, 32)):
        pipe(prompt="", height=height, width=width, sigmas=[0.5], output_type="latent")
        scale = pipe.vae_scale_factor * (2 if name.startswith("flux2") else 1)
        sigmas = objective.sigmas((4, height // scale, width // scale))
        assert float(sigmas[500]) == pytest.approx(float(pipe.scheduler.sigmas[0]), rel=1e-6)


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"])
def test_flow_draws_and_weights(scheme: str) -> None:
    objective = FlowMatching(FLOW().config, no_mu, scheme, logit_mean=0.4, logit_std=0.8)
    noise, timesteps = objective.draw(0, range(3000), SHAPE)
    again, same = objective.draw(0, [7, 5], SHAPE)
    assert torch.equal(noise[[7, 5]], again)
    assert torch.equal(timesteps[[7, 5]], same)
    assert float(noise.var()) == pytest.approx(1.0, rel=0.05)
    sigmas = timesteps.double() / 1000
    assert sigmas.min() > 0
    assert sigmas.max() <= 1
    # drawn u -> level 1 - u: where logit_normal's u is above 1/2, there is less noise
    medians = {"logit_normal": 1 - 1 / (1 + math.exp(-0.4)), "mode": 0.5}
    assert float(sigmas.median()) == pytest.approx(medians.get(scheme, 0.5), abs=0.03)
    spread = {"logit_normal": 0.17, "mode": 0.21}  # less or more than uniform's 1/sqrt(12)
    assert float(sigmas.std()) == pytest.approx(spread.get(scheme, 12**-0.5), abs=0.03)
    weights = {
        "sigma_sqrt": sigmas**-2,
        "cosmap": 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2)),
    }
    expected = weights.get(scheme, torch.ones(3000, dtype=torch.float64))
    torch.testing.assert_close(objective.weights(timesteps).double(), expected, rtol=1e-5, atol=0)


def test_flow_noisy_latents_and_target() -> None:
    objective = FlowMatching(FLOW(shift=3.0).config, no_mu)
    x = torch.randn(3, *SHAPE)
    noise, timesteps = objective.draw(1, range(3), SHAPE)
    scheduler = FLOW(shift=3.0)
    torch.testing.assert_close(
        objective.add_noise(x, noise, timesteps), scheduler.scale_noise(x, timesteps, noise)
    )
    assert torch.equal(objective.target(x, noise, timesteps), noise - x)
    prediction = torch.randn(3, *SHAPE)
    # a step back from all noise along the true direction ends at the image
    scheduler.set_timesteps(sigmas=[1.0])
    end = scheduler.step(objective.target(x, noise, timesteps), scheduler.timesteps[0], noise)
    torch.testing.assert_close(end.prev_sample, x)
    error = (prediction - (noise - x)).square().mean((1, 2, 3))
    torch.testing.assert_close(objective.loss(prediction, noise - x, timesteps), error)


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [("stable-diffusion-xl", EDMEulerScheduler()), ("flux", DDPMScheduler())],
)
def test_bases_of_another_kind_are_refused(family: str, scheduler: Any) -> None:
    with pytest.raises(ConfigError, match=f"scheduler, {type(scheduler).__name__}, is not for"):
        make_objective(config(), get_family(family), SimpleNamespace(scheduler=scheduler))


# -- weights, noises and timesteps of other programs -----------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_soft_min_snr_weights_at_every_timestep(kind: str) -> None:
    """gamma SNR / (gamma + SNR) for the error in the sample, from 0 at pure noise up to gamma."""
    objective = DDPM(DDPMScheduler().config, kind, snr_gamma=4.0, soft_min_snr=True)
    s = snr(objective)
    per = {"epsilon": s, "v_prediction": s + 1, "sample": torch.ones(1)}[kind]
    expected = (1 / (1 / s + 1 / 4) / per).float()
    torch.testing.assert_close(objective.weights(STEPS), expected, rtol=1e-4, atol=1e-7)
    zero = DDPMScheduler(rescale_betas_zero_snr=True).config
    assert DDPM(zero, kind, snr_gamma=4.0, soft_min_snr=True).weights(STEPS).isfinite().all()


def test_debiased_weights_at_every_timestep() -> None:
    scheduler = DDPMScheduler(beta_start=1e-5)  # its SNR goes beyond 1000
    for kind in ("epsilon", "v_prediction"):
        objective = DDPM(scheduler.config, kind, debiased=True)
        s = snr(objective).clamp(max=1000)
        assert int((s == 1000).sum()) > 1
        expected = 1 / s**0.5 if kind == "epsilon" else 1 / (s + 1)
        weights = objective.weights(STEPS)
        torch.testing.assert_close(weights, expected.float(), rtol=1e-4, atol=1e-7)
    with pytest.raises(ConfigError, match="is not known for a base that predicts the sample"):
        DDPM(scheduler.config, "sample", debiased=True)
    zero = DDPMScheduler(rescale_betas_zero_snr=True).config
    with pytest.raises(ConfigError, match="which has zero terminal SNR"):
        DDPM(zero, "epsilon", debiased=True)
    assert DDPM(zero, "v_prediction", debiased=True).weights(STEPS).isfinite().all()


def test_coarser_noises_are_those_of_independent_grids() -> None:
    """The noise at each level is constant over blocks; all add up to standard deviation 1."""
    shape, plain = torch.Size((2, 8, 16)), DDPM(DDPMScheduler().config)
    objective = DDPM(DDPMScheduler().config, multires_iterations=2, multires_discount=0.5)
    noise, _ = objective.draw(3, [7], shape)
    # the answer by numpy-like indexing: level 0 has the noise's own size, level 1 a factor of r
    rng = generator(3, "multires noise", 7)
    expected = plain.draw(3, [7], shape)[0][0]
    for level in range(2):
        ratio = (2 + 2 * float(torch.rand((), generator=rng))) ** level
        height, width = int(8 / ratio), int(16 / ratio)
        coarse = torch.randn(1, 2, height, width, generator=rng)[0]
        expected = expected + 0.5**level * bilinear(coarse, 8, 16)
    torch.testing.assert_close(noise[0], expected / expected.std(), rtol=1e-5, atol=1e-6)
    again, timesteps = objective.draw(3, [1, 7], shape)
    assert torch.equal(again[1], noise[0])
    assert torch.equal(timesteps, plain.draw(3, [1, 7], shape)[1])
    deep = DDPM(DDPMScheduler().config, multires_iterations=50, multires_discount=0.9)
    many, _ = deep.draw(0, list(range(64)), shape)
    torch.testing.assert_close(many.flatten(1).std(1), torch.ones(64))
    # neighbours, which are independent in plain noise, are alike
    assert float((many[..., 1:] * many[..., :-1]).mean()) > 0.2


def bilinear(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Interpolate (C, h, w) between the centers of pixels, pixel by pixel."""
    result = torch.empty(image.shape[0], height, width)
    for y in range(height):
        for x in range(width):
            places = []
            for at, size, whole in ((y, image.shape[1], height), (x, image.shape[2], width)):
                place = max(0.0, (at + 0.5) * size / whole - 0.5)
                low = min(int(place), size - 1)
                places.append((low, min(low + 1, size - 1), place - low))
            (top, bottom, v), (left, right, h) = places
            upper = image[:, top, left] * (1 - h) + image[:, top, right] * h
            lower = image[:, bottom, left] * (1 - h) + image[:, bottom, right] * h
            result[:, y, x] = upper * (1 - v) + lower * v
    return result


def test_perturbed_input_and_plain_target() -> None:
    plain = DDPM(DDPMScheduler().config)
    objective = DDPM(DDPMScheduler().config, input_perturbation=0.1)
    positions = list(range(200))
    noise, timesteps = objective.draw(0, positions, SHAPE)
    assert torch.equal(noise, plain.draw(0, positions, SHAPE)[0])
    assert plain.perturbed(noise, 0, positions) is noise
    further = (objective.perturbed(noise, 0, positions) - noise) / 0.1
    assert float(further.std()) == pytest.approx(1, abs=0.03)
    assert float((further * noise).mean()) == pytest.approx(0, abs=0.05)
    assert torch.equal(objective.target(noise, noise, timesteps), noise)
    some = objective.perturbed(noise[[5, 3]], 0, [5, 3])
    assert torch.equal(some, objective.perturbed(noise, 0, positions)[[5, 3]])


def test_timesteps_of_a_range() -> None:
    scheduler = DDPMScheduler().config
    drawn = DDPM(scheduler, timestep_range=(300, 310)).draw(0, list(range(300)), SHAPE)[1]
    assert sorted(set(drawn.tolist())) == list(range(300, 310))
    everything = DDPM(scheduler, timestep_range=(0, 1000)).draw(0, list(range(50)), SHAPE)
    for ours, theirs in zip(
        everything, DDPM(scheduler).draw(0, list(range(50)), SHAPE), strict=True
    ):
        assert torch.equal(ours, theirs)
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0).config
    objective = FlowMatching(flow, lambda shape: 0.0, timestep_range=(900, 950))
    drawn = objective.draw(0, list(range(300)), SHAPE)[1]
    assert 900 <= float(drawn.min()) < 905
    assert 945 < float(drawn.max()) <= 950
    levels = FlowMatching(flow, lambda shape: 0.0).sigmas(SHAPE)
    assert set(drawn.tolist()) <= set((levels * 1000).tolist())
    for wrong in ((10, 10), (0, 1001), (1000, None)):
        for make in (
            lambda given: DDPM(scheduler, timestep_range=given),
            lambda given: FlowMatching(flow, lambda shape: 0.0, timestep_range=given),
        ):
            with pytest.raises(ConfigError, match="the timesteps of this base are 0 to 1000"):
                make(wrong)


# -- pseudo-Huber ----------------------------------------------------------------------------------


def conditional_loss(difference: torch.Tensor, kind: str, c: torch.Tensor) -> torch.Tensor:
    """The elements of ``conditional_loss`` in diffusers' training scripts, in fp64."""
    difference, c = difference.double(), c.double().view(-1, 1, 1, 1)
    factor = 2 * c if kind == "huber" else 2
    return factor * (torch.sqrt(difference**2 + c**2) - c)


def objective_of(family: str, **given: Any) -> Any:
    pipe = SimpleNamespace(
        scheduler=(
            DDPMScheduler()
            if get_family(family).objective == "ddpm"
            else FlowMatchEulerDiscreteScheduler()
        )
    )
    return make_objective(config(**given), get_family(family), pipe)


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr", None])
@pytest.mark.parametrize("family", ["stable-diffusion", "stable-diffusion-3"])
def test_pseudo_huber_is_diffusers(family: str, schedule: str | None, kind: str) -> None:
    given = {"huber_schedule": schedule, "snr_gamma": 5.0 if family == "stable-diffusion" else None}
    if schedule == "snr" and family == "stable-diffusion-3":
        with pytest.raises(ConfigError, match="'snr', which is not defined for flow matching"):
            objective_of(family, loss_type=kind, **given)
        return
    objective = objective_of(family, loss_type=kind, huber_c=0.05, **given)
    timesteps = torch.tensor([0, 1, 250, 500, 999])
    rng = torch.Generator().manual_seed(1)
    prediction, target = torch.randn(2, 5, 4, 6, 6, generator=rng)
    prediction[0] *= 1e-3  # errors far below the threshold
    target[0] *= 1e-3
    part = timesteps.double() / 1000
    if schedule == "constant":
        c = torch.full((5,), 0.05)
    elif schedule == "exponential" or family == "stable-diffusion-3":
        c = torch.exp(math.log(0.05) * part)
    else:
        a = DDPMScheduler().alphas_cumprod[timesteps].double()
        c = (1 - 0.05) / (1 + ((1 - a) / a).sqrt()) ** 2 + 0.05
    mask = torch.rand(5, 1, 6, 6, generator=rng)
    expected = (conditional_loss(prediction - target, kind, c) * mask).mean((1, 2, 3))
    expected = expected * objective.weights(timesteps).double()
    loss = objective.loss(prediction, target, timesteps, mask)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=0)


def test_pseudo_huber_has_both_limits_and_gradients() -> None:
    difference = torch.tensor([0.0, 1e-6, 1e-3, 1e3]).view(1, 1, 1, 4).requires_grad_()
    for kind, small, large in (("huber", 1.0, 0.2), ("smooth_l1", 10.0, 2.0)):
        loss = PseudoHuber(kind, 0.1, "constant")
        errors = loss.errors(difference, torch.tensor([0.1])).flatten()
        assert errors[:3].tolist() == pytest.approx([0, small * 1e-12, small * 1e-6], rel=1e-4)
        assert float(errors[3].detach()) == pytest.approx(large * (1e3 - 0.1), rel=1e-6)
        (gradient,) = torch.autograd.grad(errors.sum(), difference)
        assert gradient.flatten()[:2].tolist() == pytest.approx([0, 2 * small * 1e-6], rel=1e-4)
        assert float(gradient.flatten()[3]) == pytest.approx(large, rel=1e-5)


def test_pseudo_huber_is_finite_at_zero_terminal_snr() -> None:
    objective = DDPM(DDPMScheduler(rescale_betas_zero_snr=True).config)
    objective.pseudo_huber = PseudoHuber("huber", 0.1, "snr")
    last = torch.tensor([999])
    loss = objective.loss(torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), last)
    expected = conditional_loss(torch.ones(1, 1, 1, 1), "huber", torch.tensor([0.1]))
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"huber_c": 0}, "--huber_c is 0.0; it must be above 0"),
        ({"huber_c": 2}, "it must be at most 1 with a schedule"),
        ({"masked_loss": True, "mask_outside": "base"}, "--mask_outside base exclude each other"),
    ],
)
def test_pseudo_huber_that_is_not_defined(given: dict[str, Any], problem: str) -> None:
    assert any(problem in text for text in find_problems(config(loss_type="huber", **given)))
    assert not any(problem in text for text in find_problems(config(loss_type="huber")))


def test_options_of_pseudo_huber_without_it() -> None:
    found = find_warnings(config(huber_c=0.2, huber_schedule="snr"))
    assert "these options have no effect with --loss_type l2: --huber_c, --huber_schedule" in found
