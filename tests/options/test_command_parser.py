"""All problems of a command line at once, with suggestions, and without a usage text."""

from __future__ import annotations

from pathlib import Path

import pytest

from gralora_diffusion.families import family_name_of, list_families
from gralora_diffusion.options.command_parser import CommandParser, nearest_choice


def a_parser() -> CommandParser:
    parser = CommandParser(prog="p", other_names={"steps": "is called --count here"})
    parser.add_argument("files", metavar="FILE", nargs="+")
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--some_words", nargs="+")
    parser.add_argument("--where", type=Path)
    parser.add_argument("--loud", action="store_true")
    return parser


def problems_of(line: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    with pytest.raises(SystemExit) as caught:
        a_parser().parse_args(line)
    assert caught.value.code == 2
    shown = capsys.readouterr().err.removeprefix("p: error: ").splitlines()
    return [text.strip() for text in shown if "problems with the options" not in text]


def test_values_are_those_of_argparse() -> None:
    line = "a --rate -1e-3 b --some-words x y --loud --where w --count=-2"
    options = a_parser().parse_args(line.split())
    assert vars(options) == {
        "files": ["a", "b"],
        "count": -2,
        "rate": -1e-3,
        "dtype": "fp32",
        "some_words": ["x", "y"],
        "where": Path("w"),
        "loud": True,
    }
    assert not a_parser().parse_args(["a", "--rate=0"]).loud


def test_all_problems_are_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--count many --dtype half --steps 3 --laud --some_words a --some_words b --where"
    assert problems_of(line.split(), capsys) == [
        "--count is 'many'; it must be a whole number",
        "--dtype is 'half'; it must be one of fp32, bf16",
        "--where needs a value",
        "--some_words is given 2 times. Give it once, followed by all values",
        "--steps is called --count here",
        "--laud is not an option. Did you mean --loud?",
        "required: FILE, --rate",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (["--rate", "0,5"], "--rate is '0,5'; it must be a number. Did you mean 0.5?"),
        (["--rate", "="], "--rate is '='; it must be a number. Leave out the spaces around ="),
        (["--count", "1,000"], "it must be a whole number. Did you mean 1000?"),
        (["--count", "1.5"], "it must be a whole number"),
        (["--count", ""], "--count needs a value"),
        (["--dtype", "bfloat16"], "it must be one of fp32, bf16. Did you mean bf16?"),
        (["--dtype", "BF16"], "Did you mean bf16?"),
        (["-rate", "1"], "-rate is not an option. Did you mean --rate?"),
        (["--words", "a"], "--words is not an option. Did you mean --some_words?"),
        (["--loud=no"], "--loud takes no value, but is given 'no'"),
        (["--", "--rate"], "required: --rate"),
    ],
)
def test_suggestions(line: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = problems_of(["a", "--rate=1", *line] if line[0] != "--" else line, capsys)
    assert len(found) == 1
    assert found[0].endswith(problem)


@pytest.mark.parametrize(
    ("stray", "problem"),
    [
        (
            ["photo", "of"],
            "'photo of' does not belong to any option: --rate takes one value. If it",
        ),
        (["\u2014rate", "1"], "'\u2014rate' begins with a long dash. Did you mean --rate?"),
        (["\u201ca", "dog\u201d"], "its quotes are typographic ones"),
        ([" "], "nothing may follow the \\ at the end of a line"),
        (["rate=1"], "'rate=1' does not belong to any option. Did you mean --rate?"),
    ],
)
def test_words_that_belong_to_no_option(
    stray: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = CommandParser(prog="p")
    parser.add_argument("--rate")
    with pytest.raises(SystemExit):
        parser.parse_args(["--rate", "1", *stray])
    assert problem in capsys.readouterr().err


def test_what_has_control_characters_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    assert problems_of(["a", "--rate=1", "--count", "\x1b[2J"], capsys) == [
        "--count is '\\x1b[2J'; it must be a whole number"
    ]


def test_help_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        a_parser().parse_args(["--count", "many", "--help"])
    assert caught.value.code == 0
    assert "--some_words" in capsys.readouterr().out


def test_the_nearest_choice() -> None:
    families = tuple(list_families())
    assert nearest_choice("SDXL", families, family_name_of) == "stable-diffusion-xl"
    assert nearest_choice("sd15", families, family_name_of) == "stable-diffusion"
    assert nearest_choice("stable_diffusion", families) == "stable-diffusion"
    assert nearest_choice("float32", ("no", "fp16")) == "no"
    assert nearest_choice("imagen", families) is None
