"""Patterns against ``re`` where that answers, and hostile ones against the bound."""

import json
import random
import re

import pytest
import torch
from safetensors.torch import save_file

from gralora_diffusion import GraloraConfig, inject
from gralora_diffusion.adapters.adapter_file import read_adapter, save_adapter
from gralora_diffusion.adapters.placement.layer_config import exact_pattern, pattern_key
from gralora_diffusion.adapters.placement.path_patterns import (
    PathPattern,
    PatternError,
    _Automaton,
    check_cost,
    sre_parse,
)
from gralora_diffusion.inspection import inspect_file
from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.lora_import import gralora_from_lora
from tests.models import PIPELINES

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


@pytest.mark.parametrize("method", ["matches", "matches_end"])
def test_long_paths_are_refused(method: str) -> None:
    """Two repeats take the square of the length, once for every dot."""
    match = getattr(PathPattern(".*.*!"), method)
    assert not match("a." * 500)
    with pytest.raises(PatternError, match=r"a name of 1001 characters, 'a.a.*at most 1000"):
        match("a." * 500 + "a")


def test_cost_of_patterns_together() -> None:
    by_name = [rf"^transformer_blocks\.{n}\.attn\.to_{x}" for n in range(2000) for x in "qkv"]
    check_cost(by_name)
    check_cost([rf".*blocks[.]{n}[.].*to_[qk]" for n in range(100)])
    check_cost([rf".*[.]{n}[.].*attn.*(to_q|to_k).*" for n in range(60)])
    with pytest.raises(
        PatternError, match=r"too slow to match together from number .*fewer patterns"
    ):
        check_cost([f"{'[a-z0-9_.]?' * 1200}!{n}" for n in range(60)])
    with pytest.raises(PatternError, match="too slow to match together"):
        check_cost([f"(?:{'a.*b' * 2})!{n}" for n in range(3000)])


HEAVY = "[a-z0-9_.]?" * 1500 + "!"


@pytest.mark.parametrize("kind", ["GRALORA", "LORA"])
def test_a_folder_of_peft_is_refused_with_its_name(tmp_path, kind) -> None:
    """However long the names in the file are, and however many heavy patterns there are."""
    name = "base_model.model." + "a." * 600 + "to_q"
    ours, theirs = torch.ones(2, 4, 4), torch.ones(4, 4)
    values = {"gralora_A": ours, "gralora_B": ours}
    if kind == "LORA":
        values = {"lora_A.weight": theirs, "lora_B.weight": theirs.clone()}
    values = {f"{name}.{key}": value.clone() for key, value in values.items()}
    save_file(values, tmp_path / "adapter_model.safetensors")
    described = {"peft_type": kind, "r": 4, "target_modules": ["to_q"]}
    described |= {"lora_alpha": 8} if kind == "LORA" else {"gralora_k": 2, "alpha": 8}
    for patterns, problem in (
        ({".*.*!": 2}, "a name of 1204 characters"),
        ({f"{HEAVY}{n}": 2 for n in range(60)}, "too slow to match together"),
    ):
        text = json.dumps(described | {"rank_pattern": patterns})
        (tmp_path / "adapter_config.json").write_text(text)
        if kind == "GRALORA":
            with pytest.raises(AdapterFileError, match=rf"{tmp_path.name}: .*{problem}"):
                inspect_file(tmp_path)
        else:
            with pytest.raises(AdapterFileError, match=problem):
                gralora_from_lora(tmp_path, "stable-diffusion", rank=4, k=2)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_pattern_too_slow_to_load_is_an_error_of_the_file(tmp_path, field) -> None:
    pipe = PIPELINES["stable-diffusion"]()
    given = GraloraConfig(r=4, gralora_k=2, alpha=8, target_modules=["to_q"])
    inject(pipe.unet, given, "x")
    path = pipe.save_gralora_weights(tmp_path, "x")
    adapter = read_adapter(path)
    heavy = {HEAVY: 4} if field == "rank_pattern" else HEAVY
    setattr(adapter.components["unet"].config, field, heavy)
    save_adapter(adapter, path)
    other = PIPELINES["stable-diffusion"]()
    with pytest.raises(AdapterFileError, match=r"unet: a pattern of its config is too slow"):
        other.load_gralora_weights(path)
    assert not hasattr(other.unet, "peft_config")
