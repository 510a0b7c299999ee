"""One training step's arithmetic: from samples to rows, from rows to losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Conditioning, ModelFamily
from .acceleration import without_fp16_autocast
from .batches import Batches
from .config import TrainingConfig
from .objectives import Objective
from .prior import frozen_base
from .prompt_lengths import cuts_told_already
from .streams import generator, seed_from


@dataclass
class Rows:
    """A batch as the denoiser sees it, of one shape. Prior rows follow the instance rows."""

    noisy_latents: Tensor  # (rows, C, h, w)
    timesteps: Tensor  # (rows,)
    target: Tensor  # as noisy_latents
    prompts: list[str]
    pictures: Conditioning  # what depends on the picture and not on the prompt
    encoded: Conditioning | None  # None: encode the prompts in the step, with gradients
    weights: Tensor  # (rows,)
    instances: int  # how many of the rows, the first ones, are not the prior's

    def __add__(self, other: Rows) -> Rows:
        """Append prior rows of the same shape."""
        encoded = None
        if self.encoded is not None and other.encoded is not None:
            encoded = _joined(self.encoded, other.encoded)
        return Rows(
            torch.cat([self.noisy_latents, other.noisy_latents]),
            torch.cat([self.timesteps, other.timesteps]),
            torch.cat([self.target, other.target]),
            self.prompts + other.prompts,
            _joined(self.pictures, other.pictures),
            encoded,
            torch.cat([self.weights, other.weights]),
            self.instances,
        )


def _joined(first: Conditioning, second: Conditioning) -> Conditioning:
    return {key: torch.cat([value, second[key]]) for key, value in first.items()}


def mean_loss(losses: Tensor, groups: Sequence[Rows]) -> Tensor:
    """Return the loss of a step: the weighted losses of all rows, per instance row.

    ``losses`` (rows of all groups,) are what :class:`DenoisingStep` gives.
    """
    weights = torch.cat([rows.weights for rows in groups])
    return (losses * weights).sum() / sum(rows.instances for rows in groups)


class DenoisingStep(nn.Module):
    """Everything that is trained, as one module: ``forward(groups)`` gives the loss of each row.

    One module, so that gradients of denoiser and text encoders are synchronized, clipped and
    autocast together. For the same reason rows of several shapes, a group for each, go through one
    ``forward``, though each needs a pass of its own through the denoiser.
    """

    def __init__(
        self,
        pipe: Any,
        family: ModelFamily,
        objective: Objective,
        trained: Sequence[str],
        max_sequence_length: int | None = None,
    ) -> None:
        super().__init__()
        self.max_sequence_length = max_sequence_length
        self.trained = nn.ModuleDict({name: getattr(pipe, name) for name in trained})
        self.pipe, self.family, self.objective = pipe, family, objective

    def forward(self, groups: Sequence[Rows]) -> Tensor:
        return torch.cat([self._losses(rows) for rows in groups])

    def _losses(self, rows: Rows) -> Tensor:
        encoded = rows.encoded
        if encoded is None:
            device = rows.noisy_latents.device
            with without_fp16_autocast(device), cuts_told_already(self.pipe):
                encoded = self.family.encode_prompts(
                    self.pipe, rows.prompts, self.max_sequence_length
                )
        prediction = self.family.predict(
            self.trained[self.family.denoiser],
            rows.noisy_latents,
            rows.timesteps,
            {**encoded, **rows.pictures},
        )
        return self.objective.loss(prediction, rows.target, rows.timesteps)


class RowMaker:
    """Turns collated samples into :class:`Rows` on the device.

    Args:
        step: the unwrapped :class:`DenoisingStep`.
        data: what encodes pictures and knows encoded prompts.
        dtype: of noisy latents, the denoiser's.
    """

    def __init__(
        self,
        step: DenoisingStep,
        data: Batches,
        config: TrainingConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.step, self.data, self.seed = step, data, config.seed
        self.device, self.dtype = device, dtype
        self.guidance_scale = config.guidance_scale
        self.prior_weight, self.class_prompt = config.prior_loss_weight, str(config.class_prompt)

    def rows(
        self, instance: Mapping[str, Any], classes: Mapping[str, Any] | None = None
    ) -> list[Rows]:
        """Make the rows of a batch, with the prior's rows if there is a prior.

        They are one group, or two if the class pictures have another shape.
        """
        rows = self._rows(instance, self.seed, 1.0)
        if self.data.teacher is not None:
            rows = rows + self._teacher_rows(rows, self.data.teacher)
        if classes is None:
            return [rows]
        prior = self._rows(classes, seed_from(self.seed, "class"), self.prior_weight)
        prior.instances = 0
        if prior.target.shape[1:] == rows.target.shape[1:]:
            return [rows + prior]
        return [rows, prior]

    def _rows(self, batch: Mapping[str, Any], seed: int, weight: float) -> Rows:
        objective = self.step.objective
        latents = self._latents(batch, seed)
        noise, timesteps = objective.draw(seed, batch["positions"], latents.shape[1:])
        noise, timesteps = noise.to(self.device), timesteps.to(self.device)
        count = len(timesteps)
        return Rows(
            objective.add_noise(latents, noise, timesteps).to(self.dtype),
            timesteps,
            objective.target(latents, noise, timesteps),
            list(batch["prompts"]),
            self._pictures(batch),
            self._encoded(batch["prompts"]),
            torch.full((count,), weight, device=self.device),
            count,
        )

    def _latents(self, batch: Mapping[str, Any], seed: int) -> Tensor:
        """Sample the VAE's posterior anew at each visit, as encoding at each visit would."""
        if "pixel_values" in batch:
            with torch.no_grad():
                mean, std = self.data.encode_images(batch["pixel_values"])
        else:
            mean, std = batch["mean"].to(self.device), batch["std"].to(self.device)
        draws = [
            torch.randn(mean.shape[1:], generator=generator(seed, "posterior", position))
            for position in batch["positions"]
        ]
        return mean.float() + std.float() * torch.stack(draws).to(self.device)

    def _pictures(self, batch: Mapping[str, Any]) -> Conditioning:
        conditioning = self.step.family.picture_conditioning(
            self.step.pipe,
            batch["original_sizes"],
            batch["crop_top_lefts"],
            batch["target_sizes"],
            self.guidance_scale,
        )
        return {key: value.to(self.device) for key, value in conditioning.items()}

    def _encoded(self, prompts: Sequence[str]) -> Conditioning | None:
        if self.data.prompts is None:
            return None
        batch = self.data.prompts.batch(prompts)
        return {key: value.to(self.device) for key, value in batch.items()}

    def _teacher_rows(self, rows: Rows, teacher: Conditioning) -> Rows:
        """The same noisy latents with the class prompt; the frozen base's prediction as target."""
        count = rows.instances
        noisy, timesteps = rows.noisy_latents[:count], rows.timesteps[:count]
        pictures = {key: value[:count] for key, value in rows.pictures.items()}
        taught = {
            key: value.to(self.device).expand(count, *value.shape[1:])
            for key, value in teacher.items()
        }
        models = tuple(self.step.trained.values())
        denoiser = self.step.trained[self.step.family.denoiser]
        with frozen_base(*models), self.data.accelerator.autocast():
            target = self.step.family.predict(denoiser, noisy, timesteps, {**taught, **pictures})
        prompts = [self.class_prompt] * count
        weights = torch.full((count,), self.prior_weight, device=self.device)
        encoded = self._encoded(prompts)
        return Rows(noisy, timesteps, target, prompts, pictures, encoded, weights, count)
