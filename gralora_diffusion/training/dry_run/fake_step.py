"""A run's encoding and its step on fake tensors, to measure their memory.

The trainer's own code runs in the run's precision, so this works for all models and families.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from gralora_diffusion.families import Conditioning, ControlPreparation, ModelFamily
from gralora_diffusion.pipelines.placement import bytes_of, tensors_of
from gralora_diffusion.training.config.options import LossOptions
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.cache import PromptCache
from gralora_diffusion.training.data.control_crops import ControlPlan
from gralora_diffusion.training.data.data_module import encode_controls, encode_images
from gralora_diffusion.training.data.image_folder import Example
from gralora_diffusion.training.data.sets import SampledSet, largest_size
from gralora_diffusion.training.data.transforms import CropPlan
from gralora_diffusion.training.optimization.objectives import Objective, make_objective
from gralora_diffusion.training.optimization.step import BatchBuilder, DenoisingStep, mean_loss
from gralora_diffusion.training.runtime.acceleration import DTYPES
from gralora_diffusion.training.runtime.memory import MemoryMeter

#: Represents every prompt, since all encodings have one shape. It is short, because pipelines read
#: the values of the tokens that they cut off from a long one.
_PROMPT = "a"


class FakeData:
    """The data of a run as a step sees them, with the right shapes but without content.

    It implements ``Encodings``.
    """

    def __init__(
        self,
        config: TrainingConfig,
        family: ModelFamily,
        pipe: Any,
        sets: Sequence[SampledSet],
        accelerator: Accelerator,
    ) -> None:
        self.config, self.family, self.vae, self.accelerator = config, family, pipe.vae, accelerator
        self.prompts = None if config.train_text_encoder else PromptCache()
        self.teacher: Conditioning | None = None
        self.cached = 0  # bytes
        views = [(image, plan) for part in sets for plan in part.plans for image in part.examples]
        self.masked = config.masked_loss and any(image.mask for image, _ in views)
        self.fills = family.fills(pipe)
        #: height and width of the largest image
        self.image_size = largest_size(sets)
        kept = [
            len(plan.kept(p.size, p.content_key, config.cached_crops, config.seed))
            for p, plan in views
        ]
        self.crops = sum(kept)
        self.controls = _largest_controls(
            family.control_preparation(pipe, config.control_resolution), views
        )
        #: number of control images to encode, if all were different
        self.control_crops = sum(
            len(image.controls) * crops for (image, _), crops in zip(views, kept, strict=True)
        )
        captions = {
            prompt
            for part in sets
            for image in part.examples
            for caption in image.captions
            for prompt in part.caption_rules.variants(caption, 0)
        }
        captions |= {""} if any(part.caption_dropout for part in sets) else set()
        captions |= {str(config.class_prompt)} if config.with_prior_preservation else set()
        self.captions = len(captions)

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode as ``Batches`` does."""
        return encode_images(self.family, self.vae, pixel_values)

    def encode_controls(self, pixel_values: Tensor) -> Tensor:
        """Encode as ``Batches`` does."""
        return encode_controls(self.family, self.vae, pixel_values)

    def encode(self, pipe: Any) -> dict[str, int]:
        """Encode as a run does before its first step.

        Returns the peak bytes of encoding "pictures" and of encoding "prompts", if they happen.
        """
        config, made = self.config, {}
        if config.cache_latents:
            with torch.no_grad(), _meter(pipe, self.accelerator.device) as meter:
                latents = self.encode_images(self._pixels(1))  # as the latent cache does
                self.latents = [part[:1].cpu() for part in latents]
                del latents
                self.control_latents = [
                    self.encode_controls(pixels)[0].cpu() for pixels in self._control_pixels(1)
                ]
            made["pictures"] = meter.peak
            if not config.latent_cache_dir:
                masks = [self.latents[0][:, :1]] if self.masked else []
                self.cached += self.crops * bytes_of([*self.latents, *masks])
                self.cached += self.control_crops * max(
                    (c.nbytes for c in self.control_latents), default=0
                )
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

    def batch(self, with_masks: bool = True) -> dict[str, Any]:
        """Return a batch like one of ``dataset.collate``.

        Args:
            with_masks: as instance images have them, if any has; class images have none.
        """
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
            batch["pixel_values"] = self._pixels(count)
            controls = [part[0] for part in self._control_pixels(count)]
        else:
            mean, std = (part.expand(count, *part.shape[1:]) for part in self.latents)
            batch |= {"mean": mean, "std": std}
            controls = self.control_latents
        batch["controls"] = [controls] * count
        if self.masked and with_masks:
            height, width = self.image_size
            batch["mask"] = torch.empty(count, 1, height, width)
        if self.fills:
            batch["fill_mask"] = self._pixels(count)[:, :1]
        return batch

    def _pixels(self, count: int) -> Tensor:
        return torch.empty(count, 3, *self.image_size)

    def _control_pixels(self, count: int) -> list[Tensor]:
        return [torch.empty(count, *shape) for shape in self.controls]


