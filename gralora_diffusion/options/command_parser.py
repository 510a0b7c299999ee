"""A command's parser that reports all problems at once, each with a suggestion where one is near.

argparse ends at the first problem, after printing the usage of every option. Here it only splits
the command line, and the values are read afterwards.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from gralora_diffusion.io.dtypes import NAMES as DTYPE_NAMES
from gralora_diffusion.io.safe_text import TerminalParser

from .path_names import file_or_id, path_problem

_FLAG = re.compile(r"--?[A-Za-z][\w-]*")
_FLAG_IN_TEXT = re.compile(r"--(?=[A-Za-z])")
#: Dashes that a web page or word processor makes of a hyphen, and quotes that no shell knows.
_LONG_DASHES = "\u2013\u2014\u2212"
_CURLY_QUOTES = "\u201c\u201d\u201e\u2018\u2019\u00ab\u00bb"
_TRUE, _FALSE = ("yes", "true", "t", "y", "1", "on"), ("no", "false", "f", "n", "0", "off")


def finite(text: str) -> float:
    """The type of an option that takes a number other than NaN and infinity."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


_WANTED: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    finite: "a finite number",
    bool: "true or false",
}
#: From a text to the choice that it means, if it is known.
Meaning = Callable[[str], str | None]
#: Another name of a choice -> its names here, of which an option has one.
_SYNONYMS: dict[str, tuple[str, ...]] = {
    **{full: (short,) for short, full in DTYPE_NAMES.items()},
    "half": ("fp16",),
    "float": ("fp32",),
    "fp8": ("fp8_e4m3", "torchao-fp8"),
    "nf4": ("bnb-nf4",),
    "4bit": ("bnb-nf4",),
    "8bit": ("bnb-int8",),
    "int8": ("torchao-int8",),
    "float32": ("fp32", "no"),
    "fp32": ("fp32", "no"),
    "none": ("none", "no"),
    **dict.fromkeys(("adam", "adam_w", "adamw_torch"), ("adamw",)),
    **dict.fromkeys(("generate", "infer", "inference", "test", "draw"), ("sample",)),
    **dict.fromkeys(("merge", "fuse", "bake", "save"), ("export",)),
    **dict.fromkeys(("info", "show", "view", "check"), ("inspect",)),
    **dict.fromkeys(("finetune", "fine-tune", "dreambooth", "run"), ("train",)),
    **dict.fromkeys(("compare", "evaluate", "eval", "bench"), ("benchmark",)),
    "load": ("import",),
    "convert": ("export", "import"),
    "a1111": ("kohya",),
    "webui": ("kohya",),
    "forge": ("kohya",),
    "peft": ("diffusers",),
    "safetensors": ("lora", "checkpoint"),
    "merged": ("checkpoint",),
    "8bit_adam": ("adamw8bit",),
}


@dataclass
class Reading:
    """What a command line, or a file of options, says.

    Attributes:
        values: option -> value, of those that were given and could be read.
        problems: a text for each problem.
        faulty: options that the problems are about, so that nothing else need be said of them.
    """

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    faulty: set[str] = field(default_factory=set)

    def add(self, problem: str) -> None:
        """Add a problem with an option that does not exist, and those that it may have meant."""
        self.problems.append(problem)
        meant = "Did you mean" in problem or "is called" in problem
        self.faulty |= named_in(problem) if meant else {first_named_in(problem) or ""}


def named_in(problem: str) -> set[str]:
    """Return the names of the options that a text contains as ``--name``."""
    return set(re.findall(r"--([A-Za-z]\w*)", problem))


def first_named_in(problem: str) -> str | None:
    """Return the first option that a text contains as ``--name``."""
    found = re.search(r"--([A-Za-z]\w*)", problem)
    return found[1] if found else None


