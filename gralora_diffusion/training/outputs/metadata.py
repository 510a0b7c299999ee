"""Metadata of an adapter file about itself and its training: ``modelspec.*`` and ``ss_*``.

The ``ss_*`` fields are those of kohya's sd-scripts (``train_network.py``). All are strings, and
those that are not set are left out. Folders and files are given by name only.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.file_names import CONTROL_RESOLUTION, public_name, real_path
from gralora_diffusion.io.tensor_files import HASH_FIELDS
from gralora_diffusion.training.config.data_options import MaskOptions
from gralora_diffusion.training.config.layer_patterns import given_patterns
from gralora_diffusion.training.config.options import LossOptions
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.captions import one_line
from gralora_diffusion.training.data.data_module import Batches
from gralora_diffusion.training.data.dataset import TrainingSet
from gralora_diffusion.training.data.image_folder import Example
from gralora_diffusion.training.data.sets import by_set
from gralora_diffusion.training.optimization.masked_loss import MaskedLoss
from gralora_diffusion.training.optimization.objectives import pseudo_huber

#: The fact on an edit training in the model card.
CONTROL_IMAGES = "control images per sample"
#: The fact on a training of a base that fills: which masks.
FILLS = "masks to fill"
#: ``prediction_type`` of schedulers -> ModelSpec's.
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


def training_metadata(
    config: TrainingConfig,
    family: ModelFamily,
    pipe: Any,
    data: Batches,
    max_steps: int,
    step: int,
) -> dict[str, str]:
    """Return the metadata of a run at a step, which do not depend on the time.

    Args:
        config: with the family's defaults.
        max_steps: optimizer steps of the run.
        step: optimizer steps done.
    """
    names = family.published_names(getattr(pipe, family.denoiser).config, pipe.scheduler.config)
    instance, classes = data.instance, data.classes
    vae = config.pretrained_vae_model_name_or_path
    title = real_path(config.output_dir).name
    steps_per_epoch = -(-len(data) // data.samples_per_step)
    fields: dict[str, Any] = {
        **names.fields,
        # not "/lora", for which readers expect a LoRA's tensors
        "modelspec.architecture": f"{names.architecture}/gralora",
        "modelspec.implementation": "gralora-diffusion",
        "modelspec.title": title,
        "modelspec.trigger_phrase": trigger_phrase(config, instance.examples),
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
        "ss_output_name": title,
        "ss_sd_model_name": public_name(config.pretrained_model_name_or_path),
        "ss_vae_name": public_name(vae) if vae else None,
        **_network_fields(config),
        **_data_fields(config, family, instance, classes),
        "ss_num_batches_per_epoch": -(-len(data) // config.train_batch_size),
        "ss_num_epochs": -(-max_steps // steps_per_epoch),
        "ss_max_train_steps": max_steps,
        "ss_steps": step,
        "ss_epoch": -(-step // steps_per_epoch),
        "ss_batch_size_per_device": config.train_batch_size,
        "ss_total_batch_size": data.samples_per_step,
        "ss_gradient_accumulation_steps": config.gradient_accumulation_steps,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_mixed_precision": config.mixed_precision,
        "ss_seed": config.seed,
        "ss_optimizer": config.optimizer,
        "ss_learning_rate": config.learning_rate,
        "ss_unet_lr": config.learning_rate,
        "ss_text_encoder_lr": config.text_encoder_lr if config.train_text_encoder else None,
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_lr_warmup_steps": config.lr_warmup_steps,
        "ss_max_grad_norm": config.max_grad_norm,
        "modelspec.timestep_range": _timestep_range(config, pipe),
        **_loss_fields(config, family),
        **(_mask_fields(config) if instance.masked else {}),
        "gralora_fill_masks": instance.fill,
        "gralora_control_images": control_facts(instance.examples).get(CONTROL_IMAGES),
        "gralora_control_dropout": config.control_dropout or None,
        CONTROL_RESOLUTION: config.control_resolution,
        "ss_prior_loss_weight": config.prior_loss_weight if classes else None,
    }
    if family.objective == "ddpm":
        coarser = {
            "ss_multires_noise_iterations": config.multires_noise_iterations,
            "ss_multires_noise_discount": config.multires_noise_discount,
        }
        predicted = config.prediction_type or pipe.scheduler.config.get("prediction_type")
        fields |= {
            "modelspec.prediction_type": _PREDICTIONS.get(predicted),
            "ss_noise_offset": config.noise_offset or None,
            # sd-scripts has no soft minimum, and its readers would take it for the hard one
            "gralora_soft_min_snr" if config.soft_min_snr else "ss_min_snr_gamma": config.snr_gamma,
            "ss_debiased_estimation": config.debiased_estimation_loss or None,
            "ss_ip_noise_gamma": config.input_perturbation or None,
            **(coarser if config.multires_noise_iterations else {}),
        }
    else:
        fields |= {
            "ss_weighting_scheme": config.weighting_scheme,
            "ss_guidance_scale": config.guidance_scale,
        }
    known = {key: str(value) for key, value in fields.items() if value is not None}
    return known | HASH_FIELDS


def trigger_phrase(config: TrainingConfig, images: Sequence[Example]) -> str | None:
    """Return the texts that a run teaches, each once: trigger words, or else prompts."""
    found = [own.trigger_word or own.instance_prompt for _, own, _ in by_set(config, images)]
    return ", ".join(dict.fromkeys(filter(None, map(one_line, found)))) or None


def _timestep_range(options: LossOptions, pipe: Any) -> str | None:
    """Return the first and the last timestep of a run that leaves some out, as ModelSpec has it."""
    if options.min_timestep is None and options.max_timestep is None:
        return None
    end = options.max_timestep or pipe.scheduler.config.num_train_timesteps
    return f"{options.min_timestep or 0},{end - 1}"


def _loss_fields(options: LossOptions, family: ModelFamily) -> dict[str, Any]:
    """Return the fields of sd-scripts for a loss other than the squared error."""
    loss = pseudo_huber(options, family)
    if loss is None:
        return {}
    return {
        "ss_loss_type": loss.kind,
        "ss_huber_schedule": loss.schedule,
        "ss_huber_c": loss.c,
    }


def _mask_fields(options: MaskOptions) -> dict[str, Any]:
    return {
        "ss_masked_loss": True,
        "gralora_mask_outside": options.mask_outside,
        "gralora_mask_outside_weight": MaskedLoss.of(options).outside,
        "gralora_normalize_masked_area_loss": options.normalize_masked_area_loss,
    }


def control_facts(images: Iterable[Example]) -> dict[str, str]:
    """Return how many control images the samples of a run have; nothing if none has any."""
    counts = sorted({len(image.controls) for image in images})
    if not any(counts):
        return {}
    return {CONTROL_IMAGES: " or ".join(map(str, counts))}


def time_metadata(began: float) -> dict[str, str]:
    """Return the times when a run began (seconds since 1970) and ended, which is now."""
    ends = time.time()
    date = datetime.fromtimestamp(int(ends), UTC)
    return {
        "modelspec.date": date.isoformat().replace("+00:00", "Z"),
        "ss_training_started_at": str(began),
        "ss_training_finished_at": str(ends),
    }


def _network_fields(config: TrainingConfig) -> dict[str, Any]:
    arguments = {
        "algo": "gralora",
        "gralora_k": config.gralora_k,
        "hybrid_rank": config.hybrid_rank,
        "target_preset": config.target_preset if config.lora_layers is None else None,
        "lora_layers": config.lora_layers,
        "exclude_modules": config.exclude_modules,
        "loraplus_lr_ratio": config.loraplus_lr_ratio,
        **{key: given or None for key, given in given_patterns(config).items()},
    }
    texts = {k: v if isinstance(v, dict) else str(v) for k, v in arguments.items() if v is not None}
    one_rank = not config.rank_pattern
    return {
        "ss_network_module": "gralora_diffusion",
        "ss_network_dim": config.rank if one_rank else "Dynamic",
        "ss_network_alpha": config.alpha if one_rank and not config.alpha_pattern else "Dynamic",
        "ss_network_args": json.dumps(texts, ensure_ascii=False),
        "ss_network_dropout": config.lora_dropout or None,
    }


def _data_fields(
    config: TrainingConfig,
    family: ModelFamily,
    instance: TrainingSet,
    classes: TrainingSet | None,
) -> dict[str, Any]:
    sets = list(by_set(config, instance.examples))
    names = {id(image_set): image_set.name(config) for image_set, _, _ in sets}
    folders: dict[str, list[Example]] = {}
    for example in instance.examples:
        folder = example.concept or names[id(example.image_set)]
        folders.setdefault(folder, []).append(example)
    repeats = {id(image_set): own.repeats for image_set, own, _ in sets}
    directories = {
        name: {
            "n_repeats": repeats[id(examples[0].image_set)] * examples[0].repeats,
            "img_count": len(examples),
        }
        for name, examples in folders.items()
    }
    tags = {
        name: tag_frequency(caption for example in examples for caption in example.captions)
        for name, examples in folders.items()
    }
    fields: dict[str, Any] = {
        "ss_num_train_images": sum(e.repeats * repeats[id(e.image_set)] for e in instance.examples),
        "ss_num_reg_images": len(classes.examples) if classes else 0,
        "ss_resolution": (config.resolution, config.resolution),
        "ss_enable_bucket": instance.shapes,
        "ss_random_crop": not config.center_crop,
        "ss_flip_aug": config.random_flip,
        "ss_cache_latents": config.cache_latents,
        "ss_caption_dropout_rate": config.caption_dropout,
        # the layer that is read, where the last is 1
        "ss_clip_skip": config.clip_skip and config.clip_skip + (family.skipped_layers or 0) + 1,
        "ss_dataset_dirs": _text(directories),
        "ss_tag_frequency": _text(tags),
    }
    if instance.shapes:
        counts = Counter(instance.targets)
        buckets = {
            str(number): {"resolution": [width, height], "count": count}
            for number, ((height, width), count) in enumerate(sorted(counts.items()))
        }
        fields["ss_bucket_info"] = _text({"buckets": buckets})
    if classes and config.class_data_dir:
        count = {"n_repeats": 1, "img_count": len(classes.examples)}
        fields["ss_reg_dataset_dirs"] = _text({public_name(config.class_data_dir): count})
    return fields


def tag_frequency(captions: Iterable[str]) -> dict[str, int]:
    """Count comma-separated tags in lower case, as sd-scripts does."""
    tags = (tag.strip().lower() for caption in captions for tag in caption.split(","))
    return dict(Counter(tag for tag in tags if tag))


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
