"""What the denoiser is asked for: noisy latents, target and weight of each sample.

An objective draws a sample's noise and timestep from (seed, position in the stream) alone, so they
depend neither on the batch size, nor on the number of processes, nor on what ran before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from .streams import generator


class Objective(ABC):
    """Noise and timesteps of a batch, and what to make of them. Latents are (batch, C, h, w)."""

    @abstractmethod
    def draw(self, seed: int, positions: Sequence[int], shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Return noise (batch, *shape) and timesteps (batch,) for these positions, on the CPU."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noisy latents that the denoiser sees."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the denoiser should predict."""

    @abstractmethod
    def weights(self, timesteps: Tensor) -> Tensor:
        """Return the weight (batch,) of each sample's loss."""

    def loss(self, prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        """Return the weighted mean squared error per sample, (batch,), in fp32."""
        error = (prediction.float() - target.float()).square().flatten(1).mean(1)
        return error * self.weights(timesteps)


class DDPM(Objective):
    """Denoising diffusion with epsilon, v or sample prediction (diffusers' ``DDPMScheduler``).

    Args:
        scheduler_config: config of the pipeline's scheduler; its betas are used.
        prediction_type: "epsilon", "v_prediction" or "sample"; the scheduler's if None.
        snr_gamma: min-SNR weighting (arXiv 2303.09556, section 3.4); None weighs all alike.
        noise_offset: strength of noise that is constant over each channel of a picture.
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
            # as gamma / snr, which is 1 rather than 0 / 0 at zero terminal SNR
            return (self.snr_gamma / snr).clamp(max=1.0)
        return clipped
