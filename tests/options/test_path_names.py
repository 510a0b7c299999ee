"""Names that no file can have are refused by every command, before a file system is asked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gralora_diffusion.cli import main
from gralora_diffusion.options.path_names import from_home, path_problem
from tests import ROOT

UNUSABLE = {
    "a long name": "9" * 256,
    "a long path": "a/" * 2048,
    "character 0": "nul\0",
    "half a character": "\ud800",
    "an unknown user": "~nobody-of-this-name/x",
}
_TRAIN = {"output_dir": "o", "max_train_steps": "1", "instance_data_dir": "i"}
_EXPORT = {"adapter": "a/b", "format": "checkpoint", "base": "a/b", "output": "o.safetensors"}
_IMPORT = {"lora": "a/b", "base": "a/b", "rank": "4", "gralora_k": "2", "output": "o"}
_SAMPLE = {"base": "a/b", "prompt": "a", "output": "o.png"}
#: Command -> arguments without a problem, and those that are paths or become a part of one.
COMMANDS = {
    "train": (
        {"pretrained_model_name_or_path": "a/b", "instance_prompt": "a", **_TRAIN},
        "config pretrained_model_name_or_path base_config cache_dir output_dir instance_data_dir "
        "class_data_dir control_data_dir mask_data_dir latent_cache_dir resume_from_checkpoint "
        "initial_adapter logging_dir validation_prompts_file validation_image validation_mask "
        "dataset_name",
    ),
    "benchmark": (
        {"pretrained_model_name_or_path": "a/b", "dreambooth_dir": "d", "output_dir": "o"},
        "config pretrained_model_name_or_path cache_dir dreambooth_dir captioned_dir output_dir "
        "latent_cache_dir",
    ),
    "export": (_EXPORT, "adapter base base_config output cache_dir revision variant"),
    "import": (_IMPORT, "lora base output cache_dir revision weight_name"),
    "sample": (_SAMPLE, "base base_config adapter lora image mask output image_dir reference"),
    "samples": ({}, "output"),
}


@pytest.mark.parametrize("text", UNUSABLE.values(), ids=UNUSABLE)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_the_option(
    command: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    usual, names = COMMANDS[command]
    options = usual | dict.fromkeys(names.split(), text)
    with pytest.raises(SystemExit) as caught:
        main([command, *(f"--{name}={value}" for name, value in options.items())])
    assert caught.value.code == 2
    told = capsys.readouterr().err.splitlines()
    for name in names.split():
        start = f"--{name} is {ascii(text)[:10]}"
        assert sum(start in line for line in told) == 1, name
    assert str(told).count(path_problem(text)) == len(names.split())


@pytest.mark.parametrize("text", UNUSABLE.values(), ids=UNUSABLE)
def test_arguments_without_a_name(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (
        ["control", text, "status"],
        ["studio", text],
        ["inspect", "--", text],
        ["demo", text],
        ["benchmark", f"--encoders=a={text}", "--output_dir=o"],
    )
    for line in lines:
        with pytest.raises(SystemExit) as caught:
            main(line)
        assert caught.value.code == 2
        assert path_problem(text) in capsys.readouterr().err


def test_one_such_name_hides_no_other_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["inspect", UNUSABLE["a long name"], str(ROOT / "samples/tiny-base")])
    assert caught.value.code == 2
    assert "stable-diffusion" in capsys.readouterr().out


def test_the_longest_names(tmp_path: Path) -> None:
    for name in ("9" * 255, "é" * 127):
        (tmp_path / name).touch()
        assert path_problem(str(tmp_path / name)) is None
    for name in ("9" * 256, "é" * 128):
        with pytest.raises(OSError, match="too long"):
            (tmp_path / name).touch()
        assert path_problem(name) is not None
    longest = "/".join(["", *("a" * 15,) * 255, "b" * 14])
    with pytest.raises(FileNotFoundError):
        os.stat(longest)
    assert path_problem(longest) is None
    with pytest.raises(OSError, match="too long"):
        os.stat(f"{longest}b")
    for name in (f"{longest}b", longest.lstrip("/")):  # the working folder comes before it
        assert path_problem(name) is not None


def test_homes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    assert from_home("~/a") == "/home/x/a"
    assert path_problem("~/a") is path_problem("./~nobody-of-this-name/x") is None
    assert path_problem("a~b/~c") is None
