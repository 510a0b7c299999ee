"""The bundled samples, and the names of their files of options."""

from __future__ import annotations

from pathlib import Path

import pytest

from gralora_diffusion.io import bundled
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.config.training_config import parse_config
from tests import ROOT

CONFIGS = ROOT / "samples" / "configs"


def test_names_of_the_configs() -> None:
    names = [*bundled.config_names(), *bundled.config_names(benchmark=True)]
    named = {bundled.find_config(name) for name in names}
    assert named == {*CONFIGS.glob("*.yaml")}
    assert {"sd15", "sdxl", "sd35", "flux", "flux2_klein"} <= {*bundled.config_names()}
    assert "benchmark_tiny" in bundled.config_names(benchmark=True)


@pytest.mark.parametrize("name", ["sdxl", "sdxl_dreambooth", "sdxl_dreambooth.yaml", "sdxl.yaml"])
def test_a_config_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sdxl").mkdir()  # a folder is no file of options
    assert bundled.find_config(name) == CONFIGS / "sdxl_dreambooth.yaml"
    options = parse_config(["--config", name, "--rank", "8"])
    assert options.pretrained_model_name_or_path == "stabilityai/stable-diffusion-xl-base-1.0"
    assert (options.rank, options.gralora_k) == (8, 2)


def test_a_file_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sdxl").write_text("rank: 6", encoding="utf-8")
    assert parse_config(["--config", "sdxl"]).rank == 6


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"or the name of a bundled one: .*sd15, .*sdxl"):
        parse_config(["--config", "sdxxl"])


def test_paths_of_a_bundled_config_are_those_of_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = parse_config(["--config", "tiny_robot"])
    assert options.pretrained_model_name_or_path == str(ROOT / "samples/tiny-base")
    assert options.instance_data_dir == str(ROOT / "samples/subjects/robot/train")
    monkeypatch.chdir(ROOT)  # where they are short
    options = parse_config(["--config", "samples/configs/tiny_robot.yaml"])
    assert options.pretrained_model_name_or_path == "samples/tiny-base"
    assert bundled.locate("dino=samples/tiny-encoders/dino") == "dino=samples/tiny-encoders/dino"


def test_paths_of_other_configs_stay(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("pretrained_model_name_or_path: samples/tiny-base", encoding="utf-8")
    options = parse_config(["--config", str(file)])
    assert options.pretrained_model_name_or_path == "samples/tiny-base"


def test_a_package_without_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "__file__", str(tmp_path / "gralora_diffusion/io/bundled.py"))
    with pytest.raises(FileNotFoundError, match="Install the package again"):
        bundled.samples_folder()
    assert bundled.config_names() == []
    assert not bundled.is_bundled(CONFIGS / "sdxl_dreambooth.yaml")
