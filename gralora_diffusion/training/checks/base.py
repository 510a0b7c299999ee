"""What can be wrong with the options once the base is known, and what the base decides of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from gralora_diffusion.base_models.meta_base import empty_base
from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.optimization.adapters import add_adapters
from gralora_diffusion.training.runtime.acceleration import DTYPES

from .options import size_problems


def resolve_defaults(
    config: TrainingConfig, family: ModelFamily, pipe: Any, precision: str
) -> TrainingConfig:
    """Return the options with a value for each that was left to the family and the base.

    Args:
        precision: what accelerate is set to: no, fp16 or bf16.

    Raises:
        ConfigError: sizes or a ``clip_skip`` that the base cannot take.
    """
    config = config.with_defaults(
        {
            **family.training_defaults,
            "resolution": family.native_resolution(pipe),
            "mixed_precision": precision,
        }
    )
    check_sizes(config, family.size_divisor(pipe))
    if family.skipped_layers is None:
        return replace(config, clip_skip=None)  # it has no use, which the user was told
    if problems := list(_clip_skip(config, family, pipe)):
        raise ConfigError(problems)
    return config


def _clip_skip(config: TrainingConfig, family: ModelFamily, pipe: Any) -> Iterator[str]:
    for name in family.usual_text_encoders or family.text_encoders:
        layers = getattr(pipe, name).config.num_hidden_layers
        most = layers - (family.skipped_layers or 0)
        if config.clip_skip is not None and config.clip_skip > most:
            yield (
                f"--clip_skip is {config.clip_skip}, but of the {layers} layers of this base's "
                f"{name} at most {most} can be skipped; 1 is usual"
            )


def check_sizes(config: TrainingConfig, divisor: int) -> None:
    """Check resolution and buckets again, once the base is known.

    Args:
        divisor: what the base needs heights and widths to be multiples of.

    Raises:
        ConfigError: with all sizes that are not.
    """
    if problems := list(size_problems(config, divisor)):
        raise ConfigError(problems)


def check_without_weights(config: TrainingConfig, family: ModelFamily, precision: str) -> None:
    """Find what a run would find wrong with its base, and with its adapter there.

    Args:
        precision: as for ``resolve_defaults``.

    Raises:
        ConfigError: the base, its sizes or the adapter's layers are not what can be trained.
    """
    pipe = empty_base(config, family, DTYPES[precision])
    with torch.device("meta"):
        add_adapters(pipe, family, resolve_defaults(config, family, pipe, precision))
