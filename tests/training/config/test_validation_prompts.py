"""Prompts of validation images from a file: all of them, or all its problems with their lines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.config.validation_prompts import (
    ValidationPrompt,
    validation_prompts,
)


def read(path: Path, text: str | bytes, divisor: int = 8) -> list[ValidationPrompt]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return validation_prompts(TrainingConfig(validation_prompts_file=str(path)), divisor)


def test_a_prompt_a_line(tmp_path: Path) -> None:
    text = "\ufeff# mine\r\na dog -- black\r\n\r\n"
    text += "a cat --w 64 --h 32 --n ugly, bad --d 7 --s 9 --l 1.5"
    assert read(tmp_path / "prompts.txt", text) == [
        ValidationPrompt(prompt="a dog -- black"),
        ValidationPrompt(
            prompt="a cat",
            width=64,
            height=32,
            negative_prompt="ugly, bad",
            seed=7,
            num_inference_steps=9,
            guidance_scale=1.5,
        ),
    ]


def test_a_yaml_list(tmp_path: Path) -> None:
    text = "- a dog\n- prompt: no\n  scale: 0.5\n  images: 2\n  negative_prompt: ''\n"
    text += "- {prompt: 'x: y'}"
    assert read(tmp_path / "prompts.yaml", text) == [
        ValidationPrompt(prompt="a dog"),
        ValidationPrompt(prompt="no", scale=0.5, images=2, negative_prompt=""),
        ValidationPrompt(prompt="x: y"),
    ]


def test_prompts_of_the_option_come_first(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("b")
    config = TrainingConfig(
        validation_prompt=["a"], validation_prompts_file=str(tmp_path / "prompts.txt")
    )
    assert [entry.prompt for entry in validation_prompts(config)] == ["a", "b"]
    assert validation_prompts(TrainingConfig()) == []


PROBLEMS: dict[str, tuple[str, str, list[str]]] = {
    "flags": (
        "p.txt",
        "a --q 1\na --w 65 --h 64\na --d 1 --d 2\n--s 3\na --s x --l -1",
        [
            "1: --q is not a setting; it must be one of --n, --w, --h, --d, --s, --l. "
            "Did you mean --w?",
            "2: width is 65; it must be a multiple of 8",
            "3: --d is given twice. Remove one",
            "4: there is no prompt",
            "5: num_inference_steps is 'x'; it must be a whole number",
            "5: guidance_scale is -1; it must be at least 0",
        ],
    ),
    "settings": (
        "p.yml",
        "- {prompt: a, sede: 1}\n- {seed: 1}\n- [a]\n- {prompt: a, width: 64}\n"
        "- {prompt: a, scale: .inf}\n- prompt: a\n  seed: {b: c}\n- {prompt: a, prompt: b}\n"
        "- {prompt: a, seed: 4294967296}\n- {prompt: a, scale: inf}\n"
        f"- {{prompt: a, seed: 1{'0' * 400}}}",
        [
            "1: sede is not a setting; it must be one of prompt, negative_prompt, width, height, "
            "seed, num_inference_steps, guidance_scale, scale, images. Did you mean seed?",
            "2: there is no prompt",
            "3: it must be a prompt, or settings with a prompt",
            "4: width and height must be given together",
            "5: scale is '.inf'; it must be a number",
            "6: its settings must be plain values",
            "8: prompt is given twice. Remove one",
            "9: seed is 4294967296; it must be at least 0 and below 4294967296",
            "10: scale is inf; it must be finite",
            f"11: seed is 1{'0' * 79}; it must be a smaller number",
        ],
    ),
    "no list": ("p.yaml", "prompt: a", ["1: it must be a list, with a - before each prompt"]),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_all_problems_with_their_lines(tmp_path: Path, case: str) -> None:
    name, text, problems = PROBLEMS[case]
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / name, text)
    assert caught.value.problems == [f"{tmp_path / name}:{problem}" for problem in problems]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "", "it contains no prompt"),
        ("p.txt", b"\xff", "it is not text in UTF-8"),
        ("p.yaml", "- [", "it is not YAML"),
        ("p.yaml", "[" * 5000, "it is nested too deeply"),
        ("p.yaml", '- "\\UFFFFFFFF"', "it is not YAML.* no character"),
        ("p.txt", "a" * (1 << 20) + "b", "at most 1,048,576 are allowed"),
        ("p.txt", "a\n" * 1001, "it contains 1,001 prompts, of 1000 at most"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, text: str | bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(tmp_path / name, text)


def test_a_file_is_not_read_far_beyond_its_problems(tmp_path: Path) -> None:
    names = "".join(f"  widh{i}: 1\n" for i in range(300))
    text = "- prompt: a\n" * 99 + f"- prompt: a\n{names}- seed: x\n"
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "p.yaml", text)
    *problems, last = caught.value.problems
    assert [p.split(" ")[1] for p in problems] == [f"widh{i}" for i in range(100)]
    assert last == f"{tmp_path / 'p.yaml'}:401: the file is not read further. Mend these first"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("pipe", "it is a named pipe"), ("absent", "No such file")):
        config = TrainingConfig(validation_prompts_file=str(tmp_path / name))
        with pytest.raises(ConfigError, match=said):
            validation_prompts(config)
