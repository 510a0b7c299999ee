"""The command ``gralora``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gralora_diffusion.cli import main
from tests import ROOT


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (["--help"], "train"),
        (["train", "--help"], "--instance_data_dir"),
        (["sample", "--help"], "--compare"),
        (["caption", "--help"], "--max_new_tokens"),
        (["control", "--help"], "finish the current step"),
        (["inspect", "--help"], "--json"),
        (["import", "--help"], "--gralora_k"),
        (["benchmark", "--help"], "usage: gralora benchmark"),
        (["studio", "--help"], "--no_browser"),
        (["demo", "--help"], "usage: gralora demo [-h] [folder] [options]"),
        (["samples", "--help"], "usage: gralora samples"),
    ],
)
def test_help(line: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 0
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        "sample --base owner/absent --prompt x --output {}/x.png",
        "export --adapter owner/absent --format lora --output {}/x.safetensors",
        "import --lora owner/absent --family flux --rank 4 --gralora_k 2 --output {}/x",
        "import --lora owner/x --base owner/absent --rank 4 --gralora_k 2 --output {}/x",
        "train --pretrained_model_name_or_path owner/absent --output_dir {}/x "
        "--instance_data_dir samples/subjects/owl/train --instance_prompt x",
    ],
)
def test_a_hub_id_that_is_not_cached(
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as caught:
        main(line.format(tmp_path).split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert (
        "owner/absent: there is no such folder, the Hub's cache does not contain all of it" in error
    )
    assert "HF_HUB_OFFLINE is set. With network access, download it with `hf download " in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            ["trian"],
            "the command is 'trian'; it must be one of train, data, caption, control, sample,",
        ),
        (["generate"], "Did you mean sample?"),
        (["train", "--rank", "3"], "--instance_data_dir is missing"),
        (["sample", "--prompt", "x"], "required: --base, --output"),
        (["inspect"], "required: FILE"),
        (["caption", "x"], "required: --model"),
        (["control", "x"], "required: REQUEST"),
        (["control", "x", "stp"], "REQUEST is 'stp'; it must be one of save, sample, stop, status"),
        (["benchmark", "--rank", "4"], "--rank cannot be set here"),
        (["demo", "--no_such", "1"], "--no_such is not an option"),
        (["samples", "--output", "."], "--output . exists already"),
        (["studio", __file__], "which is a file. Give a folder"),
        (["studio", "--port", "0"], "--port is 0; it must be from 1 to 65535"),
        (["studio", "--listen"], "Set a password of at least 8 characters in the environment"),
        (["studio", "--share"], "nothing leaves this machine"),
        (["import", "--lora", "x"], "required: --rank, --gralora_k, --output"),
    ],
)
def test_errors(line: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "usage: gralora" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough() -> None:
    """As with ``gralora inspect ... | head -1``."""
    line = [sys.executable, "-m", "gralora_diffusion.cli", "inspect", "samples/tiny-base"]
    line += line[-1:] * 2
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, said = process.communicate()
    assert said == b""
    assert process.returncode == 141
