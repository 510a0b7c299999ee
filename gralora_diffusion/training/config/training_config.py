"""The training options as one object: from a command line, from a YAML file, and back to YAML."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any

import yaml

from gralora_diffusion.base_models.options import BaseModelOptions
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.file_names import public_name, real_path
from gralora_diffusion.options.fields import (
    Needs,
    PerSet,
    Place,
    Unrecorded,
    group_table,
    in_each,
    options_with,
)
from gralora_diffusion.options.parsing import ParsedOptions, read_options
from gralora_diffusion.options.path_names import from_home

from .data_options import (
    ControlOptions,
    DataOptions,
    HeldOutOptions,
    ImageOptions,
    MaskOptions,
    PriorOptions,
    SetOptions,
)
from .layer_patterns import layer_patterns
from .options import (
    AdapterOptions,
    LengthOptions,
    LossOptions,
    OptimizerOptions,
    OutputOptions,
    ValidationOptions,
)
from .other_programs import OTHER_NAMES


@dataclass(kw_only=True)
class TrainingConfig(
    ValidationOptions,
    OutputOptions,
    OptimizerOptions,
    LengthOptions,
    AdapterOptions,
    LossOptions,
    MaskOptions,
    ImageOptions,
    PriorOptions,
    HeldOutOptions,
    ControlOptions,
    DataOptions,
    BaseModelOptions,
):
    """All options of a training run; each is described in ``config.options``."""

    def __post_init__(self) -> None:
        if "." not in self.optimizer:  # an import path has its own upper and lower case
            self.optimizer = self.optimizer.lower()
        if self.use_8bit_adam and self.optimizer == "adamw":
            self.optimizer = "adamw8bit"
        if self.aspect_ratio_buckets is not None:
            self.use_aspect_ratio_buckets = True
        for name in options_with(type(self), Place):  # in a YAML file, no shell expands ~
            setattr(self, name, in_each(getattr(self, name), from_home))

    @property
    def patterns(self) -> dict[str, dict[str, Any]]:
        """``rank_pattern``, ``k_pattern`` and ``alpha_pattern`` as ``GraloraConfig`` takes them.

        Without ``lora_alpha``, layers of another rank get the alpha that gives scaling 1.
        """
        return layer_patterns(self)

    @property
    def encoding(self) -> dict[str, Any]:
        """How prompts are encoded, as ``ModelFamily.encode_prompts`` takes it."""
        return {"max_sequence_length": self.max_sequence_length, "clip_skip": self.clip_skip}

    def validate(self) -> list[str]:
        """Deprecated: call ``gralora_diffusion.validate`` with the config."""
        text = "TrainingConfig.validate() is now gralora_diffusion.validate(config)"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        # imported by name, since that room is above this one; removed in the next release
        found: list[str] = import_module("gralora_diffusion.training.checks.options").validate(self)
        return found

    def with_defaults(self, family_defaults: Mapping[str, Any]) -> TrainingConfig:
        """Return a copy in which every option left to the family has a value.

        Args:
            family_defaults: option -> value, such as ``{"resolution": 512}``. For
                ``learning_rate``, ``adam_weight_decay`` and ``text_encoder_lr``, diffusers' usual
                values are used unless they are given here.

        Raises:
            KeyError: a name does not belong to any option.
        """
        defaults: dict[str, Any] = {
            "learning_rate": 1e-4,
            "adam_weight_decay": 1e-4,
            "text_encoder_lr": 5e-6,
        }
        defaults |= family_defaults
        if unknown := defaults.keys() - _option_names():
            raise KeyError(
                f"the family has defaults for unknown options: {', '.join(sorted(unknown))}"
            )
        if self.optimizer == "prodigy":  # finds the step size itself and takes one rate for all
            learning_rate = 1.0 if self.learning_rate is None else self.learning_rate
            defaults |= {"learning_rate": learning_rate, "text_encoder_lr": learning_rate}
        return replace(self, **{k: v for k, v in defaults.items() if getattr(self, k) is None})

    def as_record(self) -> dict[str, Any]:
        """Return all options in their groups' order for trackers, without the Hub token."""
        unrecorded = options_with(type(self), Unrecorded)
        names = [f.name for group in OPTION_GROUPS for f in fields(group)]
        return {name: getattr(self, name) for name in names if name not in unrecorded}

    def to_yaml(self, *, public: bool = False, effective: bool = False) -> str:
        """Return the options that differ from the defaults as YAML that ``--config`` reads.

        Args:
            public: give only the names of local files and folders, without their paths.
            effective: leave out options without effect, because the switch that they need is off.
        """
        default = TrainingConfig().as_record()

        places = options_with(type(self), Place) if public else {}

        def shown(name: str, value: Any) -> Any:
            if not (value and name in places):
                return value
            hub_id = places[name].hub_id
            return in_each(value, public_name if hub_id else lambda p: real_path(p).name)

        needs = options_with(type(self), Needs)
        idle = {n for n, need in needs.items() if effective and not need.is_met(self)}
        changed = {
            name: shown(name, value)
            for name, value in self.as_record().items()
            if value != default[name] and name not in idle
        }
        return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True, width=100)


