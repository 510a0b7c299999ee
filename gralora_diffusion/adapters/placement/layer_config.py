"""Settings of single layers in a config, and values invalid for any model; without PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from peft import GraloraConfig as PeftGraloraConfig

from .path_patterns import PatternError, check_cost, path_pattern

Value = TypeVar("Value", int, float)

#: Pattern field -> the field that its values replace.
PATTERNS = {"rank_pattern": "r", "k_pattern": "gralora_k", "alpha_pattern": "alpha"}
BIAS_CHOICES = ("none", "all", "gralora_only")


def pattern_key(patterns: Iterable[str], path: str) -> str:
    """Return the first regular expression that matches the path or its end, or else the path.

    It does the same as PEFT's ``get_pattern_key``, which takes seconds to import.
    """
    return next((key for key in patterns if path_pattern(key).matches_end(path)), path)


class LayerSettings(NamedTuple):
    """Rank, k and alpha of one layer."""

    r: int
    k: int
    alpha: float


def layer_settings(config: PeftGraloraConfig, path: str) -> LayerSettings:
    """Return the settings that a config of PEFT or of this package gives the layer at ``path``."""
    return LayerSettings(*(_value(config, name, path) for name in PATTERNS))


def _value(config: PeftGraloraConfig, name: str, path: str) -> Any:
    pattern = _pattern(config, name)
    return pattern.get(pattern_key(pattern, path), getattr(config, PATTERNS[name]))


def _pattern(config: PeftGraloraConfig, name: str) -> dict[str, Any]:
    return getattr(config, name, None) or {}


def unused_patterns(config: PeftGraloraConfig, paths: Collection[str]) -> dict[str, list[str]]:
    """Return field -> patterns that do not set the value of any layer at ``paths``."""
    unused = {}
    for name in PATTERNS:
        pattern = _pattern(config, name)
        used = {pattern_key(pattern, path) for path in paths}
        unused[name] = [key for key in pattern if key not in used]
    return unused


def describe_unused(unused: Mapping[str, Collection[str]], paths: Collection[str]) -> list[str]:
    """Describe why each of these patterns (by field) has no effect on the layers at ``paths``."""
    problems, some = [], next(iter(paths), "")
    for name, keys in unused.items():
        for key in keys:
            count = sum(pattern_key([key], path) == key for path in paths)
            reason = f"matches none of the {len(paths)} target layers, such as {some}"
            if count:
                reason = (
                    f"has no effect: earlier patterns match all {count} layers that it matches. "
                    "Put the more specific patterns first"
                )
            problems.append(f"{name} '{key}' {reason}.")
    return problems


def exact_pattern(values: Mapping[str, Value], paths: Collection[str]) -> dict[str, Value]:
    """Return a pattern with one key per value that sets the values of exactly these paths.

    Args:
        values: path -> value.
        paths: all existing paths. Paths with the same value that differ only in numbers are
            written as one, with ``\\d+``.
    """
    shapes = {path: re.sub(r"\d+", r"\\d+", re.escape(path)) for path in paths}
    shared: dict[str, set[Value | None]] = {}
    for path, shape in shapes.items():
        shared.setdefault(shape, set()).add(values.get(path))
    texts: dict[Value, dict[str, None]] = {}
    for path, value in values.items():
        same = len(shared[shapes[path]]) == 1
        texts.setdefault(value, {})[shapes[path] if same else re.escape(path)] = None
    return {
        f"^{next(iter(t))}" if len(t) == 1 else f"^(?:{'|'.join(t)})": value
        for value, t in texts.items()
    }


def rename_layers(config: PeftGraloraConfig, names: Mapping[str, str]) -> None:
    """Rewrite a config's patterns in place, so that new paths get the values of the old ones.

    Args:
        names: new path -> old path of all target layers.
    """
    for name in PATTERNS:
        if pattern := _pattern(config, name):
            keys = {new: pattern_key(pattern, old) for new, old in names.items()}
            values = {new: pattern[key] for new, key in keys.items() if key in pattern}
            setattr(config, name, exact_pattern(values, names))


def pattern_problem(key: object) -> str | None:
    """Return why a key of a pattern is not a regular expression for paths; None if it is."""
    try:
        path_pattern(key)
        re.compile(rf"(.*\.)?({key})$")  # PEFT's form, in which global flags are errors
    except PatternError as error:
        return str(error)
    except (re.error, TypeError) as error:
        return f"not a regular expression ({error})"
    return None


def patterns_problem(patterns: Iterable[str]) -> str | None:
    """Return why the patterns together take too long to match; None if they do not."""
    try:
        check_cost(patterns)
    except PatternError as error:
        return str(error)
    return None


def mistyped_values(values: Mapping[str, Any]) -> list[str]:
    """Describe fields of a config whose values do not have the types that PEFT declares.

    PEFT does not check them, and compares, iterates or compiles them later.
    """
    return [
        f"`{name}` should be {_TYPES[name][0]} but is {value!r:.80}"
        for name, value in values.items()
        if name in _TYPES and not _TYPES[name][1](value)
    ]


def invalid_values(config: PeftGraloraConfig) -> list[str]:
    """Describe values of a config that are invalid for any model."""
    if problems := mistyped_values(vars(config)):
        return problems
    if config.gralora_k < 1:
        problems.append(f"`gralora_k` should be a positive integer but is {config.gralora_k}")
    if config.r < 1:
        problems.append(
            f"`r` should be a positive integer value but the value passed is {config.r}"
        )
    if config.hybrid_r < 0:
        problems.append(f"`hybrid_r` should be a non-negative integer but is {config.hybrid_r}")
    if not is_finite_number(config.alpha):
        problems.append(f"`alpha` should be a finite number but is {config.alpha!r}")
    if not 0.0 <= config.gralora_dropout < 1.0:
        problems.append(f"`gralora_dropout` should be in [0, 1) but is {config.gralora_dropout}")
    if config.bias not in BIAS_CHOICES:
        problems.append(f"`bias` should be one of {', '.join(BIAS_CHOICES)} but is {config.bias!r}")
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name, None)
        if isinstance(value, str):
            try:
                path_pattern(value)
            except PatternError as error:
                problems.append(
                    f"{name} {value!r:.200} is {error}. To match endings of paths, pass a list."
                )
    return problems + [p for name in PATTERNS for p in _invalid_pattern(config, name)]


def _invalid_pattern(config: PeftGraloraConfig, name: str) -> list[str]:
    pattern = _pattern(config, name)
    if not isinstance(pattern, Mapping):
        return [f"`{name}` should be a mapping from regular expressions but is {pattern!r}"]
    if problem := patterns_problem(pattern):  # before the time is spent
        return [f"`{name}` is {problem}"]
    problems = [f"`{name}` {key!r:.200}: {p}" for key in pattern if (p := pattern_problem(key))]
    for key, value in pattern.items():
        if name == "alpha_pattern":
            if not is_finite_number(value):
                problems.append(f"`{name}` {key!r} should give a finite number but is {value!r}")
        elif not is_integer(value) or value < 1:
            problems.append(f"`{name}` {key!r} should give a positive integer but is {value!r}")
    return problems


def is_integer(value: object) -> bool:
    """Whether a value from JSON is an integer; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite_number(value: object) -> bool:
    """Whether a value from JSON is a finite number; true and false are not."""
    try:
        return (is_integer(value) or isinstance(value, float)) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer that is too large for a float
        return False


