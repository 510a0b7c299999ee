"""Training objectives: noisy latents, target and weight of each sample.

A sample's noise and timestep depend on (seed, position in the stream) alone, and not on the batch
size, the number of processes or anything that ran before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from torch import Tensor

from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.config.options import LossOptions
from gralora_diffusion.training.data.seeds import generator

from .pseudo_huber import PseudoHuber

#: Names of the noise levels that held-out images are measured at, in the order of a generation, and
#: which part of all levels, in the order of their noise, is below each.
LEVELS = {"early": 5 / 6, "middle": 1 / 2, "late": 1 / 6}


class Objective(ABC):
    """Noise and timesteps of a batch, noisy latents and target. Latents are (batch, C, h, w).

    Attributes:
        scheduler: the base's, of diffusers.
        pseudo_huber: what the loss makes of an error; its square if None.
    """

    scheduler: Any
    pseudo_huber: PseudoHuber | None = None

    @abstractmethod
    def draw(self, seed: int, positions: Sequence[int], shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Return noise (batch, *shape) and timesteps (batch,) for these positions, on the CPU."""

    @abstractmethod
    def levels(self, shape: Sequence[int]) -> Tensor:
        """Return the timesteps (3,) of ``LEVELS`` for latents of this shape, on the CPU."""

    def perturbed(self, noise: Tensor, seed: int, positions: Sequence[int]) -> Tensor:
        """Return the noise in the denoiser's input; ``noise`` is what its target is made of."""
        return noise

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noisy latents that the denoiser sees."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the tensor that the denoiser should predict."""

    @abstractmethod
    def weights(self, timesteps: Tensor) -> Tensor:
        """Return the weight (batch,) of each sample's loss."""

    def snr(self, timesteps: Tensor) -> Tensor | None:
        """Return the signal-to-noise ratio (batch,); None if the objective has none."""
        return None

    def loss(
        self,
        prediction: Tensor,
        target: Tensor,
        timesteps: Tensor,
        latent_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted mean error per sample, (batch,), in fp32.

        Args:
            latent_weights: weight of each latent, (batch, 1, h, w); 1 if None. The mean is over all
                latents, whatever they weigh.
        """
        error = prediction.float() - target.float()
        if self.pseudo_huber is None:
            error = error.square()
        else:
            parts = timesteps.float() / self.scheduler.config.num_train_timesteps
            thresholds = self.pseudo_huber.thresholds(parts, self.snr(timesteps))
            error = self.pseudo_huber.errors(error, thresholds)
        if latent_weights is not None:
            error = error * latent_weights
        return error.flatten(1).mean(1) * self.weights(timesteps)


class DDPM(Objective):
    """Denoising diffusion with epsilon, v or sample prediction (diffusers' ``DDPMScheduler``).

    Args:
        scheduler_config: config of the pipeline's scheduler; its betas are used.
        prediction_type: "epsilon", "v_prediction" or "sample"; the scheduler's if None.
        snr_gamma: min-SNR weighting (arXiv 2303.09556, section 3.4); None gives equal weights.
        noise_offset: strength of noise that is constant over each channel of an image.
        soft_min_snr: SNR gamma / (SNR + gamma) in place of the minimum (arXiv 2401.11605).
        debiased: weights of arXiv 2310.08442, as kohya's scripts compute them.
        input_perturbation: strength of further noise in the input (arXiv 2301.11706).
        multires_iterations, multires_discount: coarser noises and how much each is weaker than
            the one before, as kohya's scripts add them.
        timestep_range: first timestep, and the first that is not trained; None is the scheduler's.

    Raises:
        ConfigError: the weights or the range do not fit the base's scheduler.
    """

    def __init__(
        self,
        scheduler_config: Any,
        prediction_type: str | None = None,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        *,
        soft_min_snr: bool = False,
        debiased: bool = False,
        input_perturbation: float = 0.0,
        multires_iterations: int = 0,
        multires_discount: float = 0.3,
        timestep_range: tuple[int | None, int | None] = (None, None),
    ) -> None:
        overrides = {"prediction_type": prediction_type} if prediction_type else {}
        self.scheduler = DDPMScheduler.from_config(scheduler_config, **overrides)
        self.prediction_type: str = self.scheduler.config.prediction_type
        self.snr_gamma, self.soft_min_snr, self.debiased = snr_gamma, soft_min_snr, debiased
        self.noise_offset, self.input_perturbation = noise_offset, input_perturbation
        self.multires_iterations, self.multires_discount = multires_iterations, multires_discount
        steps = self.scheduler.config.num_train_timesteps
        self.first, self.end = _timestep_range(timestep_range, steps)
        if debiased:
            self._check_debiased()

    def _check_debiased(self) -> None:
        problem = None
        if self.prediction_type == "sample":
            problem = "is not known for a base that predicts the sample"
        elif self.prediction_type == "epsilon" and self.scheduler.alphas_cumprod[-1] < 1e-6:
            problem = "is infinite at the last timestep of this base, which has zero terminal SNR"
        if problem:
            raise ConfigError(
                [f"--debiased_estimation_loss: its weight {problem}. Give --snr_gamma instead"]
            )

    def draw(self, seed: int, positions: Sequence[int], shape: torch.Size) -> tuple[Tensor, Tensor]:
        noises, timesteps = [], []
        for position in positions:
            rng = generator(seed, "noise", position)
            noise = torch.randn(shape, generator=rng)
            if self.noise_offset:
                noise += self.noise_offset * torch.randn(shape[0], 1, 1, generator=rng)
            if self.multires_iterations:
                noise = self._with_coarser(noise, generator(seed, "multires noise", position))
            noises.append(noise)
            rng = generator(seed, "timestep", position)
            timesteps.append(torch.randint(self.first, self.end, (), generator=rng))
        return torch.stack(noises), torch.stack(timesteps)

    def levels(self, shape: Sequence[int]) -> Tensor:
        count = self.end - self.first
        return torch.tensor([self.first + int(count * below) for below in LEVELS.values()])

    def _with_coarser(self, noise: Tensor, rng: torch.Generator) -> Tensor:
        """Add noises that are coarser by a random factor of 2 to 4 each, down to one pixel.

        The result has standard deviation 1.
        """
        channels, height, width = noise.shape
        for number in range(self.multires_iterations):
            ratio = (2 + 2 * float(torch.rand((), generator=rng))) ** number
            size = max(1, int(height / ratio)), max(1, int(width / ratio))
            coarse = torch.randn(1, channels, *size, generator=rng)
            finer = F.interpolate(coarse, (height, width), mode="bilinear")[0]
            noise = noise + finer * self.multires_discount**number
            if 1 in size:
                break
        return noise / noise.std()

    def perturbed(self, noise: Tensor, seed: int, positions: Sequence[int]) -> Tensor:
        if not self.input_perturbation:
            return noise
        further = [
            torch.randn(noise.shape[1:], generator=generator(seed, "input perturbation", position))
            for position in positions
        ]
        return noise + self.input_perturbation * torch.stack(further)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        return latents

    def snr(self, timesteps: Tensor) -> Tensor:
        return compute_snr(self.scheduler, timesteps)

    def weights(self, timesteps: Tensor) -> Tensor:
        if self.debiased:
            snr = compute_snr(self.scheduler, timesteps).clamp(max=1000)
            return 1 / (snr + 1) if self.prediction_type == "v_prediction" else snr.rsqrt()
        if self.snr_gamma is None:
            return torch.ones(timesteps.shape, device=timesteps.device)
        snr = compute_snr(self.scheduler, timesteps)
        if self.soft_min_snr:
            clipped = snr * self.snr_gamma / (snr + self.snr_gamma)
        else:
            clipped = snr.clamp(max=self.snr_gamma)  # the weight of the error in the sample
        if self.prediction_type == "v_prediction":
            return clipped / (snr + 1)
        if self.prediction_type == "epsilon":
            # clipped / snr, which is 0 / 0 at zero terminal SNR
            if self.soft_min_snr:
                return self.snr_gamma / (snr + self.snr_gamma)
            return (self.snr_gamma / snr).clamp(max=1.0)
        return clipped


def _timestep_range(given: tuple[int | None, int | None], steps: int) -> tuple[int, int]:
    """Return the first timestep and the one after the last.

    Raises:
        ConfigError: the base has no such timesteps.
    """
    first, end = given[0] or 0, steps if given[1] is None else given[1]
    if end > steps or first >= end:
        raise ConfigError(
            [
                f"--min_timestep is {first} and --max_timestep is {end}; the timesteps of this "
                f"base are 0 to {steps}, and the first must be below the second"
            ]
        )
    return first, end


class FlowMatching(Objective):
    """Rectified flow: the denoiser predicts noise - latents (arXiv 2403.03206).

    Noise levels, densities and weights are diffusers' (``FlowMatchEulerDiscreteScheduler`` and its
    training scripts). Timesteps are sigma x ``num_train_timesteps``, not whole numbers.

    Args:
        scheduler_config: config of the pipeline's scheduler.
        shift_mu: latent shape -> mu of the shift by resolution; only called if the scheduler uses
            one (``use_dynamic_shifting``).
        weighting_scheme: "sigma_sqrt" and "cosmap" weight the loss, "logit_normal" and "mode" set
            how often noise levels are sampled, "none" does neither.
        logit_mean: of logit_normal.
        logit_std: of logit_normal.
        mode_scale: of mode.
        flow_shift: a fixed shift that replaces the scheduler's; 1 is no shift.
        timestep_range: lowest and highest timestep; None is the scheduler's. The density is spread
            over the levels in between.

    Raises:
        ConfigError: the range does not fit the base's scheduler, or contains no noise level.
    """

    def __init__(
        self,
        scheduler_config: Any,
        shift_mu: Callable[[Sequence[int]], float],
        weighting_scheme: str = "none",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        mode_scale: float = 1.29,
        flow_shift: float | None = None,
        timestep_range: tuple[int | None, int | None] = (None, None),
    ) -> None:
        fixed = {} if flow_shift is None else {"shift": flow_shift, "use_dynamic_shifting": False}
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config, **fixed)
        self.shift_mu = shift_mu
        steps = self.scheduler.config.num_train_timesteps
        self.timestep_range = None
        if timestep_range != (None, None):
            self.timestep_range = _timestep_range(timestep_range, steps)
        self.weighting_scheme = weighting_scheme
        self.density = {
            "logit_mean": logit_mean,
            "logit_std": logit_std,
            "mode_scale": mode_scale,
        }

    def draw(self, seed: int, positions: Sequence[int], shape: torch.Size) -> tuple[Tensor, Tensor]:
        sigmas, noises, drawn = self.sigmas(shape), [], []
        for position in positions:
            noises.append(torch.randn(shape, generator=generator(seed, "noise", position)))
            rng = generator(seed, "timestep", position)
            density = compute_density_for_timestep_sampling(
                self.weighting_scheme, 1, generator=rng, **self.density
            )
            # rounding may give a density of 1, which would be one past the last level
            drawn.append(sigmas[min(int(density * len(sigmas)), len(sigmas) - 1)])
        return torch.stack(noises), torch.stack(drawn) * self.scheduler.config.num_train_timesteps

    def levels(self, shape: Sequence[int]) -> Tensor:
        sigmas = self.sigmas(shape)  # from the most noise downwards
        chosen = [min(int(len(sigmas) * (1 - b)), len(sigmas) - 1) for b in LEVELS.values()]
        return sigmas[chosen] * self.scheduler.config.num_train_timesteps

    def sigmas(self, latent_shape: Sequence[int]) -> Tensor:
        """Return the noise levels for latents of this shape, from 1 downwards, (levels,)."""
        sigmas: Tensor = self.scheduler.sigmas
        if self.scheduler.config.use_dynamic_shifting:
            sigmas = self.scheduler.time_shift(self.shift_mu(latent_shape), 1.0, sigmas)
        if self.timestep_range is not None:
            first, end = self.timestep_range
            timesteps = sigmas * self.scheduler.config.num_train_timesteps
            sigmas = sigmas[(timesteps >= first) & (timesteps <= end)]
            if not len(sigmas):
                raise ConfigError(
                    [
                        f"--min_timestep is {first} and --max_timestep is {end}; no noise level "
                        "of this base is in between. Give a wider range"
                    ]
                )
        return sigmas

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigmas = self._sigma_of(timesteps).view(-1, 1, 1, 1)
        return (1.0 - sigmas) * latents + sigmas * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def weights(self, timesteps: Tensor) -> Tensor:
        weights: Tensor = compute_loss_weighting_for_sd3(
            self.weighting_scheme, self._sigma_of(timesteps)
        )
        return weights

    def _sigma_of(self, timesteps: Tensor) -> Tensor:
        return timesteps / self.scheduler.config.num_train_timesteps


class AtLevels(Objective):
    """Another objective at the noise levels of ``LEVELS``, in turn over the positions.

    The denoiser's input is not perturbed, since that is a part of training only.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def draw(self, seed: int, positions: Sequence[int], shape: torch.Size) -> tuple[Tensor, Tensor]:
        noise, _ = self.objective.draw(seed, positions, shape)
        levels = self.levels(shape)
        return noise, levels[[position % len(levels) for position in positions]]

    def levels(self, shape: Sequence[int]) -> Tensor:
        return self.objective.levels(shape)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.objective.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.objective.target(latents, noise, timesteps)

    def weights(self, timesteps: Tensor) -> Tensor:
        return self.objective.weights(timesteps)


def make_objective(options: LossOptions, family: ModelFamily, pipe: Any) -> Objective:
    """Return the family's objective with the run's options.

    Raises:
        ConfigError: the scheduler of the base has another kind.
    """
    objective = _make_objective(options, family, pipe)
    objective.pseudo_huber = pseudo_huber(options, family)
    return objective


def pseudo_huber(options: LossOptions, family: ModelFamily) -> PseudoHuber | None:
    """Return the pseudo-Huber loss of the options, with the family's usual schedule; None for l2.

    Raises:
        ConfigError: the schedule is not defined for the family.
    """
    if options.loss_type == "l2":
        return None
    usual: Literal["snr", "exponential"] = "snr" if family.objective == "ddpm" else "exponential"
    schedule = options.huber_schedule or usual
    if schedule == "snr" and usual != "snr":
        raise ConfigError(
            [
                "--huber_schedule is 'snr', which is not defined for flow matching, by which "
                f"{family.name} is trained. Give --huber_schedule exponential or constant"
            ]
        )
    return PseudoHuber(options.loss_type, options.huber_c, schedule)


def _make_objective(options: LossOptions, family: ModelFamily, pipe: Any) -> Objective:
    scheduler, name = pipe.scheduler.config, type(pipe.scheduler).__name__
    if family.objective == "flow_matching":
        if "shift" not in scheduler:
            raise ConfigError([_wrong_scheduler(name, family, "flow matching")])
        return FlowMatching(
            scheduler,
            lambda shape: family.shift_mu(pipe, shape),
            options.weighting_scheme or "none",
            options.logit_mean,
            options.logit_std,
            options.mode_scale,
            options.flow_shift,
            (options.min_timestep, options.max_timestep),
        )
    if "beta_schedule" not in scheduler:
        raise ConfigError([_wrong_scheduler(name, family, "denoising diffusion")])
    return DDPM(
        scheduler,
        options.prediction_type,
        options.snr_gamma,
        options.noise_offset,
        soft_min_snr=options.soft_min_snr,
        debiased=options.debiased_estimation_loss,
        input_perturbation=options.input_perturbation,
        multires_iterations=options.multires_noise_iterations,
        multires_discount=options.multires_noise_discount,
        timestep_range=(options.min_timestep, options.max_timestep),
    )


def _wrong_scheduler(name: str, family: ModelFamily, wanted: str) -> str:
    return (
        f"--pretrained_model_name_or_path: the base's scheduler, {name}, is not for {wanted}, "
        f"which is the only way to train {family.name} here. Give a base with such a scheduler; "
        "bases of another kind (EDM, ...) cannot be trained"
    )
