"""Checks that need the base, and defaults that depend on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gralora_diffusion.base_models.meta_base import empty_base
from gralora_diffusion.families import ModelFamily, too_much_clip_skip
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.optimization.adapters import add_adapters
from gralora_diffusion.training.runtime.acceleration import DTYPES

from .data_file import data_file_problems
from .options import size_problems


def resolve_defaults(
    config: TrainingConfig, family: ModelFamily, pipe: Any, precision: str
) -> TrainingConfig:
    """Return the options with a value for each that was left to the family or the base.

    Args:
        precision: accelerate's mixed precision: no, fp16 or bf16.

    Raises:
        ConfigError: the base does not support the sizes, ``clip_skip`` or given masks.
    """
    config = config.with_defaults(
        {
            **family.training_defaults,
            "resolution": max(config.resolutions or [family.native_resolution(pipe)]),
            "mixed_precision": precision,
        }
    )
    check_sizes(config, family.size_divisor(pipe))
    if family.fills(pipe):
        config = replace(config, cache_latents=False)  # each sample has a masked image of its own
    elif config.inpaint_given_masks:
        raise ConfigError(
            [
                "--inpaint_given_masks needs a base for inpainting, such as "
                "stable-diffusion-v1-5/stable-diffusion-inpainting. To learn only a part of each "
                "image, give --masked_loss"
            ]
        )
    if family.skipped_layers is None:
        return replace(config, clip_skip=None)  # without effect, as a warning has said
    if problem := too_much_clip_skip(pipe, family, config.clip_skip):
        raise ConfigError([problem])
    return config


def check_sizes(config: TrainingConfig, divisor: int) -> None:
    """Check resolution and buckets again, now that the base is known.

    Args:
        divisor: the base needs heights and widths that are multiples of it.

    Raises:
        ConfigError: some sizes are not; all of them are named.
    """
    problems = list(size_problems(config, divisor))
    problems += data_file_problems(config, lambda own: list(size_problems(own, divisor)))
    if problems:
        raise ConfigError(problems)


def check_without_weights(config: TrainingConfig, family: ModelFamily, precision: str) -> None:
    """Find the problems that a run would find with its base and its adapter, without weights.

    Args:
        precision: as for ``resolve_defaults``.

    Raises:
        ConfigError: the base, its sizes or the adapter's layers cannot be trained.
    """
    pipe = empty_base(config, family, DTYPES[precision])
    with torch.device("meta"):
        add_adapters(pipe, family, resolve_defaults(config, family, pipe, precision))
