"""Read the options of dataclasses from a command line and from the YAML file that it names."""

from __future__ import annotations

import re
import sys
import types
import typing
from argparse import Action, ArgumentDefaultsHelpFormatter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from gralora_diffusion.io.bundled import config_names, find_config, is_bundled, locate
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.regular_files import read_regular
from gralora_diffusion.io.yaml_files import compose

from .command_parser import (
    CommandParser,
    Reading,
    first_named_in,
    named_in,
    nearest_choice,
    without_hyphens,
)
from .fields import Place, options_with, plain_types_of
from .path_names import file_or_id

#: Bytes of a YAML file at most.
_MOST_BYTES = 1 << 20
#: Type -> how a help text shows its values.
_SHOWN = {int: "N", float: "X", str: "TEXT", file_or_id: "TEXT", bool: "true|false"}
#: At most this many nested options are reported, since aliases multiply them, and so many are read.
_MOST_NESTED, _MOST_NESTED_READ = 20, 100
#: After so many problems a file is not read further: each may need a search for similar names.
_MOST_PROBLEMS = 100


@dataclass
class ParsedOptions(Reading):
    """Options from a command line and a file.

    Attributes:
        values: option -> value, the default for those that were not given or have a problem.
        lines: option -> "file:line", for those from the file that the command line does not give.
        place: "file:line" where all of them begin, if they are a section of a file.
    """

    lines: dict[str, str] = field(default_factory=dict)
    place: str | None = None

    def located(self, problems: Sequence[str]) -> list[str]:
        """Return problems that ``problems`` adds to these, with file and line where known.

        A problem with an option that could not be read is left out, because it is about the
        default.
        """
        more = []
        for problem in problems:
            if not named_in(problem) & self.faulty:
                line = self.lines.get(first_named_in(problem) or "", self.place)
                more.append(f"{line}: {problem}" if line else problem)
        return more


def read_options(
    groups: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    other_names: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
    prog: str | None = None,
    configs: Sequence[str] | None = None,
    sources: Collection[str] = ("config",),
) -> ParsedOptions:
    """Read options from a command line, and from the YAML file that its ``--config`` names.

    A name such as ``sdxl`` is that of a bundled file, see ``io.bundled``.

    Args:
        groups: dataclasses with fields made by ``options.fields.option``.
        argv: the arguments without the program's name; those of this process by default.
        other_names: name that a user may take for an option -> the rest of its error message.
        before: arguments that the file and the command line override.
        prog: name of the program, for ``--help``.
        configs: names of bundled files for this program, for errors; the trainer's by default.
        sources: options that name a source of other options.
    """
    parser = _Parser(groups, other_names, prog)
    below, line = parser.read(before), parser.read(sys.argv[1:] if argv is None else argv)
    parsed = ParsedOptions({name: parser.get_default(name) for name in parser.names})
    file = Reading()
    lines: dict[str, str] = {}
    if path := line.values.get("config"):
        file, lines = _read_yaml(
            parser, find_config(path), config_names() if configs is None else configs
        )
    is_unread = bool(file.problems) and not (file.values or file.faulty)
    if is_unread or line.faulty & {*sources}:  # it may have given all others
        file.faulty |= parser.names - line.values.keys()
    for reading in (below, file, line):
        parsed.values |= reading.values
        parsed.problems += reading.problems
        parsed.faulty |= reading.faulty
    parsed.lines = {name: place for name, place in lines.items() if name not in line.values}
    return parsed


def read_sections(
    groups: Sequence[type],
    path: Path,
    text: str,
    option: str,
    *,
    called: Mapping[str, str],
    other_names: Mapping[str, str] | None = None,
) -> list[ParsedOptions]:
    """Read a YAML list whose entries have options each; one without a value keeps its default.

    Args:
        groups: as for ``read_options``.
        path: of the file, for messages.
        text: its content, as ``read_text`` returns it.
        option: the option that names the file, for messages.
        called: option -> its name in the file; others are not allowed there.
        other_names: as for ``read_options``.

    Returns:
        What each entry says. Its options, lines and problems have the names of the file.

    Raises:
        ConfigError: the file is no such list.
    """
    parser = _Parser(groups, other_names, None, called)
    root = _compose(path, text, option)
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        raise ConfigError([f"{path}: {option} must be a list, with a - before each of its entries"])
    sections = []
    for node in root.value:
        section = ParsedOptions({}, place=f"{path}:{node.start_mark.line + 1}")
        if isinstance(node, yaml.MappingNode):
            _read_options(parser, node, path, section, section.lines)
        else:
            form = "must contain lines of the form `name: value`"
            section.problems.append(f"{section.place}: each entry {form}")
        sections.append(section)
        if (count := sum(len(section.problems) for section in sections)) >= _MOST_PROBLEMS:
            section.problems.append(_ended(section.place, count))
            break
    return sections


