"""Options of a run: read, written down, compared with those that its folder has."""

import pytest
import yaml

from gralora_diffusion.benchmark.kept import (
    ROOT,
    SETTINGS_NAME,
    check_same_run,
    parse_settings,
    write_down,
)
from gralora_diffusion.training.config_checks import ConfigError

GOOD = ["--dreambooth_dir", "db", "--pretrained_model_name_or_path", "base"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--rank 4", "--rank is not for the benchmark: give it in --methods, as in lora-r32"),
        ("--seed 4", "--seed is not for the benchmark: give --seeds"),
        ("--method x", "--method is not an option. Did you mean methods"),
        ("--suite big", "invalid choice: 'big'"),
        ("--report_only --output_dir nowhere", r"there is no nowhere.benchmark\.yaml"),
    ],
)
def test_unknown_options(line, text):
    with pytest.raises(ConfigError, match=text):
        parse_settings(line.split())


def test_written_down_and_read_again(tmp_path):
    line = [*GOOD, "--output_dir", str(tmp_path), "--methods", "full"]
    line += ["--encoders", "dino=x", "--snr_gamma", "5", "--title", "It's: a title"]
    settings = parse_settings(line)
    write_down(settings)
    again = parse_settings(["--config", str(tmp_path / SETTINGS_NAME)])
    assert again == settings
    report = ["--report_only", "--output_dir", str(tmp_path)]
    assert parse_settings(report).title == settings.title
    assert parse_settings([*report, "--title", "another"]).title == "another"


def test_a_run_may_grow_but_not_change(tmp_path):
    line = [*GOOD, "--output_dir", str(tmp_path), "--subjects", "dog"]
    write_down(parse_settings([*line, "--methods", "lora-r4", "--seeds", "0"]))
    write_down(parse_settings([*line, "--methods", "lora-r8", "--seeds", "1", "0"]))
    kept = yaml.safe_load((tmp_path / SETTINGS_NAME).read_text())
    assert kept["methods"] == ["lora-r4", "lora-r8"]
    assert kept["seeds"] == [0, 1]
    write_down(parse_settings([*GOOD, "--output_dir", str(tmp_path)]))
    assert "subjects" not in yaml.safe_load((tmp_path / SETTINGS_NAME).read_text())
    before = (tmp_path / SETTINGS_NAME).read_bytes()
    other = parse_settings([*line, "--learning_rate", "1", "--max_prompts", "3"])
    with pytest.raises(ConfigError, match="--learning_rate is 1"):
        check_same_run(other)
    with pytest.raises(ConfigError) as caught:
        write_down(other)
    assert len(caught.value.problems) == 2
    assert "--learning_rate is 1.0, but its default in" in caught.value.problems[0]
    assert (tmp_path / SETTINGS_NAME).read_bytes() == before


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    settings = parse_settings([*GOOD, "--output_dir", str(tmp_path / "file" / "run")])
    with pytest.raises(
        ConfigError, match=r"--output_dir .*run cannot be written to .*Give another"
    ):
        write_down(settings)


def test_the_suite_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = parse_settings(["--suite", "tiny", "--seeds", "7", "--output_dir", "out"])
    settings.check()
    assert len(settings.subjects) >= 8
    assert settings.seeds == [7]
    base = settings.training.pretrained_model_name_or_path
    assert (tmp_path / base).resolve() == ROOT / "samples/tiny-base"
    for source in settings.encoder_sources.values():
        assert (tmp_path / source / "config.json").is_file()
    kinds = {method.kind for method in settings.parsed_methods}
    assert kinds == {"lora", "gralora"}
    assert any(method.hybrid_rank for method in settings.parsed_methods)
