"""The benchmark's options: read, refused, written down, compared with those of a run."""

from dataclasses import fields

import pytest
import yaml

from gralora_diffusion.benchmark.options import SET_BY_THE_BENCHMARK, training_groups
from gralora_diffusion.benchmark.settings import ROOT, SETTINGS_NAME, parse_settings
from gralora_diffusion.training.config import TrainingConfig
from gralora_diffusion.training.config_checks import ConfigError

GOOD = ["--dreambooth_dir", "db", "--pretrained_model_name_or_path", "base"]


def test_defaults_and_what_is_given():
    settings = parse_settings([*GOOD, "--learning_rate", "3e-4", "--seeds", "0", "1"])
    settings.check()
    assert settings.protocols == ["subject", "drift", "prior"]
    assert settings.methods == ["lora-r32", "lora-r64", "gralora-r32-k2"]
    assert settings.seeds == [0, 1]
    assert list(settings.encoder_sources) == ["dinov2", "dino", "clip"]
    assert settings.encoder_sources["clip"] == "openai/clip-vit-base-patch32"
    assert settings.training.learning_rate == 3e-4
    assert len(settings.drift_prompts) == 12
    captioned = parse_settings(["--captioned_dir", "x", "--pretrained_model_name_or_path", "base"])
    captioned.check()
    assert captioned.protocols == ["captioned", "drift"]


def test_every_option_of_the_trainer_is_there_or_explained():
    names = {f.name for group in training_groups() for f in fields(group)}
    theirs = {f.name for f in fields(TrainingConfig)}
    assert names | SET_BY_THE_BENCHMARK.keys() | {"output_dir"} == theirs
    assert not names & SET_BY_THE_BENCHMARK.keys()


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


@pytest.mark.parametrize(
    ("line", "texts"),
    [
        ("--methods lora gralora-r4-k3", ["has 'lora'", "has 'gralora-r4-k3'"]),
        ("--methods lora-r4 lora-r4 --seeds 1 1", ["lora-r4 twice", "--seeds has 1 twice"]),
        ("--protocols subject captioned", ["one of subject and captioned"]),
        ("--protocols drift", ["one of subject and captioned"]),
        ("--protocols subject style", ["--protocols has style"]),
        ("--captioned_dir x --protocols captioned prior", ["prior, which needs subject"]),
        ("--protocols captioned", ["needs one of --captioned_dir and"]),
        ("--captioned_dir x --protocols subject", ["are for --protocols captioned"]),
        ("--methods full --quantization torchao-int8", ["full, which cannot train the weights"]),
        ("--methods lora-r4-lr1e-3 lora-r4-lr0.001", ["lora-r4-lr1e-3 and lora-r4-lr0.001, the"]),
        (
            "--captioned_dir x --with_prior_preservation",
            ["--with_prior_preservation is for --protocols subject"],
        ),
        ("--seeds -1", ["--seeds has -1"]),
        ("--encoders dinov2", ["--encoders has 'dinov2'; it must be NAME=SOURCE"]),
        ("--images_per_prompt 0 --mechanism_steps 0", ["--images_per_prompt is 0", "steps is 0"]),
        (
            "--methods full --with_prior_preservation --prior_source teacher",
            ["--methods has full, which has no frozen base"],
        ),
    ],
)
def test_problems(line, texts):
    with pytest.raises(ConfigError) as caught:
        parse_settings([*GOOD, *line.split()]).check()
    assert len(caught.value.problems) == len(texts)
    for text in texts:
        assert any(text in problem for problem in caught.value.problems), text


def test_subject_needs_a_folder():
    with pytest.raises(ConfigError, match="--dreambooth_dir is missing"):
        parse_settings(["--pretrained_model_name_or_path", "base"]).check()


def test_written_down_and_read_again(tmp_path):
    line = [*GOOD, "--output_dir", str(tmp_path), "--methods", "full"]
    line += ["--encoders", "dino=x", "--snr_gamma", "5", "--title", "It's: a title"]
    settings = parse_settings(line)
    settings.write_down()
    again = parse_settings(["--config", str(tmp_path / SETTINGS_NAME)])
    assert again == settings
    report = ["--report_only", "--output_dir", str(tmp_path)]
    assert parse_settings(report).title == settings.title
    assert parse_settings([*report, "--title", "another"]).title == "another"


def test_a_run_may_grow_but_not_change(tmp_path):
    line = [*GOOD, "--output_dir", str(tmp_path), "--subjects", "dog"]
    parse_settings([*line, "--methods", "lora-r4", "--seeds", "0"]).write_down()
    parse_settings([*line, "--methods", "lora-r8", "--seeds", "1", "0"]).write_down()
    kept = yaml.safe_load((tmp_path / SETTINGS_NAME).read_text())
    assert kept["methods"] == ["lora-r4", "lora-r8"]
    assert kept["seeds"] == [0, 1]
    parse_settings([*GOOD, "--output_dir", str(tmp_path)]).write_down()
    assert "subjects" not in yaml.safe_load((tmp_path / SETTINGS_NAME).read_text())
    before = (tmp_path / SETTINGS_NAME).read_bytes()
    other = parse_settings([*line, "--learning_rate", "1", "--max_prompts", "3"])
    with pytest.raises(ConfigError, match="--learning_rate is 1"):
        other.check()
    with pytest.raises(ConfigError) as caught:
        other.write_down()
    assert len(caught.value.problems) == 2
    assert "--learning_rate is 1.0, but its default in" in caught.value.problems[0]
    assert (tmp_path / SETTINGS_NAME).read_bytes() == before


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    settings = parse_settings([*GOOD, "--output_dir", str(tmp_path / "file" / "run")])
    with pytest.raises(
        ConfigError, match=r"--output_dir .*run cannot be written to .*Give another"
    ):
        settings.write_down()


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