def arguments_of(groups: Sequence[type], path: Path) -> list[str]:
    """Return the options of a YAML file as command-line arguments; lists become several values.

    Raises:
        ConfigError: the file cannot be read, or has options that do not exist.
    """
    reading = Reading()
    arguments: list[str] = []
    parser = _Parser(groups, None, None)
    root = _root(path, reading, ())
    for name, texts, _ in _yaml_options(parser, root, path, reading) if root else ():
        # after =, a value may start with a hyphen
        arguments += [f"--{name}={texts[0]}"] if len(texts) == 1 else [f"--{name}", *texts]
    if reading.problems:
        raise ConfigError(reading.problems)
    return arguments


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Adds the default to the help text if there is one."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


class _Parser(CommandParser):
    """A parser with an option for each field of the dataclasses."""

    def __init__(
        self,
        groups: Sequence[Any],
        other_names: Mapping[str, str] | None,
        prog: str | None,
        called: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            prog=prog,
            usage="%(prog)s [--config FILE] [--name value ...]",
            formatter_class=_HelpFormatter,
            other_names=other_names,
        )
        self.names: set[str] = set()
        for options in groups:
            group = self.add_argument_group(options._argument_group_name)
            hints, places = plain_types_of(options), options_with(options, Place)
            for f in fields(options):
                name = f.name if called is None else called.get(f.name)
                if name is None:
                    continue
                self.names.add(name)
                given = {"default": f.default, "help": f.metadata["help"].replace("%", "%%")}
                kind = _kind(hints[f.name], file_or_id if f.name in places else str)
                group.add_argument(f"--{name}", **given, **kind)
                if f.default is True:
                    off = f"Switch --{name} off"
                    group.add_argument(
                        f"--no_{name}",
                        dest=name,
                        action="store_const",
                        const=False,
                        default=True,
                        help=off,
                    )

    def action_of(self, name: str) -> Action | None:
        """Return the argparse action of the option ``name``; None if it is unknown."""
        return self._option_string_actions.get(f"--{name}") if name in self.names else None


def _kind(hint: Any, text: Callable[[str], str]) -> dict[str, Any]:
    """Return the arguments of ``add_argument`` for a field's type; ``text`` reads its texts."""
    if get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is list:
        (item,) = (text if part is str else part for part in get_args(hint))
        return {"type": item, "nargs": "+", "metavar": _SHOWN[item]}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    more: dict[str, Any] = {"nargs": "?", "const": True} if hint is bool else {}
    kind = text if hint is str else hint
    return {"type": kind, "metavar": _SHOWN[kind], **more}


def _read_yaml(
    parser: _Parser, path: Path, configs: Sequence[str]
) -> tuple[Reading, dict[str, str]]:
    """Read a YAML file; return what it says, and option -> "file:line"."""
    reading = Reading()
    lines: dict[str, str] = {}
    if root := _root(path, reading, configs):
        _read_options(parser, root, path, reading, lines)
    return reading, lines


def _read_options(
    parser: _Parser,
    root: yaml.MappingNode,
    path: Path,
    reading: Reading,
    lines: dict[str, str],
) -> None:
    """Read a mapping into ``reading``, and option -> "file:line" into ``lines``."""
    for name, texts, place in _yaml_options(parser, root, path, reading):
        lines[name] = place
        action = parser.action_of(name)
        assert action is not None
        parser.read_value(reading, action, f"{place}: {name}", texts)


