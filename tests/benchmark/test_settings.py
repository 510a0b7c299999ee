"""The benchmark's options, and what is wrong with them."""

from dataclasses import fields

import pytest

from gralora_diffusion.benchmark.options import set_by_benchmark, training_groups
from gralora_diffusion.benchmark.run_config import parse_settings
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.config.training_config import TrainingConfig

GOOD = ["--dreambooth_dir", "db", "--pretrained_model_name_or_path", "base"]


def test_defaults_and_what_is_given():
    settings = parse_settings([*GOOD, "--learning_rate", "3e-4", "--seeds", "0", "1"])
    settings.check()
    assert settings.protocols == ["subject", "drift", "prior"]
    assert settings.methods == ["base", "lora-r32", "lora-r64", "gralora-r32-k2"]
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
    assert names | set_by_benchmark().keys() | {"output_dir"} == theirs
    assert not names & set_by_benchmark().keys()


@pytest.mark.parametrize(
    ("line", "texts"),
    [
        ("--methods lora gralora-r4-k3", ["contains 'lora'", "contains 'gralora-r4-k3'"]),
        ("--methods lora-r4 lora-r4 --seeds 1 1", ["lora-r4 twice", "--seeds contains 1 twice"]),
        ("--protocols subject captioned", ["either subject or captioned"]),
        ("--protocols drift", ["either subject or captioned"]),
        ("--protocols subject style", ["--protocols contains style"]),
        ("--captioned_dir x --protocols captioned prior", ["prior, which needs subject"]),
        ("--protocols captioned", ["needs one of --captioned_dir and"]),
        ("--captioned_dir x --protocols subject", ["need --protocols captioned instead"]),
        ("--methods full --quantization torchao-int8", ["full, which cannot train the weights"]),
        (
            "--methods lora-r4-lr1e-3 lora-r4-lr0.001",
            ["lora-r4-lr1e-3 and lora-r4-lr0.001, which are the"],
        ),
        (
            "--captioned_dir x --with_prior_preservation",
            ["--with_prior_preservation needs --protocols subject"],
        ),
        ("--endpoint beauty", ["--endpoint: 'beauty' must be SCORE or SCORE@COST"]),
        ("--endpoint dino@dinner", ["--endpoint: 'dino@dinner' must be SCORE or"]),
        ("--comparisons lora-r4 a:", ["'lora-r4' must be METHOD:REF", "'a:' must be METHOD:REF"]),
        ("--rates auto", ["--rates: auto needs --learning_rate"]),
        ("--rates 1e-3 auto", ["--rates: 'auto' is neither auto alone nor a positive number"]),
        ("--seeds -1", ["--seeds contains -1"]),
        ("--encoders dinov2", ["--encoders contains 'dinov2'; it must be NAME=SOURCE"]),
        ("--images_per_prompt 0 --mechanism_steps 0", ["--images_per_prompt is 0", "steps is 0"]),
        (
            "--methods full --with_prior_preservation --prior_source teacher",
            ["--methods contains full, which has no frozen base"],
        ),
    ],
)
def test_problems(line, texts):
    with pytest.raises(ConfigError) as caught:
        parse_settings([*GOOD, *line.split()]).check()
    assert len(caught.value.problems) == len(texts)
    for text in texts:
        assert any(text in problem for problem in caught.value.problems), text


def test_subjects_beside_a_captioned_set_are_told_to_be_left_out(tmp_path):
    """The suite's base and encoders can also be used with one's own images."""
    assert parse_settings(GOOD).warnings() == parse_settings(["--suite", "tiny"]).warnings() == []
    (warning,) = parse_settings(["--suite", "tiny", "--captioned_dir", str(tmp_path)]).warnings()
    assert warning == (
        "these options have no effect with --captioned_dir: --dreambooth_dir and --subjects, even "
        "if --suite tiny sets them"
    )
    dataset = parse_settings([*GOOD, "--dataset_name", "x/y"]).warnings()
    assert dataset == ["these options have no effect with --dataset_name: --dreambooth_dir"]


def test_subject_needs_a_folder():
    with pytest.raises(ConfigError, match="--dreambooth_dir is missing"):
        parse_settings(["--pretrained_model_name_or_path", "base"]).check()


def test_encoders_are_looked_for_before_anything_is_done(dinov2, tmp_path):
    line = [*GOOD, "--encoders", f"a={dinov2}", f"b={tmp_path}/lost", f"c={tmp_path}"]
    with pytest.raises(ConfigError) as caught:
        parse_settings(line).check()
    lost, empty = caught.value.problems
    assert lost.startswith(
        f"--encoders contains 'b={tmp_path}/lost': there is no such file or folder"
    )
    assert empty.startswith(
        f"--encoders contains 'c={tmp_path}': this folder has no config.json. Give"
    )
    settings = parse_settings(line)
    settings.report_only = True  # which takes none
    settings.check()


def test_a_run_writes_to_nothing_that_it_reads(dinov2, tmp_path):
    (tmp_path / "db" / "dog").mkdir(parents=True)
    (tmp_path / "run" / "held_out").mkdir(parents=True)
    encoder = ["--encoders", f"a={dinov2}"]
    db = ["--pretrained_model_name_or_path", "base", "--dreambooth_dir", str(tmp_path / "db")]
    captioned = ["--captioned_dir", str(tmp_path / "run" / "held_out"), *db[:2]]
    for options, output, name in (
        (db, tmp_path / "db" / "run", "--dreambooth_dir"),
        (db, dinov2, "--encoders a"),
        (captioned, tmp_path / "run", "--captioned_dir"),
    ):
        line = [*options, *encoder, "--output_dir", str(output)]
        with pytest.raises(ConfigError, match=f"the run would write to {name} "):
            parse_settings(line).check()
    parse_settings([*db, *encoder, "--output_dir", str(tmp_path)]).check()


def test_the_home_directory_in_a_file_of_options(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = "output_dir: ~/run\ndreambooth_dir: ~/db\nencoders: [a=~/dino, b=x/y]\n"
    (tmp_path / "options.yaml").write_text(options)
    settings = parse_settings(["--config", str(tmp_path / "options.yaml")])
    assert (settings.output_dir, settings.dreambooth_dir) == ("/home/me/run", "/home/me/db")
    assert settings.encoders == ["a=/home/me/dino", "b=x/y"]
