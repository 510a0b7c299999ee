"""YAML of others is read as its nodes, or refused within bounds."""

import json
import time

import pytest
import yaml

from gralora_diffusion.io.yaml_files import MOST_LEVELS, MOST_VALUES, compose


def plain(node: yaml.Node | None) -> object:
    if isinstance(node, yaml.MappingNode):
        return {key.value: plain(value) for key, value in node.value}
    return [plain(n) for n in node.value] if isinstance(node, yaml.SequenceNode) else node.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1\nb: [x, 'y: z']\n", {"a": "1", "b": ["x", "y: z"]}),
        ("- &a {b: c}\n- *a\n", [{"b": "c"}, {"b": "c"}]),
        (json.dumps({"a": "😀 ä"}), {"a": "😀 ä"}),  # which JSON writes as two escapes
        ('"\\U0001F600"', "😀"),
    ],
)
def test_values_are_texts(text: str, value: object) -> None:
    assert plain(compose(text)) == value


def test_an_empty_text_has_no_root() -> None:
    assert compose("# nothing\n") is None


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("a: [", yaml.YAMLError, "expected the node content"),
        ('a: "\\UFFFFFFFF"', yaml.YAMLError, "an escape that is no character"),
        ('a: "\\U00110000"', yaml.YAMLError, "an escape that is no character"),
        ('a: "\\uD83D"', yaml.YAMLError, "half of a character"),
        (f"%YAML 1.{'1' * 5000}\n---\na", yaml.YAMLError, "no version"),
        ("[" * (MOST_LEVELS + 1), ValueError, "it is nested too deeply"),
        ("- a\n" * MOST_VALUES, ValueError, "it has more than 50,000 values"),
        ("[" * 1_000_000, ValueError, "it is nested too deeply"),
    ],
)
def test_what_is_refused(text: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        compose(text)


def test_the_limits_themselves_are_allowed() -> None:
    depth = MOST_LEVELS - 1  # the value inside is a level, too
    assert plain(compose("[" * depth + "a" + "]" * depth)) != "a"
    assert len(plain(compose("- a\n" * (MOST_VALUES - 1)))) == MOST_VALUES - 1


def test_a_megabyte_takes_seconds_at_most() -> None:
    for part in ("{},", "[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]],", "? ,"):
        start = time.process_time()
        with pytest.raises(ValueError, match="more than"):
            compose("[" + part * (2**20 // len(part)) + "]")
        assert time.process_time() - start < 5