class CommandParser(TerminalParser):
    """An argparse parser whose ``parse_args`` reports all problems at once and exits with code 2.

    Args:
        other_names: name that a user may take for an option -> the rest of its error message.
        meanings: option -> a function from a text to the choice that it means, if it knows it.
    """

    def __init__(
        self,
        *args: Any,
        other_names: Mapping[str, str] | None = None,
        meanings: Mapping[str, Meaning] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.other_names, self.meanings = other_names or {}, meanings or {}

    # -- reading -----------------------------------------------------------------------------------

    def parse_args(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        check: Callable[[argparse.Namespace], Iterable[str]] = lambda options: (),
    ) -> argparse.Namespace:
        """Return the options; print all problems and exit if there are any.

        Args:
            check: yields further problems of the options. It is not called if a required one is
                missing.
        """
        reading = self.read(sys.argv[1:] if args is None else args)
        absent = list(self._absent(reading))
        result = argparse.Namespace()
        for action in self._actions:
            if action.dest != argparse.SUPPRESS and action.default != argparse.SUPPRESS:
                setattr(result, action.dest, action.default)
        vars(result).update(reading.values)
        required = {action.dest for action in self._actions if action.required}
        problems = [*reading.problems, *absent]
        if not absent and required <= reading.values.keys():
            problems += (text for text in check(result) if not named_in(text) & reading.faulty)
        if problems:
            self.fail(problems)
        return result

    def _absent(self, reading: Reading) -> Iterator[str]:
        """Yield a problem for required options that are missing, and for those too many."""
        for group in self._mutually_exclusive_groups:
            members = {action.dest for action in group._group_actions}
            flags = " and ".join(action.option_strings[0] for action in group._group_actions)
            found = members & reading.values.keys()
            if len(found) > 1:
                yield f"{flags} exclude each other. Leave one out"
            elif group.required and not found and not reading.faulty & members:
                yield f"one of {flags} is required"
        known = reading.values.keys() | reading.faulty
        absent = [action for action in self._actions if action.required]
        names = [
            action.option_strings[0] if action.option_strings else str(action.metavar)
            for action in absent
            if action.dest not in known
        ]
        if names:
            yield f"required: {', '.join(names)}"

    def read(self, arguments: Sequence[str]) -> Reading:
        """Read a command line; options that it does not give are left out."""
        reading, unknown = Reading(), []
        given, strays = self._split(arguments)
        if any(isinstance(self._action(flag), argparse._HelpAction) for flag, _ in given):
            self.print_help()
            self.exit()
        for flag, texts in given:
            if (action := self._action(flag)) is not None:
                self.read_value(reading, action, flag, texts)
            else:
                unknown.append(flag)
        counts = Counter(flag for flag, _ in given)
        for flag, count in counts.items():
            if count > 1 and (action := self._action(flag)) and action.nargs in ("+", "*"):
                text = f"{flag} is given {count} times. Give it once, followed by all values"
                reading.add(text)
        for flag in unknown:
            reading.add(self.unknown(flag, flag.lstrip("-")))
        positional = [action for action in self._actions if not action.option_strings]
        if positional and strays:
            texts = [text for _, run in strays for text in run]
            for action in positional:
                taken = texts if action.nargs in ("+", "*") else texts[:1]
                texts = texts[len(taken) :]
                if taken:
                    self.read_value(reading, action, str(action.metavar), taken)
            if texts:
                reading.add(self._stray(texts))
        else:
            for before, run in strays:
                reading.add(self._stray(run, before))
        return reading

    def _split(
        self, arguments: Sequence[str]
    ) -> tuple[list[tuple[str, list[str]]], list[tuple[str | None, list[str]]]]:
        """Return (flag, its texts) in order, and runs of texts that belong to no flag.

        Each of these comes with the flag before it, if that takes one value.
        """
        given: list[tuple[str, list[str]]] = []
        strays: list[tuple[str | None, list[str]]] = []
        end = list(arguments).index("--") if "--" in arguments else len(arguments)
        place, last_stray = 0, -2
        complete: str | None = None
        while place < end:
            text, start = arguments[place], place
            place += 1
            if not _is_flag(text):
                if last_stray != start - 1:
                    strays.append((complete, []))
                strays[-1][1].append(text)
                last_stray = start
                continue
            flag, equals, value = text.partition("=")
            action, texts = self._action(flag), [value] if equals else []
            most = 1 if action is None or action.nargs in (None, "?") else end
            if equals or (action is not None and action.nargs == 0):
                most = 0
            while len(texts) < most and place < end and not _is_flag(arguments[place]):
                texts.append(arguments[place])
                place += 1
            spelled = flag if action is None else self._as_declared(flag)
            given.append((spelled, texts))
            takes_one = action is not None and action.nargs in (None, "?")
            complete = spelled if takes_one and texts else None
        if rest := list(arguments[end + 1 :]):
            strays.append((None, rest))
        return given, strays

    def _action(self, flag: str) -> argparse.Action | None:
        return self._option_string_actions.get(self._as_declared(flag))

    def _as_declared(self, flag: str) -> str:
        """Accept hyphens for underscores, since nobody remembers which of them it is."""
        plain = "--" + flag[2:].replace("-", "_")
        return plain if flag.startswith("--") else flag

    def read_value(
        self, reading: Reading, action: argparse.Action, spelled: str, texts: Sequence[str]
    ) -> None:
        """Read the texts given for an option; ``spelled`` is where, and how it was named."""
        if action.nargs == 0 and texts:
            reading.problems.append(f"{spelled} takes no value, but is given {texts[0]!r}")
            reading.faulty.add(action.dest)
            return
        if action.nargs == 0:
            reading.values[action.dest] = action.const
            return
        if action.nargs == "?" and not texts:
            reading.values[action.dest] = action.const
            return
        if not texts or (texts == [""] and action.type in (int, float, bool)):
            reading.problems.append(f"{spelled} needs a value{_allowed(action)}")
            reading.faulty.add(action.dest)
            return
        values = []
        for text in texts:
            if action.type in (Path, file_or_id) and (problem := path_problem(text)):
                reading.problems.append(f"{spelled} is {text!r:.80}, which {problem}")
                reading.faulty.add(action.dest)
                return
            try:
                values.append(_read(text, action.type))
            except ValueError:
                wanted = _WANTED.get(action.type, "of another form")
                hint = _number_hint(text, action)
                reading.problems.append(f"{spelled} is {text!r}; it must be {wanted}{hint}")
                reading.faulty.add(action.dest)
                return
            if action.choices is not None and values[-1] not in action.choices:
                reading.problems.append(
                    f"{spelled} is {text!r}; "
                    + must_be(text, action.choices, self.meanings.get(action.dest))
                )
                reading.faulty.add(action.dest)
                return
        reading.values[action.dest] = values if action.nargs in ("+", "*") else values[0]

    # -- messages ----------------------------------------------------------------------------------

    def unknown(self, spelled: str, name: str) -> str:
        """Return the error message for an unknown option."""
        plain = name.replace("-", "_")
        names = {action.dest for action in self._actions if action.option_strings} - {"help"}
        if plain in self.other_names:
            return f"{spelled} {self.other_names[plain]}"
        if plain in names:  # with one hyphen, or as in no shell
            return f"{spelled} is not an option. Did you mean --{plain}?"
        nearest = difflib.get_close_matches(plain.lower(), names, n=3)
        if not nearest:
            called = difflib.get_close_matches(plain.lower(), self.other_names, n=1, cutoff=0.75)
            first = first_named_in(self.other_names[called[0]]) if called else None
            nearest = [first] if first in names else []
        elif difflib.SequenceMatcher(None, nearest[0], plain.lower()).ratio() > 0.9:
            nearest = nearest[:1]
        if not nearest and len(plain) > 2:
            nearest = sorted(n for n in names if f"_{plain.lower()}_" in f"_{n}_")[:3]
        if nearest:
            advice = f"Did you mean {' or '.join(f'--{n}' for n in nearest)}?"
        else:
            advice = "See --help for all options"
        return f"{spelled} is not an option. {advice}"

    def _stray(self, texts: Sequence[str], flag: str | None = None) -> str:
        """Return the error message for texts that belong to no option.

        Args:
            flag: the option before them, which has its value.
        """
        first, text = texts[0], " ".join(texts)
        problem = f"{text!r} does not belong to any option"
        name = re.split("[=:]", first.lstrip("-" + _LONG_DASHES))[0].replace("-", "_")
        if first[0:1] and first[0] in _LONG_DASHES:
            return f"{first!r} begins with a long dash. Did you mean --{name}?"
        if any(quote in text for quote in _CURLY_QUOTES):
            return (
                f"{problem}: its quotes are typographic ones. Put texts in straight quotes, \" or '"
            )
        if not text.strip() or text in ("\\", "^", "`"):
            return (
                f"{problem}. If the command has several lines, nothing may follow the \\ at the "
                "end of a line, not even a space"
            )
        names = [re.split("[=:]", text)[0].replace("-", "_") for text in texts if "=" in text]
        known = [f"--{n}" for n in names or [name] if f"--{n}" in self._option_string_actions]
        if known:
            return f"{problem}. Did you mean {', '.join(known)}?"
        if first.endswith((".yaml", ".yml")) and "--config" in self._option_string_actions:
            return f"{problem}. Did you mean --config {first}?"
        if flag is not None:
            problem += f": {flag} takes one value"
        return f"{problem}. If it is part of a text, put the text in quotes"

    def error(self, message: str) -> NoReturn:
        """Print one problem and exit with code 2."""
        self.fail([message])

    def fail(self, problems: Sequence[str]) -> NoReturn:
        """Print the problems and exit with code 2."""
        if len(problems) == 1:
            text = problems[0]
        else:
            text = "\n  ".join([f"{len(problems)} problems with the options:", *problems])
        self.exit(2, f"{self.prog}: error: {text}\n")


def nearest_choice(
    text: str, choices: Collection[str], meaning: Meaning | None = None
) -> str | None:
    """Return the choice that a text probably means."""
    plain = text.lower().strip()
    if meaning and (known := meaning(plain)) in choices:
        return known
    for name in _SYNONYMS.get(plain, ()):
        if name in choices:
            return name
    lower = {str(choice).lower(): str(choice) for choice in choices}
    close = difflib.get_close_matches(plain.replace("_", "-"), lower, n=1)
    close = close or difflib.get_close_matches(plain, lower, n=1)
    return lower[close[0]] if close else None


def must_be(text: str, choices: Iterable[Any], meaning: Meaning | None = None) -> str:
    """Return the part of an error message that lists the choices, and the nearest one."""
    nearest = nearest_choice(text, choices := list(choices), meaning)
    hint = f". Did you mean {nearest}?" if nearest else ""
    return f"it must be one of {', '.join(map(str, choices))}{hint}"


def without_hyphens(text: str) -> str:
    """Return a message with options as they are written in a file."""
    return _FLAG_IN_TEXT.sub("", text)


def _read(text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() in _TRUE:
            return True
        if text.lower() in _FALSE:
            return False
        raise ValueError
    if kind is int:
        return int(text)
    return text if kind is None else kind(text)


def _number_hint(text: str, action: argparse.Action) -> str:
    kind = float if action.type is finite else action.type
    if text in ("=", ":"):
        return f". Leave out the {'spaces around =' if text == '=' else 'colon'}"
    if kind not in (int, float):
        return ""
    if action.nargs in ("+", "*") and len(values := re.findall(r"[^\s,;]+", text)) > 1:
        return f". Separate values by spaces: {' '.join(values)}"
    if kind is float and re.fullmatch(r"-?\d+,\d+", text):
        return f". Did you mean {text.replace(',', '.')}?"
    plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.strip().rstrip(",;"))
    number = re.fullmatch(r"-?\d+(\.\d+)?(e[+-]?\d{1,2})?", plain.lower())
    if number is None or (kind is int and not float(plain).is_integer()):
        return ""
    return f". Did you mean {int(float(plain)) if kind is int else plain}?"


def _allowed(action: argparse.Action) -> str:
    return f": {', '.join(map(str, action.choices))}" if action.choices else ""


def _is_flag(text: str) -> bool:
    return _FLAG.match(text) is not None and " " not in text.partition("=")[0]
