"""The command ``gralora``."""

from __future__ import annotations

import pytest

from gralora_diffusion.cli import main


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (["--help"], "train"),
        (["train", "--help"], "--instance_data_dir"),
        (["sample", "--help"], "--compare"),
        (["inspect", "--help"], "--json"),
        (["import", "--help"], "--gralora_k"),
        (["benchmark", "--help"], "usage: gralora benchmark"),
    ],
)
def test_help(line: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 0
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ([], "required: command"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--rank", "3"], "--instance_data_dir is missing"),
        (["sample", "--prompt", "x"], "required: --base, --output"),
        (["inspect"], "required: FILE"),
        (["benchmark", "--rank", "4"], "--rank is not for the benchmark"),
        (["import", "--lora", "x"], "required: --rank, --gralora_k, --output"),
    ],
)
def test_errors(line: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err