def read_text(path: Path, option: str, advice: str = "Give a YAML file") -> str:
    """Return the text of a YAML file that ``option`` names.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return read_regular(path, _MOST_BYTES).decode("utf-8-sig")
    except OSError as error:
        problem = f"{option} cannot be read: {error.strerror or error}. {advice}"
    except UnicodeDecodeError as error:
        problem = f"{option} is not a UTF-8 text file: {error}"
    raise ConfigError([f"{path}: {problem}"])


def _compose(path: Path, text: str, option: str) -> yaml.Node | None:
    """Return the content of a YAML file that ``option`` names; None if it is empty.

    Raises:
        ConfigError: it is not YAML.
    """
    try:
        return compose(text)
    except yaml.YAMLError as error:
        problem = _not_yaml(path, option, error)
    except ValueError as error:
        problem = f"{option} cannot be read: {error}"
    raise ConfigError([f"{path}: {problem}"])


def _root(path: Path, reading: Reading, configs: Sequence[str]) -> yaml.MappingNode | None:
    """Return the mapping in a YAML file of options, or add a problem; None if it is empty."""
    near = nearest_choice(path.name, configs)
    hint = f". Did you mean {near}?" if near else ""
    advice = f"Give a YAML file, or the name of a bundled one: {', '.join(configs)}{hint}"
    try:
        root = _compose(path, read_text(path, "--config", advice), "--config")
    except ConfigError as error:
        reading.problems += error.problems
        return None
    if root is not None and not isinstance(root, yaml.MappingNode):
        reading.problems.append(f"{path}: --config must contain lines of the form `name: value`")
        return None
    return root


def _yaml_options(
    parser: _Parser, root: yaml.MappingNode, path: Path, reading: Reading
) -> Iterator[tuple[str, list[str], str]]:
    """Yield (option, its texts, "file:line") of a flat YAML mapping; add problems to ``reading``.

    Values are passed on as they are written, because YAML would read ``no`` as false and ``1e-4``
    as a string. An empty value (or ``null``) keeps the default. Paths in a bundled file are below
    ``samples/``, wherever that is installed.
    """
    found = locate if is_bundled(path) else str
    seen: set[str] = set()

    def report(problem: str) -> None:
        reading.add(problem)
        reading.problems[-1] = f"{place}: {without_hyphens(problem)}"
        reading.faulty.add(name)

    for key, value in root.value:
        place = f"{path}:{key.start_mark.line + 1}"
        if len(reading.problems) >= _MOST_PROBLEMS:
            reading.problems.append(_ended(place, len(reading.problems)))
            return
        if not isinstance(key, yaml.ScalarNode):
            reading.problems.append(f"{place}: the name of an option must be plain text")
            continue
        name = key.value.lstrip("-").replace("-", "_")
        action = parser.action_of(name)
        if name == "config":
            report("config is only allowed on the command line; a file cannot name another one")
        elif isinstance(value, yaml.MappingNode) or (action is None and _is_nested(value)):
            if action is not None:
                report(f"{name} takes a plain value, because options are not nested")
            for line, problem in _nested(parser, key, value, known=action is not None):
                place = f"{path}:{line}"
                report(problem)
        elif action is None:
            report(parser.unknown(key.value, name))
        elif key.value.startswith("-"):
            report(f"{name} must be written without hyphens before it")
        elif name in seen:
            report(f"{name} is given twice. Remove one")
        elif isinstance(value, yaml.ScalarNode):
            if value.tag != "tag:yaml.org,2002:null":
                yield name, [found(_as_typed(value))], place
        elif action.nargs != "+":
            report(f"{name} takes one value, not a list")
        elif not value.value or not all(map(_is_text, value.value)):
            report(f"{name} takes a list of at least one plain value")
        else:
            yield name, [found(_as_typed(item)) for item in value.value], place
        seen.add(name)


def _not_yaml(path: Path, option: str, error: yaml.YAMLError) -> str:
    if path.suffix.lower() not in (".yaml", ".yml"):
        return (
            f"{option} must be a YAML file with lines of the form `name: value`, but this is a "
            f"{path.suffix or 'plain'} file"
        )
    text = " ".join(str(error).split())
    hint = ""
    if "'\\t'" in text:
        hint = ". Indent with spaces instead of tabs"
    elif "mapping values are not allowed" in text:
        hint = ". Put a text that contains `: ` in quotes"
    return f"{option} is not YAML: {text}{hint}"


def _nested(
    parser: _Parser, key: yaml.ScalarNode, value: yaml.Node, known: bool
) -> Iterator[tuple[int, str]]:
    """Yield (line, problem) for each nested plain value, with the option that it may be.

    Args:
        known: the section has the name of an option, so that only advice is of use.
    """
    left: list[tuple[str, Any, Any]] = [(key.value, key, value)]
    found, read, seen = 0, 0, set()
    while left and found < _MOST_NESTED and read < _MOST_NESTED_READ:
        spelled, key, value = left.pop(0)
        items: list[Any] = []
        if isinstance(value, yaml.MappingNode):
            items = [(f"{spelled}.{k.value}", k, v) for k, v in value.value if _is_text(k)]
        elif isinstance(value, yaml.SequenceNode):
            items = [(spelled, key, item) for item in value.value if not _is_text(item)]
        if items:
            left = [*([] if id(value) in seen else items), *left][:_MOST_NESTED_READ]
            seen.add(id(value))  # aliases may repeat it
            continue
        read += 1
        advice = _name_of_nested(parser, spelled)
        if advice or not known:
            found += 1
            text = f"{spelled} is nested, but options are not nested here"
            yield key.start_mark.line + 1, text + (advice or ". No option here has that name")


def _ended(place: str | None, count: int) -> str:
    return f"{place}: the file is not read further after {count} problems. Mend these first"


def _is_nested(node: Any) -> bool:
    return isinstance(node, yaml.SequenceNode) and not all(map(_is_text, node.value))


def _as_typed(node: yaml.ScalarNode) -> str:
    """Return a value as it would be typed on a command line: YAML writes infinity as ``.inf``."""
    text: str = node.value
    return text.replace(".", "", 1) if re.fullmatch(r"[-+]?\.(inf|Inf|INF)", text) else text


def _is_text(node: Any) -> bool:
    return isinstance(node, yaml.ScalarNode)


def _name_of_nested(parser: _Parser, spelled: str) -> str | None:
    """Say what a nested option is called here: by its section and name, or by its name."""
    section, _, name = spelled.rpartition(".")
    section, plain = section.rpartition(".")[2], name.replace("-", "_")
    for known in (f"{section}.{plain}", f"{section}_{plain}", plain):
        if known in parser.names:
            return f". Write it as --{known}"
        if said := parser.other_names.get(known):
            return f": it {said}"
    advice = parser.unknown(spelled, plain).partition(". ")[2]
    return f". {advice}" if "Did you mean" in advice else None
