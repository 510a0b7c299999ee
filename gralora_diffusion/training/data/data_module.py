"""From the options to batches: finds images, encodes as much as possible ahead, serves batches."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from diffusers.training_utils import offload_models
from torch import Tensor
from torch.utils.data import DataLoader

from gralora_diffusion.adapters.injection import adapters_disabled
from gralora_diffusion.base_models.loading import existing_models
from gralora_diffusion.base_models.streaming import computing_on
from gralora_diffusion.families import Conditioning, ModelFamily
from gralora_diffusion.io.errors import DataError
from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.options.fields import ChangesSamples, options_with
from gralora_diffusion.training.config.data_file import DataSection, sound_sections
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.runtime.agreement import from_all, wait_for_all

from .cache import (
    ControlCache,
    LatentCache,
    PromptCache,
    prompt_fingerprint,
    vae_fingerprint,
)
from .class_images import existing_class_images
from .control_crops import ControlPlan
from .controls import ControlPlaces
from .dataset import TrainingSet, collate
from .example_table import ExampleTable
from .hf_dataset import find_dataset_examples
from .image_folder import MAX_NAMES, MIN_FOR_PROGRESS, Example, find_examples
from .masks import MaskPlaces
from .sampler import StreamBatchSampler
from .sets import SampledSet, by_set, crop_plan, crop_plans, sampled_sets
from .truncation import report_truncation, reported_truncation

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


def find_images(config: TrainingConfig) -> Sequence[Example]:
    """Find and check the images to train on, their captions and their masks, set by set.

    Raises:
        ConfigError: the data file has problems.
        DataError: there are problems with the images. The error lists all of them.
    """
    if config.data_config is None:
        examples = _find_images(config)
    else:
        examples = find_in_sets(config, sound_sections(config, "train"), _find_images)
    if config.masked_loss or config.inpaint_given_masks:
        _check_masked(examples, config)
    return ExampleTable(examples)


def find_in_sets(
    config: TrainingConfig,
    sections: Sequence[DataSection],
    find: Callable[[TrainingConfig], list[Example]],
) -> list[Example]:
    """Return the images of sets of a data file, set by set.

    Args:
        find: finds the images of a set by the options as they are for it.

    Raises:
        DataError: there are problems with the images. The error lists all of them.
    """
    examples, problems = [], []
    for section in sections:
        image_set = section.image_set
        try:
            found = find(image_set.options(config))
        except DataError as error:
            problems += section.located(error.problems)
        else:
            examples += [replace(example, image_set=image_set) for example in found]
    if problems:
        raise DataError("--data_config", problems)
    return examples


def _find_images(config: TrainingConfig) -> list[Example]:
    masks = None
    if config.masked_loss or config.inpaint_given_masks:
        folder = Path(config.mask_data_dir) if config.mask_data_dir else None
        masks = MaskPlaces(folder, config.mask_column, config.mask_from_alpha)
    if config.dataset_name:
        return find_dataset_examples(
            config.dataset_name,
            config.instance_prompt,
            config_name=config.dataset_config_name,
            image_column=config.image_column,
            caption_column=config.caption_column,
            control_columns=config.control_column or (),
            cache_dir=config.cache_dir,
            skip_bad_images=config.skip_bad_images,
            masks=masks,
        )
    return find_examples(
        str(config.instance_data_dir),
        config.instance_prompt,
        caption_column=config.caption_column,
        skip_bad_images=config.skip_bad_images,
        caption_per_line=config.caption_per_line,
        cache_dir=config.latent_cache_dir,
        remember=not config.dry_run,
        masks=masks,
        controls=ControlPlaces(
            tuple(Path(folder) for folder in config.control_data_dir or ()),
            tuple(config.control_column) if config.control_column else None,
        ),
    )


def _check_masked(examples: Sequence[Example], config: TrainingConfig) -> None:
    """Name the images without a mask.

    Raises:
        DataError: no image has one.
    """
    option = "--masked_loss" if config.masked_loss else "--inpaint_given_masks"
    without = [e.name for e in examples if e.mask is None]
    if len(without) == len(examples):
        problem = "no image has a mask"
        if any(own.mask_from_alpha for _, own, _ in by_set(config, examples)):
            problem += ", and all are opaque"
        problem += (
            ". Put masks beside the images (001.mask.png beside 001.png) or into --mask_data_dir, "
            f"or leave out {option}"
        )
        raise DataError(option, [problem])
    if without:
        rules = ["are trained as a whole"] if config.masked_loss else []
        rules += ["are filled at random masks"] if config.inpaint_given_masks else []
        logger.warning(
            "images without a mask, which %s (%d): %s",
            " and ".join(rules),
            len(without),
            first_few(without, MAX_NAMES),
        )


def find_class_images(config: TrainingConfig, images: Sequence[Example] = ()) -> Sequence[Example]:
    """Find and check the existing class images; there are none without prior preservation.

    Args:
        images: of the subject.

    Raises:
        DataError: there are problems with them, or one of them is an image of the subject. The
            error lists all of them.
    """
    if not existing_class_images(config):
        return []
    found = find_examples(
        str(config.class_data_dir),
        config.class_prompt,
        skip_bad_images=config.skip_bad_images,
        role="class",
        cache_dir=config.latent_cache_dir,
        remember=not config.dry_run,
    )
    names = {image.content_key: image.name for image in images}
    problems = [
        f"{image.name} is the same image as {names[image.content_key]}, which is trained on as the "
        "subject. Class images should show other members of the class: remove one of them"
        for image in found
        if image.content_key in names
    ]
    if problems:
        raise DataError(f"--class_data_dir {config.class_data_dir!r}", problems)
    return ExampleTable(found)


def encode_images(family: ModelFamily, vae: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the scaled latents, computed on the VAE's device."""
    weight = next(vae.parameters())  # ``vae.device`` looks through the whole model
    return family.encode_images(vae, pixel_values.to(weight.device, weight.dtype))


