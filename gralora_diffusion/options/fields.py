"""What an option is: a field of a dataclass, with its help text; and groups of them as tables."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any, Literal, get_args, get_type_hints


def option(default: Any, help: str, *, secret: bool = False) -> Any:
    """A dataclass field that ``HfArgumentParser`` turns into a flag with this help text."""
    return field(default=default, repr=not secret, metadata={"help": help})


def choices_of(options: type) -> dict[str, tuple[str, ...]]:
    """Return name -> allowed values of the fields of a dataclass that have such a list."""
    choices = {}
    for name, hint in get_type_hints(options).items():
        for part in (hint, *get_args(hint)):
            if getattr(part, "__origin__", None) is Literal:
                choices[name] = get_args(part)
    return choices


def group_table(group: Any) -> str:
    """Return the options of a group as a Markdown table under its heading."""
    rows = ["| option | default | |", "|---|---|---|"]
    choices = choices_of(group)
    for f in fields(group):
        value = str(f.default).lower() if isinstance(f.default, bool) else f.default
        default = "" if value in (None, "") else f"`{value}`"
        text = f.metadata["help"].replace("<", "\\<")  # Markdown would take it for a tag
        allowed = f". One of {', '.join(choices[f.name])}" if choices.get(f.name) else ""
        rows.append(f"| `--{f.name}` | {default} | {text}{allowed} |")
    return "\n\n".join([f"## {group._argument_group_name}", "\n".join(rows)])
