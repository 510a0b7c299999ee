"""Options as fields of a dataclass, with their help text and behavior.

The type declares the behavior, as in ``rank: Annotated[int, Limits(at_least=1)]``. Code that needs
the options with some behavior calls ``options_with``, so each option is declared in one place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from .command_parser import must_be
from .path_names import path_problem


@dataclass(frozen=True)
class Limits:
    """The allowed range of a number."""

    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    infinite: bool = False

    def allow(self, value: float) -> bool:
        """Whether a number is within the limits; NaN never is, nor an integer beyond all floats."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.infinite or abs(value) <= sys.float_info.max)
        )

    def wanted(self, value: float) -> str:
        """Return what a number must be that is not within the limits."""
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            return "a smaller number"
        named = {"at least": self.at_least, "above": self.above, "below": self.below}
        given = [f"{name} {limit}" for name, limit in named.items() if limit is not None]
        return " and ".join(given) or "finite"


@dataclass(frozen=True)
class Place:
    """A file or folder, or a list. Public files only contain its name, and ``~`` is expanded.

    Attributes:
        read: the run reads it, so nothing may be written there.
        written: the run writes to it.
        hub_id: it may be a Hub id instead.
    """

    read: bool = False
    written: bool = False
    hub_id: bool = False


@dataclass(frozen=True)
class Needs:
    """The option has no effect unless the option ``switch`` is given, or ``alternative`` is."""

    switch: str
    alternative: str | None = None

    def is_met(self, options: Any) -> bool:
        """Whether one of them is given."""
        names = (self.switch, self.alternative)
        return any(name is not None and getattr(options, name) for name in names)

    def __str__(self) -> str:
        return f"--{self.switch}" + (f" or --{self.alternative}" if self.alternative else "")


@dataclass(frozen=True)
class OnlyFor:
    """The option only applies to one training objective."""

    objective: str


@dataclass(frozen=True)
class Fixed:
    """A resumed run must have the value that the checkpoint was trained with.

    Attributes:
        switch: the rule only applies if this option is given.
    """

    switch: str | None = None


@dataclass(frozen=True)
class ChangesSamples:
    """The option affects the samples of a run, or their order."""


@dataclass(frozen=True)
class MayDiffer:
    """The value may differ between processes of a run, or between commands of a benchmark."""

    processes: bool = False
    commands: bool = False


@dataclass(frozen=True)
class SetByBenchmark:
    """The benchmark sets the option itself, and refuses it with this advice."""

    advice: str


@dataclass(frozen=True)
class PerSet:
    """A data file may give a set of images its own value.

    Attributes:
        called: its name there, if it differs.
        roles: of the sets that may have it.
    """

    called: str | None = None
    roles: tuple[str, ...] = ("train",)


@dataclass(frozen=True)
class AlwaysReported:
    """The benchmark's report lists the value even if it is the default."""


@dataclass(frozen=True)
class Unrecorded:
    """The value is not recorded in any file."""


Trait = TypeVar("Trait")


def option(default: Any, help: str, *, secret: bool = False) -> Any:
    """Return a dataclass field that ``HfArgumentParser`` turns into a flag with this help text."""
    return field(default=default, repr=not secret, metadata={"help": help})


def options_with(options: type, trait: type[Trait]) -> dict[str, Trait]:
    """Return name -> trait for the fields of a dataclass whose type has such an annotation."""
    found = _traits(options)
    return {name: t for name, traits in found.items() for t in traits if isinstance(t, trait)}


@cache
def types_of(options: type) -> dict[str, Any]:
    """Return name -> type with its traits for the annotations of a dataclass.

    They are evaluated once for each class: that takes milliseconds.
    """
    return get_type_hints(options, include_extras=True)


@cache
def plain_types_of(options: type) -> dict[str, Any]:
    """Return the same without the traits."""
    return get_type_hints(options)


@cache
def _traits(options: type) -> dict[str, tuple[Any, ...]]:
    types = types_of(options)
    return {f.name: getattr(types[f.name], "__metadata__", ()) for f in fields(options)}


def in_each(value: Any, change: Callable[[str], str]) -> Any:
    """Return an option's text, changed; of a list, each of its texts; None and "" as they are."""
    if isinstance(value, list):
        return [change(text) for text in value]
    return change(value) if value else value


def texts_of(value: Any) -> list[str]:
    """Return the texts of an option: one, a list, or none if it is None or ""."""
    return value if isinstance(value, list) else [value] if value else []


@cache
def choices_of(options: type) -> dict[str, tuple[str, ...]]:
    """Return name -> allowed values for the fields of a dataclass with a list of choices."""
    choices = {}
    for name, hint in plain_types_of(options).items():
        for part in (hint, *get_args(hint)):
            if getattr(part, "__origin__", None) is Literal:
                choices[name] = get_args(part)
    return choices


def path_problems(options: Any) -> Iterator[str]:
    """Yield a problem for each path that no file system can be asked for."""
    for name in options_with(type(options), Place):
        for text in texts_of(getattr(options, name)):
            if problem := path_problem(text):
                yield f"--{name} is {text!r:.80}, which {problem}"


def value_problems(options: Any) -> Iterator[str]:
    """Yield a problem for each value that is outside its limits or not among its choices."""
    kind: type = type(options)
    for name, limits in options_with(kind, Limits).items():
        value = getattr(options, name)
        if value is not None and not limits.allow(value):
            yield f"--{name} is {value!s:.80}; it must be {limits.wanted(value)}"
    for name, allowed in choices_of(kind).items():
        value = getattr(options, name)
        if value is not None and value not in allowed:
            yield f"--{name} is {value!r}; {must_be(str(value), allowed)}"


def group_table(group: Any) -> str:
    """Return the options of a group as a Markdown table under its heading."""
    rows = ["| option | default | |", "|---|---|---|"]
    choices = choices_of(group)
    for f in fields(group):
        value = str(f.default).lower() if isinstance(f.default, bool) else f.default
        default = "" if value in (None, "") else f"`{value}`"
        text = f.metadata["help"].replace("<", "\\<")  # Markdown would read it as a tag
        allowed = f". One of {', '.join(choices[f.name])}" if choices.get(f.name) else ""
        rows.append(f"| `--{f.name}` | {default} | {text}{allowed} |")
    return "\n\n".join([f"## {group._argument_group_name}", "\n".join(rows)])
