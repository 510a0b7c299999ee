"""Patterns against ``re`` where that answers, and hostile ones against the bound."""

import random
import re

import pytest

from gralora_diffusion.config_values import exact_pattern, pattern_key
from gralora_diffusion.path_patterns import PathPattern, PatternError, _Automaton, sre_parse

ATOMS = ["a", "b", r"\.", ".", "[ab]", "[^a]", r"\d", r"\w", "[a-c]", "", "^", "$", r"[\d.]"]
REPEATS = ["", "", "", "*", "+", "?", "*?", "{1,2}", "{2}", "{0,3}"]


def random_pattern(generator: random.Random, depth: int = 0) -> str:
    text = ""
    for _ in range(generator.randint(1, 4)):
        atom = generator.choice(ATOMS)
        if depth < 2 and generator.random() < 0.35:
            inner = random_pattern(generator, depth + 1)
            other = random_pattern(generator, depth + 1)
            atom = f"({inner}|{other})" if generator.random() < 0.5 else f"(?:{inner})"
        text += atom + (generator.choice(REPEATS) if atom not in ("", "^", "$") else "")
    return text


def test_the_same_as_re() -> None:
    """Both roads: the automaton for every pattern, and whichever the pattern takes."""
    generator = random.Random(0)
    paths = ["".join(generator.choices("ab.1c", k=generator.randint(0, 7))) for _ in range(40)]
    for _ in range(600):
        text = random_pattern(generator)
        compiled = re.compile(text)
        at_end = re.compile(rf"(.*\.)?({text})$")
        pattern, automaton = PathPattern(text), _Automaton(sre_parse.parse(text))
        for path in paths:
            expected = compiled.fullmatch(path) is not None
            assert pattern.matches(path) == expected, (text, path)
            assert automaton.matches(path, 0) == expected, (text, path)
            assert pattern.matches_end(path) == (at_end.match(path) is not None), (text, path)


@pytest.mark.parametrize(
    "text",
    [
        r"([a-z0-9_]+\.?)+!",
        "(a*)*b",
        "(a|a)*b",
        "(a|ab|b)" * 30 + "!",
        "a?" * 40 + "a" * 40,
        ".*" * 12 + "!",
        r"(.*\.)*(.*\.)*!",
        "((a{0,9}){0,9}){0,9}b",
        "(?:(?:a|b|ab)+,?)+$",
    ],
)
def test_hostile_patterns_are_matched_in_bounded_time(text: str) -> None:
    pattern = PathPattern(text)
    for path in ("a" * 200, "ab" * 100, "transformer_blocks.0.attn.to_q" * 5):
        pattern.matches(path)
        pattern.matches_end(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(a+)+\\1", "back references"),
        ("(?=(a+)+)b", "look-around"),
        ("(?i)(a+)+b", "flags"),
        ("((a{1000}){1000}){1000}", "states"),
        ("((){1000}){1000}", "too slow to match"),
        ("(" * 5000 + ")" * 5000, "nested too deeply|not a regular expression"),
        ("a" * 300_000, "too long"),
        ("to_[q", "not a regular expression"),
        (3, "not a regular expression"),
    ],
)
def test_refused(text: str, reason: str) -> None:
    with pytest.raises(PatternError, match=reason):
        PathPattern(text).matches("a" * 50 + "!")


def test_layers_by_name_are_read_by_re() -> None:
    """What this package writes for every layer of a large model, one by one."""
    paths = [f"transformer_blocks.{n}.attn.to_{x}" for n in range(600) for x in "qkv"]
    values = {path: 4 + number % 2 for number, path in enumerate(paths)}
    patterns = exact_pattern(values, paths)
    for path, value in values.items():
        assert patterns[pattern_key(patterns, path)] == value
    assert pattern_key(patterns, "other." + paths[0]) == "other." + paths[0]


@pytest.mark.parametrize(
    "text", [r".*blocks[.][0-5][.].*attn.*to_q", r".*\.(to_q|to_k)", r"^(?!.*text).*to_q$"]
)
def test_ordinary_patterns(text: str) -> None:
    paths = ["text.to_q", "a.blocks.3.attn1.to_q", "a.to_k", "a.blocks.6.attn1.to_q", "to_q"]
    pattern = PathPattern(text)
    assert [pattern.matches(path) for path in paths] == [
        re.fullmatch(text, path) is not None for path in paths
    ]


def test_matching_again_is_free() -> None:
    """Otherwise a pattern would be refused after enough loads in one process."""
    automaton = _Automaton(sre_parse.parse(r".*blocks\..*attn.*to_(q|k|v)"))
    paths = ["blocks.0.attn.to_q", "blocks.0.ff.net", ""]
    for start in (0, 7):
        assert [automaton.matches(path, min(start, len(path))) for path in paths] == [
            start == 0,
            False,
            False,
        ]
    visits = automaton._visits
    for _ in range(3):
        for path in paths:
            automaton.matches(path, 0)
            automaton.matches(path, min(7, len(path)))
    assert automaton._visits == visits
