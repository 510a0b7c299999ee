"""The config of an adapter: PEFT's, with another rank, k or alpha where a layer's path says so."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from peft import GraloraConfig as PeftGraloraConfig
from peft import PeftType
from peft.utils import CONFIG_NAME
from peft.utils.other import get_pattern_key

Value = TypeVar("Value", int, float)

#: Pattern field -> the field in whose place its values stand.
PATTERNS = {"rank_pattern": "r", "k_pattern": "gralora_k", "alpha_pattern": "alpha"}
BIAS_CHOICES = ("none", "all", "gralora_only")


@dataclass
class GraloraConfig(PeftGraloraConfig):
    """PEFT's ``GraloraConfig`` with what PEFT's ``LoraConfig`` has for single layers.

    The keys of the three mappings are regular expressions for the whole path of a layer or its end
    from a dot on, such as ``to_q``, ``attn1\\.to_[qk]`` or ``^conv_in``; the first one that matches
    counts. The scaling of a layer is its own alpha / (its own rank + hybrid_r): as in PEFT's LoRA,
    alpha does not follow the rank.

    Only :func:`inject` and ``GraloraTuner`` know these fields. PEFT's own tuner passes over them.

    Args:
        rank_pattern: path -> rank in place of ``r``.
        k_pattern: path -> k in place of ``gralora_k``.
        alpha_pattern: path -> alpha in place of ``alpha``.
        exclude_modules: layers to leave out of what ``target_modules`` names: a list of endings of
            paths, or a regular expression for the whole path.
    """

    rank_pattern: dict[str, int] = field(default_factory=dict)
    k_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    exclude_modules: list[str] | set[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in PATTERNS:
            if getattr(self, name) is None:  # so PEFT's LoRA allows it
                setattr(self, name, {})
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's. A config that has nothing that PEFT's lacks gives what PEFT's gives."""
        ours = (*PATTERNS, "exclude_modules")
        return {key: v for key, v in super().to_dict().items() if v or key not in ours}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As PEFT's, which sorts all keys, but with patterns in their order, which counts."""
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / CONFIG_NAME
        values = json.loads(path.read_text(encoding="utf-8"))
        if ordered := {key: v for key, v in self.to_dict().items() if key in PATTERNS}:
            path.write_text(json.dumps({**values, **ordered}, indent=2), encoding="utf-8")

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> GraloraConfig:
        """As PEFT's, which would make PEFT's own config of the values."""
        if kwargs.get("peft_type") == PeftType.GRALORA:
            del kwargs["peft_type"]
        return super().from_peft_type(**kwargs)


class LayerSettings(NamedTuple):
    """What a config says of one layer."""

    r: int
    k: int
    alpha: float


def layer_settings(config: PeftGraloraConfig, path: str) -> LayerSettings:
    """Return what a config, PEFT's or ours, says of the layer at ``path``."""
    return LayerSettings(*(_value(config, name, path) for name in PATTERNS))


def _value(config: PeftGraloraConfig, name: str, path: str) -> Any:
    pattern = _pattern(config, name)
    return pattern.get(get_pattern_key(pattern, path), getattr(config, PATTERNS[name]))


def _pattern(config: PeftGraloraConfig, name: str) -> dict[str, Any]:
    return getattr(config, name, None) or {}


def unused_patterns(config: PeftGraloraConfig, paths: Collection[str]) -> dict[str, list[str]]:
    """Return field -> patterns that none of the layers at ``paths`` takes its value from."""
    unused = {}
    for name in PATTERNS:
        pattern = _pattern(config, name)
        used = {get_pattern_key(pattern, path) for path in paths}
        unused[name] = [key for key in pattern if key not in used]
    return unused


def describe_unused(unused: Mapping[str, Collection[str]], paths: Collection[str]) -> list[str]:
    """Say of each of these patterns (by field) why no layer at ``paths`` takes it."""
    problems, some = [], next(iter(paths), "")
    for name, keys in unused.items():
        for key in keys:
            count = sum(get_pattern_key([key], path) == key for path in paths)
            reason = f"matches none of the {len(paths)} target layers, such as {some}"
            if count:
                reason = (
                    f"has no effect: earlier ones take all {count} layers that it matches. Put "
                    "what is for fewer layers first"
                )
            problems.append(f"{name} '{key}' {reason}.")
    return problems


def exact_pattern(values: Mapping[str, Value], paths: Collection[str]) -> dict[str, Value]:
    """Return a pattern with one key per value that gives each path its value, and no other path.

    Args:
        values: path -> value.
        paths: all paths there are. Those that differ by numbers alone and have the same value are
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
    """Make the patterns of a config, in place, say of new paths what they say of the old ones.

    Args:
        names: new path -> old path of all target layers.
    """
    for name in PATTERNS:
        if pattern := _pattern(config, name):
            keys = {new: get_pattern_key(pattern, old) for new, old in names.items()}
            values = {new: pattern[key] for new, key in keys.items() if key in pattern}
            setattr(config, name, exact_pattern(values, names))


def pattern_problem(key: object) -> str | None:
    """Say why a key of a pattern is no regular expression for paths; None if it is one."""
    try:
        re.compile(key)  # type: ignore[call-overload]
        re.compile(rf"(.*\.)?({key})$")  # as PEFT uses it: flags for the whole fail only here
    except (re.error, TypeError) as error:
        return f"not a regular expression ({error})"
    return None


def invalid_values(config: PeftGraloraConfig) -> list[str]:
    """Describe values of a config that fit no model."""
    problems = []
    if not isinstance(config.r, int) or config.r < 1:
        problems.append(
            f"`r` should be a positive integer value but the value passed is {config.r}"
        )
    if not isinstance(config.hybrid_r, int) or config.hybrid_r < 0:
        problems.append(f"`hybrid_r` should be a non-negative integer but is {config.hybrid_r}")
    if not _is_finite(config.alpha):
        problems.append(f"`alpha` should be a finite number but is {config.alpha!r}")
    if not 0.0 <= config.gralora_dropout < 1.0:
        problems.append(f"`gralora_dropout` should be in [0, 1) but is {config.gralora_dropout}")
    if config.bias not in BIAS_CHOICES:
        problems.append(f"`bias` should be one of {', '.join(BIAS_CHOICES)} but is {config.bias!r}")
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name, None)
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                problems.append(
                    f"{name} {value!r} is not a regular expression: {error}. "
                    "For the endings of paths pass a list."
                )
    return problems + [p for name in PATTERNS for p in _invalid_pattern(config, name)]


def _invalid_pattern(config: PeftGraloraConfig, name: str) -> list[str]:
    pattern = _pattern(config, name)
    if not isinstance(pattern, Mapping):
        return [f"`{name}` should be a mapping from regular expressions but is {pattern!r}"]
    problems = [f"`{name}` {key!r}: {p}" for key in pattern if (p := pattern_problem(key))]
    for key, value in pattern.items():
        if name == "alpha_pattern":
            if not _is_finite(value):
                problems.append(f"`{name}` {key!r} should give a finite number but is {value!r}")
        elif not isinstance(value, int) or value < 1:
            problems.append(f"`{name}` {key!r} should give a positive integer but is {value!r}")
    return problems


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
