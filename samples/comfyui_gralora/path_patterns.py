"""Regular expressions for paths of layers, matched in bounded time.

An adapter's file names layers by regular expressions, and files are not trusted: Python's ``re``
tries one way after another, and ``([a-z]+)+!`` keeps it busy for years. ``re`` only matches
patterns that allow few ways. An automaton matches all others. It follows every way at once
(K. Thompson, "Regular expression search algorithm", 1968), and its states are built when a path
needs them. The answers are those of ``re.fullmatch``. Patterns that an automaton cannot match, such
as back references, are refused.

The ComfyUI node in ``samples/comfyui_gralora``, which runs without this package, has a copy of this
file.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

if sys.version_info >= (3, 11):  # noqa: UP036 - ComfyUI also runs on older versions
    from re import _constants as sre  # type: ignore[attr-defined]
    from re import _parser as sre_parse  # type: ignore[attr-defined]
else:
    import sre_constants as sre
    import sre_parse

#: Maximum length of a pattern. The longest that this package writes, for every layer of a large
#: model, has some 60,000 characters.
MAX_LENGTH = 200_000
#: Maximum length of a path. Real models stay below 200 characters, but a file may name any path.
MAX_PATH = 1_000
#: Maximum cost of all patterns of one field, see :attr:`PathPattern.cost`: some thousand layers by
#: name, or a hundred patterns with two repeats.
MAX_COST = 500_000
#: Cost of a state of an automaton, in ways of ``re``.
_STATE_COST = 25
#: Maximum number of states of an automaton, with counted repeats written out.
_MAX_STATES = 5_000
#: Maximum number of states that an automaton visits for all paths together: some seconds.
_MAX_VISITS = 2_000_000
#: ``re`` matches patterns with at most this many ways. A repeat counts as ``_LENGTH`` ways: this
#: allows two repeats, or some thousand layers by name.
_MAX_WAYS = 5_000.0
_LENGTH = 64.0

_REPEATS = {sre.MAX_REPEAT, sre.MIN_REPEAT}
_CHARACTERS = {sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN}
_STARTS = {sre.AT_BEGINNING, sre.AT_BEGINNING_STRING}
_ENDS = {sre.AT_END, sre.AT_END_STRING}
_CATEGORIES = {
    sre.CATEGORY_DIGIT: r"\d",
    sre.CATEGORY_NOT_DIGIT: r"\D",
    sre.CATEGORY_SPACE: r"\s",
    sre.CATEGORY_NOT_SPACE: r"\S",
    sre.CATEGORY_WORD: r"\w",
    sre.CATEGORY_NOT_WORD: r"\W",
}
_END = object()
_KNOWN_FLAGS = re.UNICODE | re.ASCII | re.DOTALL | re.VERBOSE
_UNBOUNDED = "not matched in bounded time: write it without {}"


class PatternError(ValueError):
    """A pattern is not a regular expression, or cannot be matched in bounded time."""


class PathPattern:
    """A regular expression for paths of layers.

    Args:
        text: in the syntax of Python's ``re``.

    Attributes:
        cost: Maximum cost of a match, in ways of ``re`` through a pattern.

    Raises:
        PatternError: with the reason. The methods raise it too, for a pattern that needs too many
            states, and for a path that is too long.
    """

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise PatternError("not a regular expression (it is not a string)")
        if len(text) > MAX_LENGTH:
            raise PatternError(f"too long: {len(text)} characters, but {MAX_LENGTH} are allowed")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = sre_parse.parse(text)
            ways = _ways(tree, _END)
            if ways <= _MAX_WAYS:
                self._matches, self.cost = _by_re(text), int(ways)
            else:
                automaton = _Automaton(tree)
                self._matches, self.cost = automaton.matches, automaton.size * _STATE_COST
        except (re.error, OverflowError) as error:
            raise PatternError(f"not a regular expression ({error})") from error
        except RecursionError:
            raise PatternError("nested too deeply") from None

    def matches(self, path: str) -> bool:
        """Whether the pattern matches all of ``path``."""
        _check_length(path)
        return self._matches(path, 0)

    def matches_end(self, path: str) -> bool:
        """Whether it matches ``path`` or its end after a dot; ``^`` is the start of the path.

        As PEFT's ``get_pattern_key``: ``re.match(rf"(.*\\.)?({pattern})$", path)``.
        """
        _check_length(path)
        starts = [0, *(n + 1 for n, character in enumerate(path) if character == ".")]
        return any(self._matches(path, start) for start in starts)


@lru_cache(maxsize=4096)
def path_pattern(text: str) -> PathPattern:
    """Return the pattern of this text; it is cached for the next call."""
    return PathPattern(text)


def check_cost(patterns: Iterable[str]) -> None:
    """Refuse patterns that each take bounded time, but too much time together.

    Invalid patterns are skipped.

    Raises:
        PatternError: with the number of the first pattern above the limit.
    """
    cost = 0
    for number, text in enumerate(patterns, 1):
        with suppress(PatternError):
            cost += path_pattern(text).cost
        if cost > MAX_COST:
            raise PatternError(
                f"too slow to match together from number {number} on: write fewer patterns, or "
                "patterns with fewer repeats"
            )


def _check_length(path: str) -> None:
    if len(path) > MAX_PATH:
        raise PatternError(
            f"not matched against a name of {len(path)} characters, {path[:40]!r}...: at most "
            f"{MAX_PATH} are allowed"
        )


def _by_re(text: str) -> Callable[[str, int], bool]:
    compiled = re.compile(text)
    return lambda path, start: compiled.fullmatch(path, start) is not None


def _ways(tree: Any, following: Any) -> float:
    """Return in how many ways ``re`` may go through a pattern; infinite if there is no bound.

    Args:
        following: the part after ``tree``: the code of a character, ``_END``, or None for anything
            else. A repeat that cannot match the part after it has one way.
    """
    ways, parts = 1.0, list(tree)
    for n, (op, value) in enumerate(parts):
        after = following
        if n + 1 < len(parts):
            after = parts[n + 1][1] if parts[n + 1][0] is sre.LITERAL else None
        if op in _REPEATS:
            low, high, body = value
            if len(body) == 1 and body[0][0] in _CHARACTERS:
                if low != high and not _stops_at(body[0], after):
                    ways *= min(float(high) - low + 1, _LENGTH)
            elif high == 1:
                ways *= 1 + _ways(body, after)
            else:
                return math.inf
        elif op is sre.BRANCH:
            ways *= sum(_ways(alternative, after) for alternative in value[1])
        elif op is sre.SUBPATTERN:
            ways *= _ways(value[3], after)
        elif op in (sre.ASSERT, sre.ASSERT_NOT):
            ways *= 1 + _ways(value[1], None)
        elif op not in _CHARACTERS and op is not sre.AT:
            return math.inf
        if ways > _MAX_WAYS:
            return math.inf
    return ways


def _stops_at(part: Any, following: Any) -> bool:
    """Whether a repeat cannot match the character after it, so that there is only one way."""
    if following is _END:
        return True
    op, value = part
    if following is None:
        return False
    if op is sre.LITERAL:
        return bool(value != following)
    return op is sre.IN and value == [(sre.CATEGORY, sre.CATEGORY_DIGIT)] and following == ord(".")


class _Automaton:
    """States are numbers. ``_edges[s]`` is a test and the next state, or None and all of them."""

    def __init__(self, tree: Any) -> None:
        self._flags = tree.state.flags
        if self._flags & ~_KNOWN_FLAGS:
            raise PatternError(_UNBOUNDED.format("flags such as (?i)"))
        self._edges: list[tuple[Any, Any]] = [("match", None)]
        self._visits = 0
        self._start = self._sequence(tree, 0)
        # both are cached, so that matching the same path again costs nothing
        self._starts: dict[tuple[bool, bool], frozenset[int]] = {}
        self._moves: dict[tuple[frozenset[int], str, bool], frozenset[int]] = {}

    @property
    def size(self) -> int:
        """The number of states."""
        return len(self._edges)

    def matches(self, path: str, start: int) -> bool:
        """Whether the pattern matches all of ``path`` from ``start`` on."""
        edges = (start == 0, start == len(path))
        if edges not in self._starts:
            self._starts[edges] = self._closed([self._start], *edges)
        states = self._starts[edges]
        for position in range(start, len(path)):
            key = (states, path[position], position == len(path) - 1)
            if key not in self._moves:
                self._moves[key] = self._moved(*key)
            states = self._moves[key]
            if not states:
                return False
        return 0 in states

    def _moved(self, states: frozenset[int], character: str, is_end: bool) -> frozenset[int]:
        self._count(len(states))
        tests = [self._edges[state] for state in states if callable(self._edges[state][0])]
        after = [following for test, following in tests if test(character)]
        return self._closed(after, is_start=False, is_end=is_end)

    def _closed(self, states: list[int], is_start: bool, is_end: bool) -> frozenset[int]:
        """Return these states and all that can be reached from them without a character."""
        reached: set[int] = set()
        while states:
            state = states.pop()
            if state in reached:
                continue
            reached.add(state)
            kind, following = self._edges[state]
            if kind is None or (kind == "start" and is_start) or (kind == "end" and is_end):
                states.extend(following)
        self._count(len(reached))
        return frozenset(reached)

    def _count(self, visits: int) -> None:
        self._visits += visits
        if self._visits > _MAX_VISITS:
            raise PatternError("too slow to match: write it with fewer repeats")

    # -- building, from the end to the start: each part gets the state that follows it -------------

    def _state(self, kind: Any, following: Any) -> int:
        if len(self._edges) >= _MAX_STATES:
            raise PatternError(f"too large: it has more than {_MAX_STATES} states")
        self._edges.append((kind, following))
        return len(self._edges) - 1

    def _sequence(self, tree: Any, following: int) -> int:
        self._count(10)  # a repeat of nothing adds no state, but takes time
        for op, value in reversed(list(tree)):
            following = self._part(op, value, following)
        return following

    def _part(self, op: Any, value: Any, following: int) -> int:
        if op in _CHARACTERS:
            return self._state(self._test(op, value), following)
        if op is sre.SUBPATTERN:
            if value[1] or value[2]:
                raise PatternError(_UNBOUNDED.format("flags of groups"))
            return self._sequence(value[3], following)
        if op is sre.BRANCH:
            return self._state(None, [self._sequence(part, following) for part in value[1]])
        if op in _REPEATS:
            low, high, body = value
            return self._repeat(low, high, body, following)
        if op is sre.AT and value in _STARTS:
            return self._state("start", [following])
        if op is sre.AT and value in _ENDS:
            return self._state("end", [following])
        raise PatternError(
            _UNBOUNDED.format("back references, look-around, word boundaries and atomic groups")
        )

    def _repeat(self, low: int, high: int, body: Any, following: int) -> int:
        if high == sre.MAXREPEAT:
            loop = self._state(None, [following])
            self._edges[loop][1].append(self._sequence(body, loop))
            following = loop
        else:
            end = following
            for _ in range(high - low):
                following = self._state(None, [end, self._sequence(body, following)])
        for _ in range(low):
            following = self._sequence(body, following)
        return following

    def _test(self, op: Any, value: Any) -> Callable[[str], bool]:
        if op is sre.LITERAL:
            return lambda character: ord(character) == value
        if op is sre.NOT_LITERAL:
            return lambda character: ord(character) != value
        if op is sre.ANY:
            is_all = bool(self._flags & re.DOTALL)
            return lambda character: is_all or character != "\n"
        negate = value[0][0] is sre.NEGATE
        tests = list(self._class_tests(value[1:] if negate else value))
        return lambda character: any(test(character) for test in tests) != negate

    def _class_tests(self, items: Any) -> Iterator[Callable[[str], bool]]:
        for op, value in items:
            if op is sre.LITERAL:
                yield partial(_is_between, value, value)
            elif op is sre.RANGE:
                yield partial(_is_between, *value)
            elif op is sre.CATEGORY:
                category = re.compile(_CATEGORIES[value], self._flags & re.ASCII)
                yield partial(_is_of, category)
            else:
                raise PatternError(f"not supported: it has an unknown class of characters, {op}")


def _is_between(first: int, last: int, character: str) -> bool:
    return first <= ord(character) <= last


def _is_of(category: re.Pattern[str], character: str) -> bool:
    return category.match(character) is not None
