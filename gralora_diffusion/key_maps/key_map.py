"""Rules between the names of two layouts, and the map of tensors that follows from them.

The *diffusers* layout is that of a model's ``state_dict``. The *original* layout is that of the
single files that the model was first published in. An original tensor consists of whole rows (first
axis) of diffusers tensors. Mostly there is one for one, but queries, keys and values may be one
tensor, and shift and scale may be in the other order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

Shape = tuple[int, ...]


class KeyMapError(ValueError):
    """A layout does not contain a tensor, or cannot join tensors."""


@dataclass(frozen=True)
class Rule:
    """The names of a part of a model in both layouts.

    Names are prefixes of keys, up to a dot or the end; ``*`` stands for a number.

    Args:
        names: names in diffusers. Several tensors are joined along the rows in this order.
        original: name in the original.
        sizes: number of rows of each of several tensors, in a common unit.
        halves_swapped: the two halves of the rows are in the other order. This only applies to
            layers with twice as many outputs as inputs. Layers with the same name in other blocks
            have the same order.
        transposed: the original is the transpose.
        convolution: the matrix is a 1 x 1 convolution in the original.
    """

    names: tuple[str, ...]
    original: str
    sizes: tuple[int, ...] = (1,)
    halves_swapped: bool = False
    transposed: bool = False
    convolution: bool = False

    @cached_property
    def patterns(self) -> list[re.Pattern[str]]:
        return [_pattern(name) for name in self.names]

    @cached_property
    def original_pattern(self) -> re.Pattern[str]:
        return _pattern(self.original)


def rename(name: str, original: str) -> Rule:
    """Return the rule for a part that only differs in its name."""
    return Rule((name,), original)


def join(names: Sequence[str], original: str, sizes: Sequence[int] = ()) -> Rule:
    """Return the rule for layers that are joined in the original; by default of equal sizes."""
    return Rule(tuple(names), original, tuple(sizes) or (1,) * len(names))


def swap(name: str, original: str) -> Rule:
    """Return the rule for a layer whose two halves are in the other order in the original."""
    return Rule((name,), original, halves_swapped=True)


def _pattern(name: str) -> re.Pattern[str]:
    numbered = re.escape(name).replace(re.escape("*"), r"(\d+)")
    return re.compile(rf"{numbered}(?P<rest>\..*|)$")


def _filled(name: str, match: re.Match[str]) -> str:
    numbers = iter(match.groups())  # the last group, the rest of the key, is not reached
    return re.sub(r"\*", lambda _: next(numbers), name) + match["rest"]


@dataclass(frozen=True)
class Part:
    """Rows ``start`` to ``stop`` of a diffusers tensor, or of its transpose."""

    key: str
    start: int
    stop: int
    transposed: bool = False


@dataclass(frozen=True)
class OriginalTensor:
    """A tensor of the original layout: its parts, joined along the rows."""

    key: str
    shape: Shape
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Location:
    """The place of a diffusers name in the original: part number ``part`` of ``original``."""

    original: str
    part: int
    rule: Rule


@dataclass(frozen=True)
class KeyMap:
    """How one component of a pipeline is written in an original file.

    Args:
        prefixes: prefixes that its keys may have in the file; the first one is written.
        rules: the rules, or a function that returns them for the keys of a model. Its second
            argument says whether these are the original's keys (without prefix).
        canonical: converts a diffusers key of a file or an adapter to the form of the rules.
        ignored: regular expression for diffusers keys that the original does not contain.
        fits: whether a model with these tensors is written in this layout, if there are several.
        copies: original key and diffusers key of tensors that are written twice.
        comfyui_name: ComfyUI's name of a text encoder in the keys of LoRA files.
    """

    prefixes: tuple[str, ...]
    rules: Sequence[Rule] | Callable[[Iterable[str], bool], Sequence[Rule]]
    canonical: Callable[[str], str] = str
    ignored: str = r"(?!)"
    fits: Callable[[Mapping[str, Shape]], bool] = lambda shapes: True
    comfyui_name: str | None = None
    copies: tuple[tuple[str, str], ...] = ()

    def rules_of(self, keys: Iterable[str], original: bool = False) -> Sequence[Rule]:
        """Return the rules for a model that has these keys."""
        return self.rules(keys, original) if callable(self.rules) else self.rules

    def lay_out(self, shapes: Mapping[str, Shape]) -> list[OriginalTensor]:
        """Return the original's tensors, without prefix, for the tensors of a diffusers model.

        Args:
            shapes: shapes by the model's own keys.

        Raises:
            KeyMapError: the layout does not contain a tensor, or a part of a joined tensor is
                missing. The message names all of them.
        """
        own = {self.canonical(key): key for key in shapes}
        canonical = {name: shapes[key] for name, key in own.items()}
        rules, problems = self.rules_of(canonical), []
        found: dict[str, dict[int, str]] = {}
        of_rule: dict[str, Rule] = {}
        for name in canonical:
            if re.fullmatch(self.ignored, name):
                continue
            where = locate(name, rules)
            if where is None:
                problems.append(f"the original layout does not contain {own[name]}")
                continue
            found.setdefault(where.original, {})[where.part] = name
            of_rule[where.original] = where.rule
        tensors = []
        for key, parts in found.items():
            rule = of_rule[key]
            if len(parts) < len(rule.names):
                problems.append(f"{key} needs {len(rule.names)} parts, but there are only {parts}")
                continue
            joined = [parts[number] for number in range(len(parts))]
            rows = sum(canonical[name][0] for name in joined)
            rest = canonical[joined[0]][1:]
            if rule.transposed:
                rows, rest = rest[0], (rows,)
            if rule.convolution and len(rest) == 1:
                rest = (*rest, 1, 1)
            cut = _cut(rule, joined, rows, _is_double(joined[0], canonical))
            tensors.append(
                OriginalTensor(
                    key,
                    (rows, *rest),
                    tuple(Part(own[p.key], p.start, p.stop, p.transposed) for p in cut),
                )
            )
        if problems:
            raise KeyMapError("\n".join(problems))
        for key, name in self.copies:
            if name in canonical:
                shape = canonical[name]
                tensors.append(OriginalTensor(key, shape, (Part(own[name], 0, shape[0]),)))
        return tensors

    def read(self, shapes: Mapping[str, Shape]) -> list[OriginalTensor]:
        """Return the tensors of an original file with diffusers' (canonical) names of their parts.

        Args:
            shapes: shapes by original key, without the prefix. Keys without a rule are ignored.
        """
        rules, tensors = self.rules_of(shapes, original=True), []
        for key, shape in shapes.items():
            for rule in rules:
                if match := rule.original_pattern.match(key):
                    names = [_filled(name, match) for name in rule.names]
                    cut = _cut(rule, names, shape[0] if shape else 0, _is_double(key, shapes))
                    tensors.append(OriginalTensor(key, shape, tuple(cut)))
                    break
        return tensors

    def begins(self, keys: Iterable[str]) -> str | None:
        """Return the longest prefix that some of these keys have, if any."""
        keys = list(keys)
        found = [p for p in self.prefixes if any(key.startswith(p) for key in keys)]
        return max(found, key=len, default=None)


def locate(name: str, rules: Sequence[Rule]) -> Location | None:
    """Find the place of a canonical diffusers key, or of a module's path. The first rule counts."""
    for rule in rules:
        for part, pattern in enumerate(rule.patterns):
            if match := pattern.match(name):
                return Location(_filled(rule.original, match), part, rule)
    return None


def _cut(rule: Rule, names: Sequence[str], rows: int, double: bool) -> list[Part]:
    """Return the parts of a tensor with this number of rows."""
    if rule.halves_swapped and double:
        return [Part(names[0], rows // 2, rows), Part(names[0], 0, rows // 2)]
    unit, left = divmod(rows, sum(rule.sizes))
    if left:
        raise KeyMapError(f"{rows} rows cannot be cut into {', '.join(names)}")
    return [
        Part(name, 0, size * unit, rule.transposed)
        for name, size in zip(names, rule.sizes, strict=True)
    ]


def _is_double(key: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether the layer of this weight or bias has twice as many outputs as inputs."""
    weight = shapes.get(f"{key.rpartition('.')[0]}.weight", ())
    return len(weight) == 2 and weight[0] == 2 * weight[1]
