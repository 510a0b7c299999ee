"""A run's encoding and its step on fake tensors, to count what they make.

Nothing here knows a model or a family: the trainer's own parts run, under the run's own precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from gralora_diffusion.families import Conditioning, ModelFamily
from gralora_diffusion.training.config.options import LossOptions
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.cache import PromptCache
from gralora_diffusion.training.data.data_module import crop_plan, encode_images
from gralora_diffusion.training.data.image_folder import Example
from gralora_diffusion.training.optimization.objectives import Objective, make_objective
from gralora_diffusion.training.optimization.step import BatchBuilder, DenoisingStep, mean_loss
from gralora_diffusion.training.runtime.acceleration import DTYPES
from gralora_diffusion.training.runtime.memory import MemoryMeter, bytes_of, tensors_of

#: Stands for every prompt: encoded, all have one shape. Pipelines look at what of a long one they
#: cut off, which cannot be done without values.
_PROMPT = "a"


class FakeData:
    """The data of a run as far as a step sees it, of the right shapes and without content.

    An ``Encodings`` of the rows that a step is made of.
    """

    def __init__(
        self,
        config: TrainingConfig,
        family: ModelFamily,
        pipe: Any,
        images: Sequence[Example],
        accelerator: Accelerator,
    ) -> None:
        self.config, self.family, self.vae, self.accelerator = config, family, pipe.vae, accelerator
        self.prompts = None if config.train_text_encoder else PromptCache()
        self.teacher: Conditioning | None = None
        self.cached = 0  # bytes
        plan = crop_plan(config, family.size_divisor(pipe))
        #: height and width of the largest picture
        self.image_size = max((plan.target_size(p.size) for p in images), key=math.prod)
        crops = [
            len(plan.kept(p.size, p.content_key, config.cached_crops, config.seed)) for p in images
        ]
        #: how many crops there are, and how many of a picture the latent cache encodes together
        self.crops, self.crops_at_once = sum(crops), min(4, max(crops))
        captions = {image.caption for image in images}
        captions |= {""} if config.caption_dropout else set()
        captions |= {str(config.class_prompt)} if config.with_prior_preservation else set()
        self.captions = len(captions)

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """As ``Batches`` does it."""
        return encode_images(self.family, self.vae, pixel_values)

    def encode(self, pipe: Any) -> dict[str, int]:
        """Encode as a run does before its first step.

        Returns what it makes at most, in bytes, of encoding "pictures" and "prompts", if it does.
        """
        config, made = self.config, {}
        if config.cache_latents:
            with torch.no_grad(), _meter(pipe, self.accelerator.device) as meter:
                latents = self.encode_images(self._pixels(self.crops_at_once))
            self.latents = [part[:1].cpu() for part in latents]
            made["pictures"] = meter.peak
            if not config.latent_cache_dir:
                self.cached += self.crops * bytes_of(self.latents)
        teaches = config.with_prior_preservation and config.prior_source == "teacher"
        if self.prompts is None and not teaches:
            return made
        at_once = 1 if self.prompts is None else min(16, self.captions)
        with torch.no_grad(), _meter(pipe, self.accelerator.device) as meter:
            encoded = self.family.encode_prompts(pipe, [_PROMPT] * at_once, **config.encoding)
        made["prompts"] = meter.peak
        row = {key: value[:1].cpu() for key, value in encoded.items()}
        if self.prompts is not None:
            self.prompts.fill([_PROMPT], lambda _: row)
            if not config.latent_cache_dir:
                self.cached += self.captions * bytes_of(row.values())
        if teaches:
            self.teacher = row
        return made

    def batch(self) -> dict[str, Any]:
        """As ``samples.collate`` makes it."""
        count = self.config.train_batch_size
        batch: dict[str, Any] = {
            "positions": list(range(count)),
            "prompts": [_PROMPT] * count,
            "content_keys": [""] * count,
            "original_sizes": torch.tensor([self.image_size] * count),
            "crop_top_lefts": torch.zeros(count, 2, dtype=torch.long),
            "target_sizes": torch.tensor([self.image_size] * count),
        }
        if not self.config.cache_latents:
            return {**batch, "pixel_values": self._pixels(count)}
        mean, std = (part.expand(count, *part.shape[1:]) for part in self.latents)
        return {**batch, "mean": mean, "std": std}

    def _pixels(self, count: int) -> Tensor:
        return torch.empty(count, 3, *self.image_size)


class FakeObjective(Objective):
    """The objective of the run; of the noise and timesteps that it draws, only the shapes count.

    It looks values up in its tables, so make it before the tensors are fake. For the same reason it
    draws real numbers.
    """

    def __init__(self, options: LossOptions, family: ModelFamily, pipe: Any) -> None:
        self.real = make_objective(options, family, pipe)

    def draw(self, seed: int, positions: Sequence[int], shape: torch.Size) -> tuple[Tensor, Tensor]:
        with unset_fake_temporarily():
            noise, timesteps = self.real.draw(seed, positions, shape)
        return (
            torch.empty(noise.shape, dtype=noise.dtype),
            torch.empty(timesteps.shape, dtype=timesteps.dtype),
        )

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.real.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.real.target(latents, noise, timesteps)

    def weights(self, timesteps: Tensor) -> Tensor:
        return self.real.weights(timesteps)


def measure_step(
    config: TrainingConfig,
    family: ModelFamily,
    pipe: Any,
    trained: Sequence[str],
    data: FakeData,
    objective: Objective,
) -> tuple[int, int]:
    """Bytes of activations at the peak of a step, and of gradients that are there by then."""
    accelerator = data.accelerator
    step = DenoisingStep(pipe, family, objective, trained, config.encoding)
    step.train()
    dtype = DTYPES[accelerator.mixed_precision]
    fake_config = replace(config, class_prompt=_PROMPT)
    builder = BatchBuilder(step, data, fake_config, accelerator.device, dtype)
    with_classes = config.with_prior_preservation and config.prior_source == "images"
    meter = _meter(pipe, accelerator.device)
    for parameter in step.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(meter.note)
    # from the second pass on, the gradients of the first are there
    for _ in range(min(2, config.gradient_accumulation_steps)):
        with meter:
            batches = builder.build(data.batch(), data.batch() if with_classes else None)
            with accelerator.autocast():
                losses = step(batches)
            loss = mean_loss(losses, batches)
            loss.backward()
            del batches, losses, loss
    return meter.peak - meter.noted_at_peak, meter.noted_at_peak


def _meter(pipe: Any, device: torch.device) -> MemoryMeter:
    models = [model for model in pipe.components.values() if isinstance(model, nn.Module)]
    return MemoryMeter(device, (t for model in models for t in tensors_of(model)))
