"""Training objectives: noisy latents, target and weight of each sample.

A sample's noise and timestep depend on (seed, position in the stream) alone, and not on the batch
size, the number of processes or anything that ran before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
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


class Objective(ABC):
    """Noise and timesteps of a batch, noisy latents and target. Latents are (batch, C, h, w)."""

    @abstractmethod
    def draw(self, seed: int, positions: Sequence[int], shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Return noise (batch, *shape) and timesteps (batch,) for these positions, on the CPU."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noisy latents that the denoiser sees."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the tensor that the denoiser should predict."""

    @abstractmethod
    def weights(self, timesteps: Tensor) -> Tensor:
        """Return the weight (batch,) of each sample's loss."""

    def loss(
        self,
        prediction: Tensor,
        target: Tensor,
        timesteps: Tensor,
        latent_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted mean squared error per sample, (batch,), in fp32.

        Args:
            latent_weights: weight of each latent, (batch, 1, h, w); 1 if None. The mean is over all
                latents, whatever they weigh.
        """
        error = (prediction.float() - target.float()).square()
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
    """

    def __init__(
        self,
        scheduler_config: Any,
        prediction_type: str | None = None,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
    ) -> None:
        overrides = {"prediction_type": prediction_type} if prediction_type else {}
        self.scheduler = DDPMScheduler.from_config(scheduler_config, **overrides)
        self.prediction_type: str = self.scheduler.config.prediction_type
        self.snr_gamma = snr_gamma
        self.noise_offset = noise_offset

    def draw(self, seed: int, positions: Sequence[int], shape: torch.Size) -> tuple[Tensor, Tensor]:
        noises, timesteps = [], []
        steps = self.scheduler.config.num_train_timesteps
        for position in positions:
            rng = generator(seed, "noise", position)
            noise = torch.randn(shape, generator=rng)
            if self.noise_offset:
                noise += self.noise_offset * torch.randn(shape[0], 1, 1, generator=rng)
            noises.append(noise)
            rng = generator(seed, "timestep", position)
            timesteps.append(torch.randint(steps, (), generator=rng))
        return torch.stack(noises), torch.stack(timesteps)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        return latents

    def weights(self, timesteps: Tensor) -> Tensor:
        if self.snr_gamma is None:
            return torch.ones(timesteps.shape, device=timesteps.device)
        snr = compute_snr(self.scheduler, timesteps)
        clipped = snr.clamp(max=self.snr_gamma)  # the weight of the error in the sample
        if self.prediction_type == "v_prediction":
            return clipped / (snr + 1)
        if self.prediction_type == "epsilon":
            # gamma / snr, clamped, is 1 at zero terminal SNR, where clipped / snr is 0 / 0
            return (self.snr_gamma / snr).clamp(max=1.0)
        return clipped


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
    ) -> None:
        fixed = {} if flow_shift is None else {"shift": flow_shift, "use_dynamic_shifting": False}
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config, **fixed)
        self.shift_mu = shift_mu
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

    def sigmas(self, latent_shape: Sequence[int]) -> Tensor:
        """Return the noise levels for latents of this shape, from 1 downwards, (levels,)."""
        sigmas: Tensor = self.scheduler.sigmas
        if self.scheduler.config.use_dynamic_shifting:
            sigmas = self.scheduler.time_shift(self.shift_mu(latent_shape), 1.0, sigmas)
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


def make_objective(options: LossOptions, family: ModelFamily, pipe: Any) -> Objective:
    """Return the family's objective with the run's options.

    Raises:
        ConfigError: the scheduler of the base has another kind.
    """
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
        )
    if "beta_schedule" not in scheduler:
        raise ConfigError([_wrong_scheduler(name, family, "denoising diffusion")])
    return DDPM(scheduler, options.prediction_type, options.snr_gamma, options.noise_offset)


def _wrong_scheduler(name: str, family: ModelFamily, wanted: str) -> str:
    return (
        f"--pretrained_model_name_or_path: the base's scheduler, {name}, is not for {wanted}, "
        f"which is the only way to train {family.name} here. Give a base with such a scheduler; "
        "bases of another kind (EDM, ...) cannot be trained"
    )