def encode_controls(family: ModelFamily, vae: Any, pixel_values: Tensor) -> Tensor:
    """Return the latents of control images, computed on the VAE's device."""
    return family.encode_controls(vae, pixel_values.to(vae.device, vae.dtype))


class Batches:
    """The training data of this process. Encodings that do not change are computed once.

    VAE and text encoders are on the device only while they encode.

    Args:
        stream_encoders: have only the blocks of text encoders that compute on the device.
        encode_together: text encoders are in parts, so all processes must encode the same prompts.

    Attributes:
        prompts: encoded prompts, or None if text encoders are trained and encode at each step.
        teacher: conditioning of the class prompt, one row, if the frozen base is the teacher.
        digest: hash of everything that determines which samples a step gets.
    """

    def __init__(
        self,
        config: TrainingConfig,
        family: ModelFamily,
        pipe: Any,
        images: Sequence[Example],
        class_images: Sequence[Example],
        accelerator: Accelerator,
        *,
        stream_encoders: bool = False,
        encode_together: bool = False,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.family, self.vae = family, pipe.vae
        divisor = family.size_divisor(pipe)
        plan = crop_plan(config, divisor)
        self.cache = None
        controls, control_cache = None, None
        if any(image.controls for image in images):
            largest = config.control_resolution
            controls = ControlPlan(plan, family.control_preparation(pipe, largest), largest)
        if config.cache_latents:
            fingerprint = vae_fingerprint(pipe.vae)
            self.cache = LatentCache(plan, fingerprint, config.latent_cache_dir)
            if controls is not None:
                control_cache = ControlCache(controls, fingerprint, config.latent_cache_dir)
        shared: dict[str, Any] = {
            "batch_size": config.train_batch_size,
            "fill": _fill_of(config, family, pipe),
            "cache": self.cache,
            "cached_crops": config.cached_crops,
        }
        self.instance = TrainingSet(
            sampled_sets(config, images, divisor),
            config.seed,
            controls=controls,
            control_cache=control_cache,
            control_dropout=config.control_dropout,
            masked=config.masked_loss,
            **shared,
        )
        self.classes = None
        if class_images:
            classes = SampledSet(class_images, crop_plans(config, divisor))
            self.classes = TrainingSet([classes], config.seed, name="class", **shared)
        if accelerator.is_main_process:
            report_truncation(pipe, family, config, images, class_images)
        with offload_models(self.vae, device=accelerator.device):
            self._encode_images()
        self.prompts: PromptCache | None = None
        self.teacher: Conditioning | None = None
        encoders = existing_models(pipe, family.all_text_encoders)
        with computing_on(accelerator.device, encoders, streamed=stream_encoders):
            self._encode_prompts(pipe, encode_together)
        self.samples_per_step = (
            config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        )
        sets = [s.digest for s in (self.instance, self.classes) if s is not None]
        parts = [sets, self.samples_per_step, *facts_of_samples(config)]
        if config.data_config is not None:
            parts += [
                [*facts_of_samples(own), image_set.share, image_set.loss_weight]
                for image_set, own, _ in by_set(config, images)
            ]
        self.digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def __len__(self) -> int:
        """Return the samples in an epoch over all processes, with those that pad buckets."""
        return len(self.instance)

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`encode_images`."""
        return encode_images(self.family, self.vae, pixel_values)

    def encode_controls(self, pixel_values: Tensor) -> Tensor:
        """See :func:`encode_controls`."""
        return encode_controls(self.family, self.vae, pixel_values)

    def steps(self, first_step: int, max_steps: int) -> Iterator[tuple[Batch, Batch | None]]:
        """Yield the instance and class batch of each micro-batch; the latter may be None."""
        instance = self._loader(self.instance, first_step, max_steps)
        if self.classes is None:
            return zip(instance, repeat(None), strict=False)
        return zip(instance, self._loader(self.classes, first_step, max_steps), strict=True)

    def _loader(self, samples: TrainingSet, first_step: int, max_steps: int) -> DataLoader[Any]:
        sampler = StreamBatchSampler(
            start_step=first_step,
            max_steps=max_steps,
            batch_size=self.config.train_batch_size,
            gradient_accumulation_steps=self.config.gradient_accumulation_steps,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        return DataLoader(
            samples,
            batch_sampler=sampler,
            collate_fn=collate,
            # latents in memory need no workers, which would only copy them back and forth
            num_workers=0 if self._in_memory else self.config.dataloader_num_workers,
        )

    @property
    def _in_memory(self) -> bool:
        return self.cache is not None and self.cache.store.folder is None

    def _share(self, fill: Callable[[slice], int]) -> None:
        """Fill a cache. If a folder keeps it for all processes, each fills a part.

        Args:
            fill: encodes whatever is missing from a part.
        """
        processes = self.accelerator.num_processes
        if self.config.latent_cache_dir and processes > 1:
            fill(slice(self.accelerator.process_index, None, processes))
            wait_for_all(self.accelerator)
        fill(slice(None))  # which the other processes have filled by now

    def _encode_images(self) -> None:
        if self.cache is None:
            return
        bar = self.accelerator.is_local_main_process
        for samples in (self.instance, self.classes):
            if samples is not None:
                self._share(partial(samples.fill_cache, self.encode_images, progress=bar))
        if self.instance.control_cache is not None:
            fill = partial(self.instance.fill_control_cache, self.encode_controls, progress=bar)
            self._share(fill)

    def _encode_prompts(self, pipe: Any, encode_together: bool) -> None:
        config, encoders = self.config, existing_models(pipe, self.family.all_text_encoders)

        def encode(prompts: list[str]) -> Conditioning:
            with reported_truncation(pipe):
                return self.family.encode_prompts(pipe, prompts, **config.encoding)

        teaches = config.with_prior_preservation and config.prior_source == "teacher"
        if teaches:
            alone = PromptCache()
            with adapters_disabled(*existing_models(pipe, self.family.text_encoders)):
                alone.fill([str(config.class_prompt)], encode)
            self.teacher = alone.batch([str(config.class_prompt)])
        if config.train_text_encoder:
            return
        prompts = list(self.instance.prompts)
        if config.with_prior_preservation:
            prompts.append(str(config.class_prompt))
        if self.classes is not None:
            prompts += self.classes.prompts
        prompts = list(dict.fromkeys(prompts))
        folder = config.latent_cache_dir
        cache = PromptCache(prompt_fingerprint(encode, encoders) if folder else "", folder)
        bar = self.accelerator.is_local_main_process and len(prompts) >= MIN_FOR_PROGRESS
        if encode_together:
            cache.fill(prompts, encode, progress=bar, agree=self._missing_anywhere)
        else:
            self._share(lambda part: cache.fill(prompts[part], encode, progress=bar))
        self.prompts = cache

    def _missing_anywhere(self, missing: list[str]) -> list[str]:
        """Return the prompts that any process misses, in one order."""
        lists = from_all(self.accelerator, missing)
        return list(dict.fromkeys(prompt for each in lists for prompt in each))


def _fill_of(
    config: TrainingConfig, family: ModelFamily, pipe: Any
) -> Literal["random", "given"] | None:
    if not family.fills(pipe):
        return None
    return "given" if config.inpaint_given_masks else "random"


def facts_of_samples(config: TrainingConfig) -> list[Any]:
    """Return the options that determine the samples, in an order that never changes.

    Checkpoints contain a hash of them. The options of version 0.1 come first, then each later one
    whose value is not the default.
    """
    first = [
        "seed",
        "resolution",
        "center_crop",
        "random_flip",
        "image_interpolation_mode",
        "cache_latents",
        "cached_crops",
        "caption_dropout",
    ]
    facts: list[Any] = [getattr(config, name) for name in first]
    facts += [config.clip_skip] if config.clip_skip else []
    defaults = {f.name: f.default for f in fields(config)}
    later = sorted(options_with(type(config), ChangesSamples).keys() - {*first, "clip_skip"})
    return facts + [
        [name, getattr(config, name)] for name in later if getattr(config, name) != defaults[name]
    ]