def _largest_controls(
    preparation: ControlPreparation | None, views: Sequence[tuple[Example, CropPlan]]
) -> list[torch.Size]:
    """Return the shapes (3, height, width) of the most pixels of control images in a sample.

    Args:
        views: images, and how each of them is cropped.
    """

    def shapes(image: Example, plan: CropPlan) -> list[torch.Size]:
        variant = plan.kept(image.size, image.content_key, 1, 0)[0]
        controls = ControlPlan(plan, preparation)
        return [
            controls.pixel_values(Image.new("RGB", c.size), image.size, variant).shape
            for c in image.controls
        ]

    # one for each combination of sizes, since blank images are really prepared
    by_size = {
        (image.size, plan.target_size(image.size), *(c.size for c in image.controls)): (image, plan)
        for image, plan in views
    }
    found = (shapes(image, plan) for image, plan in by_size.values())
    return max(found, key=lambda s: sum(map(math.prod, s)))


class FakeObjective(Objective):
    """The objective of the run, whose noise and timesteps have only shapes.

    Create it outside fake mode, because its tables need values. It samples real numbers for the
    same reason.
    """

    def __init__(self, options: LossOptions, family: ModelFamily, pipe: Any) -> None:
        self.real = make_objective(options, family, pipe)
        self.scheduler, self.pseudo_huber = self.real.scheduler, self.real.pseudo_huber

    def draw(self, seed: int, positions: Sequence[int], shape: torch.Size) -> tuple[Tensor, Tensor]:
        with unset_fake_temporarily():
            noise, timesteps = self.real.draw(seed, positions, shape)
        return (
            torch.empty(noise.shape, dtype=noise.dtype),
            torch.empty(timesteps.shape, dtype=timesteps.dtype),
        )

    def levels(self, shape: Sequence[int]) -> Tensor:
        return self.real.levels(shape)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.real.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.real.target(latents, noise, timesteps)

    def snr(self, timesteps: Tensor) -> Tensor | None:
        return self.real.snr(timesteps)

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
    """Return the bytes of activations and of gradients at the peak of a step."""
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
    # from the second pass on, there are gradients of the first
    for _ in range(min(2, config.gradient_accumulation_steps)):
        with meter:
            classes = data.batch(with_masks=False) if with_classes else None
            batches = builder.build(data.batch(), classes)
            with accelerator.autocast():
                losses = step(batches)
            loss = mean_loss(losses, batches)
            loss.backward()
            del batches, losses, loss
    return meter.peak - meter.noted_at_peak, meter.noted_at_peak


def _meter(pipe: Any, device: torch.device) -> MemoryMeter:
    models = [model for model in pipe.components.values() if isinstance(model, nn.Module)]
    return MemoryMeter(device, (t for model in models for t in tensors_of(model)))
