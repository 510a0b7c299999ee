"""Rules between the names of two layouts, and the map of tensors that follows from them.

The *diffusers* layout is that of a model's ``state_dict``, the *original* one that of the single
files that the model was first published in. A tensor of the original is made of whole rows (first
axis) of diffusers tensors: mostly one to one, but queries, keys and values may be one tensor, and
shift and scale may come in the other order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

Shape = tuple[int, ...]


class KeyMapError(ValueError):
    """Tensors that a layout has no place for, or that do not belong together there."""


@dataclass(frozen=True)
class Rule:
    """What a part of a model is called in both layouts.

    Names are beginnings of keys, up to a dot or the end; ``*`` stands for a number.

    Args:
        names: in diffusers. Several are joined in this order, one after another along the rows.
        original: in the original.
        sizes: how many rows each of several has, in units that they share.
        halves_swapped: the two halves of the rows come in the other order. Holds for a layer with
            twice as many outputs as inputs only: of the others, which have the same name in other
            blocks, the order is the same.
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
    """Return the rule for what differs in its name alone."""
    return Rule((name,), original)


def join(names: Sequence[str], original: str, sizes: Sequence[int] = ()) -> Rule:
    """Return the rule for layers that are one in the original; of equal sizes unless told."""
    return Rule(tuple(names), original, tuple(sizes) or (1,) * len(names))


def swap(name: str, original: str) -> Rule:
    """Return the rule for a layer whose two halves come in the other order in the original."""
    return Rule((name,), original, halves_swapped=True)


def _pattern(name: str) -> re.Pattern[str]:
    numbered = re.escape(name).replace(re.escape("*"), r"(\d+)")
    return re.compile(rf"{numbered}(?P<rest>\..*|)$")


def _filled(name: str, match: re.Match[str]) -> str:
    numbers = iter(match.groups())  # the rest, last among them, is not reached
    return re.sub(r"\*", lambda _: next(numbers), name) + match["rest"]


@dataclass(frozen=True)
class Part:
    """Rows ``start`` to ``stop`` of a diffusers tensor (of its transpose, if so)."""

    key: str
    start: int
    stop: int
    transposed: bool = False


@dataclass(frozen=True)
class OriginalTensor:
    """A tensor of the original layout: its parts, one after another along the rows."""

    key: str
    shape: Shape
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Location:
    """Where a diffusers name lies in the original: part number ``part`` of ``original``."""

    original: str
    part: int
    rule: Rule


@dataclass(frozen=True)
class KeyMap:
    """How one component of a pipeline is written in an original file.

    Args:
        prefixes: how its keys may begin there; the first one is written.
        rules: either the rules, or a function that makes them of the keys of a model, whose second
            argument says whether these are the original's (prefix taken off).
        canonical: brings a diffusers key, of a file or of an adapter, into the form of the rules.
        passed_over: diffusers keys that the original does without, as a regular expression.
        fits: whether a model with these tensors is written in this layout, where there are several.
        copies: original key and diffusers key of what is written twice.
        comfyui_name: what ComfyUI calls a text encoder in the keys of LoRA files.
    """

    prefixes: tuple[str, ...]
    rules: Sequence[Rule] | Callable[[Iterable[str], bool], Sequence[Rule]]
    canonical: Callable[[str], str] = str
    passed_over: str = r"(?!)"
    fits: Callable[[Mapping[str, Shape]], bool] = lambda shapes: True
    comfyui_name: str | None = None
    copies: tuple[tuple[str, str], ...] = ()

    def rules_of(self, keys: Iterable[str], original: bool = False) -> Sequence[Rule]:
        """Return the rules for a model that has these keys."""
        return self.rules(keys, original) if callable(self.rules) else self.rules

    def lay_out(self, shapes: Mapping[str, Shape]) -> list[OriginalTensor]:
        """Return the original's tensors, without prefix, for the tensors of a diffusers model.

        Args:
            shapes: by the model's own keys.

        Raises:
            LayoutError: a tensor has no place, or a joined one lacks a part. All are named.
        """
        own = {self.canonical(key): key for key in shapes}
        canonical = {name: shapes[key] for name, key in own.items()}
        rules, problems = self.rules_of(canonical), []
        found: dict[str, dict[int, str]] = {}
        of_rule: dict[str, Rule] = {}
        for name in canonical:
            if re.fullmatch(self.passed_over, name):
                continue
            where = locate(name, rules)
            if where is None:
                problems.append(f"no place for {own[name]}")
                continue
            found.setdefault(where.original, {})[where.part] = name
            of_rule[where.original] = where.rule
        tensors = []
        for key, parts in found.items():
            rule = of_rule[key]
            if len(parts) < len(rule.names):
                problems.append(f"{key} needs {len(rule.names)} parts, there are only {parts}")
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
        """Return what the tensors of an original file are in diffusers' (canonical) names.

        Args:
            shapes: by original key, without the prefix. What no rule knows is passed over.
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
        """Return the longest prefix with which some of these keys begin, if any."""
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
    """The parts that a tensor of so many rows is made of."""
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
