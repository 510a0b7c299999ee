"""The trainer's options as a form: its fields, and what their texts mean.

Everything comes from the declarations of the options. Texts are read and checked as the command
line is, so that every problem has the same words.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from gralora_diffusion.io.bundled import find_config
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.options.command_parser import first_named_in
from gralora_diffusion.options.fields import Unrecorded, choices_of, options_with, plain_types_of
from gralora_diffusion.training.checks.options import find_problems, find_warnings
from gralora_diffusion.training.config.training_config import (
    OPTION_GROUPS,
    TrainingConfig,
    read_config,
)

from .imports import import_diffusers

#: Options that the form does not have: the studio or a launcher sets them, or they are secret.
_NOT_SHOWN = {"config", "dry_run", "local_rank", *options_with(TrainingConfig, Unrecorded)}
#: The options that most runs need, in the order of a first run.
BASIC = (
    *("pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "output_dir"),
    *("resolution", "use_aspect_ratio_buckets", "rank", "gralora_k", "target_preset"),
    *("learning_rate", "lr_scheduler", "lr_warmup_steps", "train_batch_size", "max_train_steps"),
    *("mixed_precision", "gradient_checkpointing", "quantization", "checkpointing_steps"),
    *("validation_prompt", "validation_steps", "num_validation_images", "seed"),
)
Kind = Literal["switch", "choice", "lines", "text"]


@dataclass(frozen=True)
class Field:
    """An option in the form.

    Attributes:
        kind: how it is given; "lines" takes one value per line.
        default: as its value in the form: a bool for a switch, otherwise a text; "" if there is
            none, or if it depends on other options or on the base.
    """

    name: str
    kind: Kind
    default: str | bool
    help: str
    choices: tuple[str, ...] = ()

    @property
    def if_empty(self) -> str:
        """What an empty field stands for, as its help says; "" if it does not."""
        found = re.search(r"\(default: (.*)\)", self.help)
        return found[1] if found and self.default == "" else ""

    def text(self, value: Any) -> str | bool:
        """Return a value of the option as its value in the form."""
        if self.kind == "switch":
            return bool(value)
        if isinstance(value, list):
            return "\n".join(map(str, value))
        return "" if value is None else str(value)


@dataclass(frozen=True)
class Group:
    """Options of one topic, as in ``--help``."""

    title: str
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class Checked:
    """What a filled form means.

    Attributes:
        config: with the defaults for options that have problems.
        problems: (option, text) for each problem; the option is None if it is about several.
        warnings: texts.
    """

    config: TrainingConfig
    problems: tuple[tuple[str | None, str], ...]
    warnings: tuple[str, ...]

    @property
    def yaml(self) -> str:
        """The file of options."""
        return self.config.to_yaml()

    @property
    def command(self) -> str:
        """The same as a command for a POSIX shell."""
        return shlex.join(["gralora", "train", *arguments(values_of(self.config))])


@cache
def groups() -> tuple[Group, ...]:
    """Return the form, in the order of ``gralora train --help``."""
    found = []
    for group in OPTION_GROUPS:
        hints, choices = plain_types_of(group), choices_of(group)
        made = []
        for f in fields(group):
            if f.name in _NOT_SHOWN:
                continue
            kind = _kind(hints[f.name], f.name in choices)
            blank = Field(f.name, kind, "", f.metadata["help"], choices.get(f.name, ()))
            made.append(Field(f.name, kind, blank.text(f.default), blank.help, blank.choices))
        found.append(Group(group._argument_group_name, tuple(made)))  # type: ignore[attr-defined]
    return tuple(found)


def _kind(hint: Any, is_choice: bool) -> Kind:
    if is_choice:
        return "choice"
    if hint is bool:
        return "switch"
    return "lines" if "list" in str(hint) else "text"


@cache
def all_fields() -> tuple[Field, ...]:
    """Return the fields of all groups."""
    return tuple(f for group in groups() for f in group.fields)


def values_of(config: TrainingConfig) -> dict[str, str | bool]:
    """Return option -> its value in the form, for all of them."""
    return {f.name: f.text(getattr(config, f.name)) for f in all_fields()}


def arguments(values: Mapping[str, str | bool]) -> list[str]:
    """Return a filled form as a command line; fields with their defaults are left out."""
    line: list[str] = []
    for f in all_fields():
        value = values.get(f.name, f.default)
        if value == f.default:
            continue
        if isinstance(value, bool):
            line.append(f"--{f.name}" if value else f"--{f.name}=false")
            continue
        parts = value.replace("\0", "").split("\n")  # no command line can have a NUL
        texts = [part.strip() for part in parts if part.strip()]
        if len(texts) == 1:  # after =, it may start with a hyphen
            line.append(f"--{f.name}={texts[0]}")
        elif texts:
            line += [f"--{f.name}", *texts]
    return line


def check(values: Mapping[str, str | bool]) -> Checked:
    """Read and check a filled form as ``gralora train`` reads and checks its command line."""
    if values.get("aspect_ratio_buckets"):  # whose check imports it
        import_diffusers()
    config, parsed = read_config(arguments(values))
    # a form may be filled from a file that somebody else wrote; the training imports what it names
    problems = [*parsed.problems, *parsed.located(find_problems(config, imports=False))]
    warnings = [] if problems else find_warnings(config)
    named = tuple((_option(problem), problem) for problem in problems)
    return Checked(config, named, tuple(warnings))


def _option(problem: str) -> str | None:
    name = first_named_in(problem)
    return name if name in {f.name for f in all_fields()} else None


def from_file(path: str | Path) -> dict[str, str | bool]:
    """Return a filled form with the options of a YAML file, or of a bundled one by its name.

    Raises:
        ConfigError: the file cannot be read, or has options with problems.
    """
    config, parsed = read_config(["--config", str(path)])
    if parsed.problems:
        raise ConfigError(parsed.problems)
    return values_of(config)


def described(name: str) -> str:
    """Return the first comment of a bundled file of options, which says what it is for."""
    lines: Sequence[str] = find_config(name).read_text(encoding="utf-8").splitlines()
    return lines[0].lstrip("# ") if lines and lines[0].startswith("#") else ""


@dataclass(frozen=True)
class Fitted:
    """A form whose options were changed so that the run fits into a given memory.

    Attributes:
        said: the plan's sentences, with the memory that the run needs.
        values: option -> its new value, for those that change.
        undo: option -> its values before and after the search.
    """

    said: str
    values: dict[str, str | bool]
    undo: dict[str, tuple[str | bool, str | bool]]


def without_fit(
    values: Mapping[str, str | bool], undo: Mapping[str, Sequence[str | bool]]
) -> dict[str, str | bool]:
    """Return a filled form without what an earlier search filled in, unless it was edited since."""
    return {n: undo[n][0] if n in undo and v == undo[n][1] else v for n, v in values.items()}


def fitted(values: Mapping[str, str | bool], text: str) -> Fitted | None:
    """Return what ``gralora train --dry_run --device_memory`` has found for a filled form.

    Args:
        text: its output.

    Returns:
        None if no options make the run fit, or if there was no plan.
    """
    found = re.search(
        r"^(?:To fit into \S+ GiB, give (.+?)\.|The run fits into \S+ GiB as it is\.) It needs "
        r"about .*",
        text,
        re.MULTILINE,
    )
    if found is None:
        return None
    line = arguments(values)
    options = [*line, *shlex.split(found[1] or "")]
    before, after = (values_of(read_config(given)[0]) for given in (line, options))
    changed = {name: value for name, value in after.items() if value != before[name]}
    return Fitted(found[0], changed, {name: (values[name], v) for name, v in changed.items()})