def check_numbers(rank: int, k: int, hybrid_rank: int, alpha: float | None) -> None:
    """Raise ValueError with every problem of a new adapter's numbers."""
    problems = []
    if k < 1 or rank < 1 or rank % k:
        problems.append(f"rank {rank} should be a multiple of k, which is {k}")
    if hybrid_rank < 0:
        problems.append(f"hybrid_rank should not be negative but is {hybrid_rank}")
    if alpha is not None and not (math.isfinite(alpha) and alpha):
        problems.append(f"alpha should be a number other than zero but is {alpha}")
    if problems:
        raise ValueError("; ".join(problems))


def _is_optional_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_list_of(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, (list, tuple, set)) and all(map(fits, value))


def _are_names(value: object) -> bool:
    return value is None or isinstance(value, str) or _is_list_of(value, _is_text)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_plain_value(value: object) -> bool:
    return value is None or isinstance(value, (str, bool, int, float))


def _is_plain_name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.-]+", value) is not None


_INTEGER = ("an integer", is_integer)
_NUMBER = ("a finite number", is_finite_number)
_BOOLEAN = ("true or false", lambda value: isinstance(value, bool))
_OPTIONAL_TEXT = ("a string or nothing", _is_optional_text)
_NAMES = ("a list of strings, a string or nothing", _are_names)
#: Field -> a description of its type, and a test whether a value has it.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": _INTEGER,
    "hybrid_r": _INTEGER,
    "gralora_k": _INTEGER,
    "alpha": _NUMBER,
    "gralora_dropout": _NUMBER,
    "fan_in_fan_out": _BOOLEAN,
    "inference_mode": _BOOLEAN,
    "init_weights": _BOOLEAN,
    "bias": ("a string", _is_text),
    "base_model_name_or_path": _OPTIONAL_TEXT,
    "revision": _OPTIONAL_TEXT,
    "peft_version": _OPTIONAL_TEXT,
    "task_type": _OPTIONAL_TEXT,
    # what PEFT writes of a model that it does not know
    "auto_mapping": (
        "a mapping of plain values or nothing",
        lambda value: (
            value is None
            or (isinstance(value, Mapping) and all(map(_is_plain_value, value.values())))
        ),
    ),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    # PEFT puts both into regular expressions of its own
    "modules_to_save": (
        "a list of names of modules or nothing",
        lambda value: value is None or _is_list_of(value, _is_plain_name),
    ),
    "layers_pattern": (
        "a name, a list of names or nothing",
        lambda value: (
            value is None
            or value == ""
            or _is_plain_name(value)
            or _is_list_of(value, _is_plain_name)
        ),
    ),
    "layers_to_transform": (
        "an integer, a list of integers or nothing",
        lambda value: value is None or is_integer(value) or _is_list_of(value, is_integer),
    ),
}
