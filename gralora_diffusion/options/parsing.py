"""Parse the options of dataclasses from a command line and from the YAML file that it names."""

from __future__ import annotations

import difflib
import sys
from argparse import Action, ArgumentDefaultsHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from gralora_diffusion.io.bundled import config_names, find_config, is_bundled, locate
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.regular_files import read_regular

#: Bytes of a YAML file at most.
_MOST_BYTES = 1 << 20


def parse_options(
    groups: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    not_carried: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
    prog: str | None = None,
) -> dict[str, Any]:
    """Read options from a command line, and from the YAML file that its ``--config`` names.

    A name such as ``sdxl`` is that of a bundled file, see ``io.bundled``.

    Args:
        groups: dataclasses with fields made by ``options.fields.option``.
        argv: the arguments without the program's name; those of this process by default.
        not_carried: name that a user may take for an option -> the rest of its error message.
        before: arguments that the file and the command line override.
        prog: name of the program, for ``--help``.

    Returns:
        The value of every option by its name.

    Raises:
        ConfigError: an option is unknown, its value is of the wrong type or not among the choices,
            or the YAML file cannot be read.
    """
    parser = _Parser(groups, not_carried or {}, prog)
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser.read([*before, *arguments])
    if options["config"] is None:
        return options
    path = find_config(options["config"])
    try:
        from_file = _yaml_to_arguments(parser, path)
        parser.read(from_file)  # separately, so that errors of the file name the file
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from None
    return parser.read([*before, *from_file, *arguments])


def arguments_of(groups: Sequence[type], path: Path) -> list[str]:
    """Return the options of a YAML file as command-line arguments; lists become several values.

    Raises:
        ConfigError: as ``parse_options`` of the file.
    """
    return _yaml_to_arguments(_Parser(groups, {}, None), path)


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Adds the default to the help text if there is one."""

    def _get_help_string(self, action: Action) -> str | None:
        if action.option_strings and action.option_strings[0].startswith("--no_"):
            return f"Switch --{action.dest} off"
        return action.help if action.default in (None, "") else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def __init__(
        self, groups: Sequence[Any], not_carried: Mapping[str, str], prog: str | None
    ) -> None:
        super().__init__(groups, prog=prog, allow_abbrev=False, formatter_class=_HelpFormatter)
        self.names = {f.name for group in groups for f in fields(group)}
        self.not_carried = not_carried

    def error(self, message: str) -> NoReturn:
        raise ConfigError([message])  # instead of printing the usage and ending the process

    def action_of(self, name: str) -> Action | None:
        """Return the argparse action of the option ``name``; None if it is unknown."""
        return self._option_string_actions.get(f"--{name}") if name in self.names else None

    def read(self, arguments: list[str]) -> dict[str, Any]:
        *groups, unknown = self.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            flags = [text.split("=")[0][2:] for text in unknown if text.startswith("--")]
            stray = (
                f"{unknown[0]!r} does not belong to any option. If it is part of a text, put the "
                "text in quotes"
            )
            raise ConfigError([self.unknown(f"--{flag}", flag) for flag in flags] or [stray])
        return {name: value for group in groups for name, value in vars(group).items()}

    def unknown(self, spelled: str, name: str) -> str:
        """Return the error message for an unknown option."""
        name = name.replace("-", "_")
        if name in self.not_carried:
            return f"{spelled} {self.not_carried[name]}"
        nearest = " or ".join(difflib.get_close_matches(name, self.names, n=3))
        advice = f"Did you mean {nearest}?" if nearest else "See --help for all options"
        return f"{spelled} is not an option. {advice}"


def _yaml_to_arguments(parser: _Parser, path: Path) -> list[str]:
    """Turn a flat YAML mapping into command-line arguments, which the same parser checks.

    Values are passed on as they are written, because YAML would read ``no`` as false and ``1e-4``
    as a string. An empty value (or ``null``) keeps the default. Paths in a bundled file are below
    ``samples/``, wherever that is installed.
    """
    found = locate if is_bundled(path) else str
    try:
        text = read_regular(path, _MOST_BYTES).decode()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        names = ", ".join(config_names())
        raise ConfigError(
            [
                f"--config cannot be read: {error.strerror or error}. Give a YAML file, or the "
                f"name of a bundled one: {names}"
            ]
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"--config is not a UTF-8 text file: {error}"]) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"--config is not YAML: {' '.join(str(error).split())}"]) from error
    except RecursionError:
        raise ConfigError(["--config is nested too deeply"]) from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(["--config must contain lines of the form `name: value`"])

    arguments: list[str] = []
    problems: list[str] = []
    seen: set[str] = set()
    for key, value in root.value:
        where = f"line {key.start_mark.line + 1}: "
        if not isinstance(key, yaml.ScalarNode):
            problems.append(f"{where}the name of an option must be plain text")
            continue
        name = key.value.replace("-", "_")
        action = parser.action_of(name)
        if name == "config":
            problems.append(
                f"{where}config is only allowed on the command line; a file cannot name another one"
            )
        elif action is None:
            problems.append(where + parser.unknown(key.value, name))
        elif name in seen:
            problems.append(f"{where}{name} is given twice. Remove one")
        elif isinstance(value, yaml.SequenceNode):
            if action.nargs != "+":
                problems.append(f"{where}{name} takes one value, not a list")
            elif not value.value or not all(isinstance(v, yaml.ScalarNode) for v in value.value):
                problems.append(f"{where}{name} takes a list of at least one plain value")
            else:
                arguments += [f"--{name}", *(found(item.value) for item in value.value)]
        elif isinstance(value, yaml.MappingNode):
            problems.append(f"{where}{name} takes a plain value, because options are not nested")
        elif value.tag != "tag:yaml.org,2002:null":
            # after =, a value may start with a hyphen
            arguments.append(f"--{name}={found(value.value)}")
        seen.add(name)
    if problems:
        raise ConfigError(problems)
    return arguments
