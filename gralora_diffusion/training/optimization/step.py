"""The arithmetic of a training step: from samples to a batch, from a batch to losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gralora_diffusion.adapters.injection import adapters_disabled
from gralora_diffusion.families import Conditioning, ModelFamily, control_key
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.cache import PromptCache
from gralora_diffusion.training.data.masks import latent_mask
from gralora_diffusion.training.data.seeds import generator, seed_from
from gralora_diffusion.training.data.truncation import reported_truncation
from gralora_diffusion.training.runtime.acceleration import without_fp16_autocast

from .masked_loss import MaskedLoss
from .objectives import Objective
from .tokens import DeviceTokenizers, to_device


class TrainingDiverged(RuntimeError):
    """The loss or its gradient became NaN or infinite, after the last checkpoint was written.

    The arguments are a description and advice.
    """

    def __str__(self) -> str:
        return " ".join(self.args)


@dataclass(kw_only=True)
class DenoisingBatch:
    """A batch of one shape as the denoiser sees it. Prior rows follow the instance rows."""

    noisy_latents: Tensor  # (rows, C, h, w)
    timesteps: Tensor  # (rows,)
    target: Tensor  # as noisy_latents
    prompts: list[str]
    images: Conditioning  # the part that depends on the images but not on the prompt
    encoded: Conditioning | None  # None: encode the prompts in the step, with gradients
    weights: Tensor  # (rows,)
    instances: int  # number of instance rows, which come first
    latent_weights: Tensor | None = None  # (rows, 1, h, w); None: all count alike

    def __add__(self, other: DenoisingBatch) -> DenoisingBatch:
        """Append prior rows of the same shape."""
        encoded = None
        if self.encoded is not None and other.encoded is not None:
            encoded = _joined(self.encoded, other.encoded)
        return DenoisingBatch(
            noisy_latents=torch.cat([self.noisy_latents, other.noisy_latents]),
            timesteps=torch.cat([self.timesteps, other.timesteps]),
            target=torch.cat([self.target, other.target]),
            prompts=self.prompts + other.prompts,
            images=_joined(self.images, other.images),
            encoded=encoded,
            weights=torch.cat([self.weights, other.weights]),
            instances=self.instances,
            latent_weights=self._joined_latent_weights(other),
        )

    def _joined_latent_weights(self, other: DenoisingBatch) -> Tensor | None:
        if self.latent_weights is None and other.latent_weights is None:
            return None
        parts = [
            torch.ones_like(part.target[:, :1])
            if part.latent_weights is None
            else part.latent_weights
            for part in (self, other)
        ]
        return torch.cat(parts)


def _joined(first: Conditioning, second: Conditioning) -> Conditioning:
    return {key: torch.cat([value, second[key]]) for key, value in first.items()}


def on_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return ``tensors`` on the device without waiting for its computations."""
    return {name: to_device(tensor, device) for name, tensor in tensors.items()}


def mean_loss(losses: Tensor, groups: Sequence[DenoisingBatch]) -> Tensor:
    """Return the loss of a step: the sum of the weighted losses of all rows, per instance row.

    ``losses``, (rows of all groups,), come from :class:`DenoisingStep`.
    """
    weights = torch.cat([rows.weights for rows in groups])
    return (losses * weights).sum() / sum(rows.instances for rows in groups)