OPTION_GROUPS: tuple[type, ...] = TrainingConfig.__bases__[::-1]


def names_in_set(role: str) -> dict[str, str]:
    """Return option -> its name in the sets of a data file that have a role."""
    traits = {name: t for group in OPTION_GROUPS for name, t in options_with(group, PerSet).items()}
    return {name: trait.called or name for name, trait in traits.items() if role in trait.roles}


def read_config(argv: Sequence[str] | None = None) -> tuple[TrainingConfig, ParsedOptions]:
    """Read the options from a command line and from the YAML file that ``--config`` names.

    Args:
        argv: the arguments without the program's name; those of this process by default.

    Returns:
        The config, in which options with a problem have their defaults, and what was read.
    """
    prog = None if argv is None else "gralora train"  # the training script is a program, too
    parsed = read_options(OPTION_GROUPS, argv, other_names=OTHER_NAMES, prog=prog)
    return TrainingConfig(**parsed.values), parsed


def parse_config(argv: Sequence[str] | None = None) -> TrainingConfig:
    """Read the options from a command line and from the YAML file that ``--config`` names.

    Args:
        argv: the arguments without the program's name; those of this process by default.

    Raises:
        ConfigError: an option is unknown, its value has the wrong type or is not one of the
            choices, or the YAML file cannot be read. ``validate`` checks how values fit together.
    """
    config, parsed = read_config(argv)
    if parsed.problems:
        raise ConfigError(parsed.problems)
    return config


def options_table() -> str:
    """Return ``docs/options.md``: every option in Markdown tables, one per group."""
    parts = [
        "# Options of the trainer",
        "This page is generated from the options themselves by "
        "`gralora_diffusion.training.config.training_config.options_table`. Give an option as "
        "`--name value`, or as `name: value` in the file that `--config` names; the command line "
        "overrides the file. `--name` turns a boolean option on, `--name false` turns it off.",
        *map(group_table, OPTION_GROUPS),
        _set_table(),
    ]
    return "\n\n".join(parts) + "\n"


def _set_table() -> str:
    """Return the settings of a set as Markdown: its own, and the options that it may have."""
    roles = {role: names_in_set(role) for role in ("train", "prior", "held_out")}
    texts = [
        f"A set of role {role} may also have "
        + ", ".join(
            f"`{there}`" + (f" (`--{name}`)" if there != name else "")
            for name, there in names.items()
            if there != "loss_weight"
        )
        + "."
        for role, names in roles.items()
    ]
    heading, _, table = group_table(SetOptions).partition("\n\n")
    intro = (
        "Settings of a set in the file that `--data_config` names, see [several sets]"
        "(training/data_file.md)."
    )
    return "\n\n".join([heading, intro, table.replace("`--", "`"), *texts])


def _option_names() -> set[str]:
    return {f.name for f in fields(TrainingConfig)}
