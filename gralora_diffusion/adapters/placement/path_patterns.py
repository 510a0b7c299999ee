"""Regular expressions for paths of layers, matched in bounded time.

An adapter's file names layers by regular expressions, and a file is not to be trusted: Python's
``re`` tries one way after another, and ``([a-z]+)+!`` keeps it busy for years. Patterns that can be
gone through in few ways are left to ``re``. All others are matched by an automaton that
follows every way at once (K. Thompson, "Regular expression search algorithm", 1968), built state by
state as paths ask for it. The answers are those of ``re.fullmatch``. What an automaton cannot do,
such as back references, is refused.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache, partial
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser as sre_parse  # type: ignore[attr-defined]
from typing import Any

#: Characters of a pattern. The longest that this package writes, for every layer of a large model,
#: has some 60,000.
MAX_LENGTH = 200_000
#: Characters of a path. Those of real models have fewer than 200, but a file may name any.
MAX_PATH = 1_000
#: Cost of all patterns of one field, see :attr:`PathPattern.cost`: some thousand layers by name, or
#: a hundred patterns of two repeats.
MAX_COST = 500_000
#: Cost of a state of an automaton, in ways of ``re``.
_STATE_COST = 25
#: States of an automaton, counted repeats written out.
_MAX_STATES = 5_000
#: States that an automaton may visit for all paths together: some seconds.
_MAX_VISITS = 2_000_000
#: Ways of going through a pattern up to which ``re`` is left to it, where a repeat counts as
#: ``_LENGTH`` ways: two repeats, or some thousand layers by name.
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
    """A pattern is no regular expression, or none that can be matched in bounded time."""


class PathPattern:
    """A regular expression for paths of layers.

    Args:
        text: as Python's ``re`` takes it.

    Attributes:
        cost: What a match may cost, in ways that ``re`` goes through a pattern.

    Raises:
        PatternError: with the reason. The methods raise it too, for a pattern that turns out to
            take too many states, and for a path that is too long.
    """

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise PatternError("not a regular expression (it is not a text)")
        if len(text) > MAX_LENGTH:
            raise PatternError(f"too long: {len(text)} characters, and {MAX_LENGTH} are allowed")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = sre_parse.parse(text)
            loaders = _ways(tree, _END)
            if loaders <= _MAX_WAYS:
                self._matches, self.cost = _by_re(text), int(loaders)
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
        """Whether it matches ``path`` or what follows one of its dots; ``^`` is the path's start.

        As PEFT's ``get_pattern_key``: ``re.match(rf"(.*\\.)?({pattern})$", path)``.
        """
        _check_length(path)
        starts = [0, *(n + 1 for n, character in enumerate(path) if character == ".")]
        return any(self._matches(path, start) for start in starts)


@lru_cache(maxsize=4096)
def path_pattern(text: str) -> PathPattern:
    """Return the pattern of this text, which is kept for the next call."""
    return PathPattern(text)


def check_cost(patterns: Iterable[str]) -> None:
    """Refuse patterns that take bounded time each, but too much together.

    Those that are not valid by themselves are passed over.

    Raises:
        PatternError: with the number of the first pattern that is too much.
    """
    cost = 0
    for number, text in enumerate(patterns, 1):
        with suppress(PatternError):
            cost += path_pattern(text).cost
        if cost > MAX_COST:
            raise PatternError(
                f"too slow to match together from the {number}. on: write fewer patterns, or "
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
    """In how many ways ``re`` may go through a pattern; infinite if that grows without bound.

    Args:
        following: what comes after ``tree``: the code of a character, ``_END``, or None for
            anything else. A repeat that cannot take what follows has one way.
    """
    loaders, parts = 1.0, list(tree)
    for n, (op, value) in enumerate(parts):
        after = following
        if n + 1 < len(parts):
            after = parts[n + 1][1] if parts[n + 1][0] is sre.LITERAL else None
        if op in _REPEATS:
            low, high, body = value
            if len(body) == 1 and body[0][0] in _CHARACTERS:
                if low != high and not _stops_at(body[0], after):
                    loaders *= min(float(high) - low + 1, _LENGTH)
            elif high == 1:
                loaders *= 1 + _ways(body, after)
            else:
                return math.inf
        elif op is sre.BRANCH:
            loaders *= sum(_ways(alternative, after) for alternative in value[1])
        elif op is sre.SUBPATTERN:
            loaders *= _ways(value[3], after)
        elif op in (sre.ASSERT, sre.ASSERT_NOT):
            loaders *= 1 + _ways(value[1], None)
        elif op not in _CHARACTERS and op is not sre.AT:
            return math.inf
        if loaders > _MAX_WAYS:
            return math.inf
    return loaders


def _stops_at(part: Any, following: Any) -> bool:
    """Whether a repeated character cannot be the one that follows, so that there is no choice."""
    if following is _END:
        return True
    op, value = part
    if following is None:
        return False
    if op is sre.LITERAL:
        return bool(value != following)
    return op is sre.IN and value == [(sre.CATEGORY, sre.CATEGORY_DIGIT)] and following == ord(".")


class _Automaton:
    """States are numbers. ``_edges[s]``: a test and the next state; or None and all next states."""

    def __init__(self, tree: Any) -> None:
        self._flags = tree.state.flags
        if self._flags & ~_KNOWN_FLAGS:
            raise PatternError(_UNBOUNDED.format("flags such as (?i)"))
        self._edges: list[tuple[Any, Any]] = [("match", None)]
        self._visits = 0
        self._start = self._sequence(tree, 0)
        # both are kept, so that matching again is free however often a pattern is used
        self._starts: dict[tuple[bool, bool], frozenset[int]] = {}
        self._moves: dict[tuple[frozenset[int], str, bool], frozenset[int]] = {}

    @property
    def size(self) -> int:
        """How many states it has."""
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
        """These states and all that are reached from them without a character."""
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

    # -- building, from the end to the start: each part is given the state that follows it ---------

    def _state(self, kind: Any, following: Any) -> int:
        if len(self._edges) >= _MAX_STATES:
            raise PatternError(f"too large: it has more than {_MAX_STATES} states")
        self._edges.append((kind, following))
        return len(self._edges) - 1

    def _sequence(self, tree: Any, following: int) -> int:
        self._count(10)  # repeats of nothing make no states
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
                raise PatternError(f"of an unknown class of characters: {op}")


def _is_between(first: int, last: int, character: str) -> bool:
    return first <= ord(character) <= last


def _is_of(category: re.Pattern[str], character: str) -> bool:
    return category.match(character) is not None