class DenoisingStep(nn.Module):
    """All trained models as one module: ``forward(groups)`` returns the loss of each row.

    It is one module so that gradients of denoiser and text encoders are synchronized, clipped and
    autocast together. For the same reason, rows of several shapes, in a group for each shape, go
    through one ``forward``, although each group needs its own pass through the denoiser.
    """

    def __init__(
        self,
        pipe: Any,
        family: ModelFamily,
        objective: Objective,
        trained: Sequence[str],
        encoding: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.encoding = dict(encoding)
        self.trained = nn.ModuleDict({name: getattr(pipe, name) for name in trained})
        self.pipe, self.family, self.objective = pipe, family, objective
        self._tokenizers: DeviceTokenizers | None = None

    def forward(self, groups: Sequence[DenoisingBatch]) -> Tensor:
        return torch.cat([self._losses(rows) for rows in groups])

    def _losses(self, rows: DenoisingBatch) -> Tensor:
        encoded = rows.encoded
        if encoded is None:
            encoded = self.encode(rows.prompts, rows.noisy_latents.device)
        prediction = self.family.predict(
            self.trained[self.family.denoiser],
            rows.noisy_latents,
            rows.timesteps,
            {**encoded, **rows.images},
        )
        return self.objective.loss(prediction, rows.target, rows.timesteps, rows.latent_weights)

    def encode(self, prompts: list[str], device: torch.device) -> Conditioning:
        """Encode prompts with the text encoders as they are now, on the device."""
        if self._tokenizers is None:
            self._tokenizers = DeviceTokenizers(self.pipe, device)
        with (
            self._tokenizers.in_use(),
            device,  # where FLUX.1's pipeline then makes ids of the text, instead of copying them
            without_fp16_autocast(device),
            reported_truncation(self.pipe),
        ):
            return self.family.encode_prompts(self.pipe, prompts, **self.encoding)


class Encodings(Protocol):
    """Encodings that a batch is made of, besides its samples.

    Attributes:
        prompts: encoded prompts, or None if text encoders are trained and encode at each step.
        teacher: conditioning of the class prompt, one row, if the frozen base is the teacher.
    """

    accelerator: Accelerator
    prompts: PromptCache | None
    teacher: Conditioning | None

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the scaled latents, on the VAE's device."""

    def encode_controls(self, pixel_values: Tensor) -> Tensor:
        """Return the latents of control images, on the VAE's device."""


def by_control_shapes(batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Split collated samples into those whose control images agree in number and shapes."""
    groups: dict[tuple[torch.Size, ...], list[int]] = {}
    for row, controls in enumerate(batch["controls"]):
        groups.setdefault(tuple(control.shape for control in controls), []).append(row)
    if len(groups) == 1:
        return [batch]
    return [
        {
            name: values[rows] if isinstance(values, Tensor) else [values[row] for row in rows]
            for name, values in batch.items()
        }
        for rows in groups.values()
    ]


class BatchBuilder:
    """Turns collated samples into :class:`DenoisingBatch` objects on the device.

    Args:
        step: the unwrapped :class:`DenoisingStep`.
        dtype: of noisy latents, the denoiser's.
        objective: that makes noise, noisy latents and target; the step's by default.
    """

    def __init__(
        self,
        step: DenoisingStep,
        data: Encodings,
        config: TrainingConfig,
        device: torch.device,
        dtype: torch.dtype,
        objective: Objective | None = None,
    ) -> None:
        self.step, self.data, self.seed = step, data, config.seed
        self.objective = objective or step.objective
        self.device, self.dtype = device, dtype
        self.guidance_scale = config.guidance_scale
        self.prior_weight, self.class_prompt = config.prior_loss_weight, str(config.class_prompt)
        self.masked = MaskedLoss.of(config)

    def build(
        self, instance: Mapping[str, Any], classes: Mapping[str, Any] | None = None
    ) -> list[DenoisingBatch]:
        """Build the batch of these samples, including the prior's rows if there is a prior.

        If the class images have another shape, there are two batches. Samples whose control images
        differ in number or size are in different batches.
        """
        # a base that always gets control images gets zeros where there are none
        always = self.step.family.control_count(self.step.pipe).least > 0
        parts = [instance] if always else by_control_shapes(instance)
        groups = []
        for part in parts:
            rows = self._rows(part, self.seed, 1.0)
            if "mask" in part:
                self._mask(rows, part["mask"])
            groups.append(rows)
        if self.data.teacher is not None:
            teacher = self.data.teacher
            groups = [rows + self._teacher_rows(rows, teacher) for rows in groups]
        if classes is None:
            return groups
        prior = self._rows(classes, seed_from(self.seed, "class"), self.prior_weight)
        prior.instances = 0
        *others, rows = groups
        alike = prior.target.shape[1:] == rows.target.shape[1:]
        if alike and prior.images.keys() == rows.images.keys():
            return [*others, rows + prior]
        return [*groups, prior]

    def _rows(self, batch: Mapping[str, Any], seed: int, weight: float) -> DenoisingBatch:
        objective, positions = self.objective, batch["positions"]
        mean, std = self._posterior(batch)
        noise, timesteps = objective.draw(seed, positions, mean.shape[1:])
        # another sample of the VAE's posterior each time, as if the image were encoded each time
        draws = [
            torch.randn(mean.shape[1:], generator=generator(seed, "posterior", position))
            for position in positions
        ]
        drawn = {"mean": mean, "std": std, "sample": torch.stack(draws), "noise": noise}
        perturbed = objective.perturbed(noise, seed, positions)
        if perturbed is not noise:
            drawn["perturbed"] = perturbed
        there = on_device({**drawn, "timesteps": timesteps}, self.device)
        latents = there["mean"].float() + there["std"].float() * there["sample"]
        noise, timesteps = there["noise"], there["timesteps"]
        count = len(timesteps)
        weights = torch.full((count,), weight, device=self.device)
        if "loss_weight" in batch:
            weights *= on_device({"weights": batch["loss_weight"]}, self.device)["weights"]
        return DenoisingBatch(
            noisy_latents=objective.add_noise(latents, there.get("perturbed", noise), timesteps).to(
                self.dtype
            ),
            timesteps=timesteps,
            target=objective.target(latents, noise, timesteps),
            prompts=list(batch["prompts"]),
            images={
                **self._images(batch),
                **self._controls(batch, latents),
                **self._fill(batch, seed),
            },
            encoded=self._encoded(batch["prompts"]),
            weights=weights,
            instances=count,
        )

    def _posterior(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents, on the device that has them."""
        if "pixel_values" not in batch:
            return batch["mean"], batch["std"]
        pixels = on_device({"pixel_values": batch["pixel_values"]}, self.device)
        with torch.no_grad():
            return self.data.encode_images(pixels["pixel_values"])

    def _images(self, batch: Mapping[str, Any]) -> Conditioning:
        conditioning = self.step.family.image_conditioning(
            self.step.pipe,
            batch["original_sizes"],
            batch["crop_top_lefts"],
            batch["target_sizes"],
            self.guidance_scale,
        )
        return on_device(conditioning, self.device)

    def _controls(self, batch: Mapping[str, Any], latents: Tensor) -> Conditioning:
        """Return the control images' latents. Rows without some get the base's absent ones."""
        rows = batch["controls"]
        absent = self.step.family.absent_controls(self.step.pipe, latents)
        count = max([len(absent), *map(len, rows)])
        conditioning = {}
        for number in range(count):
            given = [row[number] for row in rows if row]
            found = iter(self._control_latents(torch.stack(given), batch)) if given else iter(())
            stacked = torch.stack(
                [next(found) if row else absent[number][i] for i, row in enumerate(rows)]
            )
            conditioning[control_key(number)] = stacked.to(self.dtype)
        return conditioning

    def _control_latents(self, controls: Tensor, batch: Mapping[str, Any]) -> Tensor:
        there = on_device({"controls": controls}, self.device)["controls"]
        if "pixel_values" not in batch:
            return there
        with torch.no_grad():
            return self.data.encode_controls(there)

    def _fill(self, batch: Mapping[str, Any], seed: int) -> Conditioning:
        """Return what a base that fills takes besides: the masks, and the rest of the images."""
        if "fill_mask" not in batch:
            return {}
        names = ("pixel_values", "fill_mask")
        there = on_device({name: batch[name] for name in names}, self.device)
        masks = there["fill_mask"]
        with torch.no_grad():
            mean, std = self.data.encode_images(there["pixel_values"] * (masks < 0.5))
        draws = [
            torch.randn(mean.shape[1:], generator=generator(seed, "masked image", position))
            for position in batch["positions"]
        ]
        sample = on_device({"sample": torch.stack(draws)}, self.device)["sample"]
        latents = mean.float() + std.float() * sample
        fill_masks = self.step.family.fill_masks(self.step.pipe, masks)
        return {"fill_mask": fill_masks.to(self.dtype), "masked_image": latents.to(self.dtype)}

    def _encoded(self, prompts: Sequence[str]) -> Conditioning | None:
        if self.data.prompts is None:
            return None
        return on_device(self.data.prompts.batch(prompts), self.device)

    def _mask(self, rows: DenoisingBatch, masks: Tensor) -> None:
        """Give instance rows the weights of their latents, and the target outside of the masks."""
        there = on_device({"mask": latent_mask(masks, rows.target.shape[-2:])}, self.device)["mask"]
        rows.latent_weights = self.masked.weights(there)
        if self.masked.towards_base:
            base = self._base_prediction(rows, rows.encoded)
            rows.target = self.masked.target(there, rows.target.float(), base.float())

    def _base_prediction(self, rows: DenoisingBatch, encoded: Conditioning | None) -> Tensor:
        """Return what the frozen base predicts for some rows.

        Args:
            encoded: the prompts; None to encode those of the rows with the frozen text encoders.
        """
        models = tuple(self.step.trained.values())
        denoiser = self.step.trained[self.step.family.denoiser]
        with adapters_disabled(*models), self.data.accelerator.autocast():
            if encoded is None:
                encoded = self.step.encode(rows.prompts, self.device)
            return self.step.family.predict(
                denoiser, rows.noisy_latents, rows.timesteps, {**encoded, **rows.images}
            )

    def _teacher_rows(self, rows: DenoisingBatch, teacher: Conditioning) -> DenoisingBatch:
        """Return rows of the same noisy latents with the class prompt and the teacher's target."""
        count = rows.instances
        taught = {
            key: value.expand(count, *value.shape[1:])
            for key, value in on_device(teacher, self.device).items()
        }
        prompts = [self.class_prompt] * count
        return replace(
            rows,
            target=self._base_prediction(rows, taught),
            prompts=prompts,
            encoded=self._encoded(prompts),
            weights=torch.full((count,), self.prior_weight, device=self.device),
            latent_weights=None,
        )
