"""Checks that need the base's family, made before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import diffusers

from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.options.fields import OnlyFor, options_with
from gralora_diffusion.pipelines.generation import takes_negative_prompt
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.optimization.adapters import trained_components
from gralora_diffusion.training.optimization.objectives import pseudo_huber


def check_family_options(config: TrainingConfig, family: ModelFamily) -> list[str]:
    """Check the options that depend on the family.

    Returns:
        Warnings about options that have no effect on this family.

    Raises:
        ConfigError: an option does not fit. The error lists every problem with the flag and the
            family's choices.
    """
    problems = [
        *_left_out(config, family),
        *_text_encoders(config, family),
        *_presets(config, family),
        *_sequence(config, family),
        *_pseudo_huber(config, family),
    ]
    if problems:
        raise ConfigError(problems)
    return list(_without_effect(config, family))


def _left_out(config: TrainingConfig, family: ModelFamily) -> Iterator[str]:
    allowed = family.optional_text_encoders
    if wrong := [name for name in config.leave_out_text_encoders or () if name not in allowed]:
        yield (
            f"--leave_out_text_encoders is {' '.join(wrong)}; {family.name} can only do without "
            f"these text encoders: {', '.join(allowed) or 'none'}"
        )


def _text_encoders(config: TrainingConfig, family: ModelFamily) -> Iterator[str]:
    if not config.train_text_encoder:
        return
    if not family.text_encoders:
        yield (
            f"--train_text_encoder cannot be used with {family.name}: its text encoder is a large "
            "language model, which stays frozen. Leave out --train_text_encoder"
        )
    elif unknown := sorted(set(config.text_encoders or ()) - set(family.text_encoders)):
        yield (
            f"--text_encoders names {', '.join(unknown)}; {family.name} has "
            f"{', '.join(family.text_encoders)}"
        )
    elif both := set(trained_components(config, family)) & set(
        config.leave_out_text_encoders or ()
    ):
        yield (
            f"--leave_out_text_encoders leaves out {', '.join(sorted(both))}, but "
            "--train_text_encoder adapts it. Leave out one of these options, or name other text "
            "encoders with --text_encoders"
        )


def _sequence(config: TrainingConfig, family: ModelFamily) -> Iterator[str]:
    if problem := family.sequence_problem(config.max_sequence_length):
        yield problem


def _pseudo_huber(config: TrainingConfig, family: ModelFamily) -> Iterator[str]:
    try:
        pseudo_huber(config, family)
    except ConfigError as error:
        yield from error.problems


def _presets(config: TrainingConfig, family: ModelFamily) -> Iterator[str]:
    for component in trained_components(config, family):
        is_denoiser = component == family.denoiser
        if is_denoiser and config.target_modules is not None:
            continue
        flag = "target_preset" if is_denoiser else "text_encoder_target_preset"
        preset, presets = getattr(config, flag), family.target_presets[component]
        if preset not in presets:
            yield (
                f"--{flag} is {preset!r}; for the {component} of {family.name} it must be one of "
                f"{', '.join(presets)}"
            )


def _without_effect(config: TrainingConfig, family: ModelFamily) -> Iterator[str]:
    defaults = {f.name: f.default for f in fields(config)}
    foreign = [
        name
        for name, only in options_with(type(config), OnlyFor).items()
        if only.objective != family.objective
    ]
    if family.max_sequence_length is None:
        foreign.append("max_sequence_length")
    if family.skipped_layers is None:
        foreign.append("clip_skip")
    if not takes_negative_prompt(getattr(diffusers, family.pipeline_classes[0])):
        foreign.append("validation_negative_prompt")
    if idle := [f"--{name}" for name in foreign if getattr(config, name) != defaults[name]]:
        yield f"these options have no effect on a base of {family.name}: {', '.join(idle)}"
