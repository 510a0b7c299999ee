"""Options of a run: read, written down, compared with those that its folder has."""

import logging

import pytest
import yaml

from gralora_diffusion.benchmark import run_config
from gralora_diffusion.benchmark.evaluation.endpoint import Declared, Endpoint
from gralora_diffusion.benchmark.rates import at_rates
from gralora_diffusion.benchmark.run_config import (
    SETTINGS_NAME,
    check_same_run,
    parse_settings,
    public_paths,
    save_run_config,
)
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.options.parsing import read_options
from gralora_diffusion.training.runtime.folder_lock import CONFIG_NAME
from tests import ROOT

AUTO = ("5e-4", "7.1e-4", "1e-3", "1.4e-3")
GOOD = ["--dreambooth_dir", "db", "--pretrained_model_name_or_path", "base"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--rank 4", "--rank cannot be set here: give it in --methods, as in lora-r32"),
        ("--seed 4", "--seed cannot be set here: give --seeds"),
        ("--method x", "--method is not an option. Did you mean --methods"),
        ("--suite big", "--suite is 'big'; it must be one of tiny"),
        ("--report_only --output_dir nowhere", r"there is no nowhere.benchmark\.yaml"),
    ],
)
def test_unknown_options(line, text):
    with pytest.raises(ConfigError, match=text):
        parse_settings(line.split())


def test_written_down_and_read_again(tmp_path):
    line = [*GOOD, "--output_dir", str(tmp_path), "--methods", "full"]
    line += ["--dreambooth_dir", str(tmp_path / "db")]
    line += ["--encoders", "dino=x", "--snr_gamma", "5", "--title", "It's: a title"]
    settings = parse_settings(line)
    save_run_config(settings)
    again = parse_settings(["--config", str(tmp_path / SETTINGS_NAME)])
    assert again == settings
    report = ["--report_only", "--output_dir", str(tmp_path)]
    assert parse_settings(report).title == settings.title
    assert parse_settings([*report, "--title", "another"]).title == "another"


def test_a_run_may_grow_but_not_change(tmp_path):
    line = [*GOOD, "--output_dir", str(tmp_path), "--subjects", "dog"]
    save_run_config(parse_settings([*line, "--methods", "lora-r4", "--seeds", "0"]))
    save_run_config(parse_settings([*line, "--methods", "lora-r8", "--seeds", "1", "0"]))
    record = yaml.safe_load((tmp_path / SETTINGS_NAME).read_text())
    assert record["methods"] == ["lora-r4", "lora-r8"]
    assert record["seeds"] == [0, 1]
    save_run_config(parse_settings([*GOOD, "--output_dir", str(tmp_path)]))
    assert "subjects" not in yaml.safe_load((tmp_path / SETTINGS_NAME).read_text())
    before = (tmp_path / SETTINGS_NAME).read_bytes()
    other = parse_settings([*line, "--learning_rate", "1", "--max_prompts", "3"])
    with pytest.raises(ConfigError, match="--learning_rate is 1"):
        check_same_run(other)
    with pytest.raises(ConfigError) as caught:
        save_run_config(other)
    assert len(caught.value.problems) == 2
    assert "--learning_rate is 1.0, but its default in" in caught.value.problems[0]
    assert (tmp_path / SETTINGS_NAME).read_bytes() == before


def test_methods_and_seeds_that_are_not_given_are_those_of_the_run(tmp_path, caplog):
    line = [*GOOD, "--output_dir", str(tmp_path)]
    assert parse_settings(line).methods == ["base", "lora-r32", "lora-r64", "gralora-r32-k2"]
    save_run_config(parse_settings([*line, "--methods", "lora-r4", "base", "--seeds", "3"]))
    with caplog.at_level(logging.INFO, "gralora_diffusion"):
        again = parse_settings(line)
    assert (again.methods, again.seeds) == (["lora-r4", "base"], [3])
    path = tmp_path / SETTINGS_NAME
    assert caplog.messages == [f"using the options saved in {path}: methods lora-r4 base; seeds 3"]
    save_run_config(again)
    assert yaml.safe_load(path.read_text())["methods"] == ["lora-r4", "base"]
    # what is given is done, and added to what is kept
    more = parse_settings([*line, "--methods", "full"])
    assert (more.methods, more.seeds) == (["full"], [3])
    save_run_config(more)
    assert parse_settings(line).methods == ["lora-r4", "base", "full"]
    (tmp_path / "options.yaml").write_text("seeds: [5]")
    assert parse_settings([*line, "--config", str(tmp_path / "options.yaml")]).seeds == [5]


def test_a_file_of_options_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / SETTINGS_NAME).write_text("methods: [lora-r4\n")
    line = [*GOOD, "--output_dir", str(tmp_path)]
    with pytest.raises(ConfigError, match=rf"{SETTINGS_NAME}: --config is not YAML"):
        parse_settings(line)
    with pytest.raises(ConfigError, match=rf"{SETTINGS_NAME}: --config is not YAML"):
        check_same_run(parse_settings([*line, "--methods", "base", "--seeds", "0"]))


def test_one_without_methods_has_the_usual_ones(tmp_path):
    (tmp_path / SETTINGS_NAME).write_text("dreambooth_dir: db\n")
    assert parse_settings([*GOOD, "--output_dir", str(tmp_path)]).methods[1] == "lora-r32"


def test_what_is_kept_is_parsed_once_and_again_when_another_command_wrote(tmp_path, monkeypatch):
    line = [*GOOD, "--output_dir", str(tmp_path)]
    save_run_config(parse_settings([*line, "--methods", "lora-r4", "--seeds", "0"]))
    parsed = []
    monkeypatch.setattr(
        run_config, "read_options", lambda *a, **k: parsed.append(a[1]) or read_options(*a, **k)
    )
    ours = parse_settings(line)
    check_same_run(ours)
    save_run_config(ours)
    assert parsed == [line, ["--config", str(tmp_path / SETTINGS_NAME)]]
    save_run_config(parse_settings([*line, "--methods", "lora-r8"]))
    save_run_config(ours)
    assert parse_settings(line).methods == ["lora-r4", "lora-r8"]


def places(folder):
    """A base, a clone and an encoder, of which nothing but the place matters here."""
    for name in ("base", "db", "judge"):
        (folder / name).mkdir(parents=True)
    return folder


RELATIVE = ["--dreambooth_dir", "db", "--pretrained_model_name_or_path", "base"]
RELATIVE += ["--encoders", "dino=judge", "clip=openai/clip-vit-base-patch32"]


def test_a_run_goes_on_from_another_directory(tmp_path, monkeypatch):
    """The same files by other paths are the same; the same paths to other files are not."""
    monkeypatch.chdir(places(tmp_path / "one"))
    save_run_config(parse_settings([*RELATIVE, "--output_dir", "../run"]))
    places(tmp_path / "other")
    (tmp_path / "link").symlink_to(tmp_path / "one")
    monkeypatch.chdir(tmp_path / "other")
    for way in ("../one/", f"{tmp_path}/one/", "../link/"):
        line = ["--dreambooth_dir", f"{way}db", "--pretrained_model_name_or_path", f"{way}base"]
        line += ["--encoders", f"dino={way}judge", "clip=openai/clip-vit-base-patch32"]
        check_same_run(parse_settings([*line, "--output_dir", "../run"]))
    with pytest.raises(ConfigError) as caught:
        check_same_run(parse_settings([*RELATIVE, "--output_dir", "../run"]))
    assert [problem.split()[0] for problem in caught.value.problems] == [
        *("--dreambooth_dir", "--encoders", "--pretrained_model_name_or_path")
    ]
    said = caught.value.problems[0]
    assert f"is {tmp_path}/other/db, but {tmp_path}/one/db in" in said


def test_what_is_kept_is_read_from_another_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(places(tmp_path / "one"))
    given = parse_settings([*RELATIVE, "--output_dir", "run", "--latent_cache_dir", "latents"])
    save_run_config(given)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    again = parse_settings(["--config", "../one/run/benchmark.yaml"])
    check_same_run(again)
    one = f"{tmp_path}/one/"
    assert (again.output_dir, again.dreambooth_dir) == (f"{one}run", f"{one}db")
    assert again.training.pretrained_model_name_or_path == f"{one}base"
    assert again.training.latent_cache_dir == f"{one}latents"
    clip = "openai/clip-vit-base-patch32"
    assert again.encoder_sources == {"dino": f"{one}judge", "clip": clip}
    shown = public_paths(again.record())
    assert (shown["output_dir"], shown["dreambooth_dir"]) == ("run", "db")
    assert shown["pretrained_model_name_or_path"] == "base"
    assert shown["encoders"] == ["dino=judge", f"clip={clip}"]
    assert str(tmp_path) not in str(shown)


def test_files_that_were_moved_are_known_by_their_names(tmp_path, monkeypatch):
    """As on another machine, that has them elsewhere."""
    monkeypatch.chdir(places(tmp_path / "one"))
    save_run_config(parse_settings([*RELATIVE, "--output_dir", "../run"]))
    (tmp_path / "one").rename(tmp_path / "two")
    monkeypatch.chdir(tmp_path / "two")
    check_same_run(parse_settings([*RELATIVE, "--output_dir", "../run"]))
    (tmp_path / "two/db").rename(tmp_path / "two/db2")
    other = [word.replace("db", "db2") for word in RELATIVE]
    with pytest.raises(ConfigError, match=r"--dreambooth_dir is .*two/db2, but .*one/db in"):
        check_same_run(parse_settings([*other, "--output_dir", "../run"]))
    hub = [word.replace("=judge", "=nobody/judge") for word in RELATIVE]
    with pytest.raises(ConfigError, match=r"--encoders is .*nobody/judge"):
        check_same_run(parse_settings([*hub, "--output_dir", "../run"]))


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    settings = parse_settings([*GOOD, "--output_dir", str(tmp_path / "file" / "run")])
    with pytest.raises(
        ConfigError, match=r"--output_dir .*run cannot be written to .*Give another"
    ):
        save_run_config(settings)


def test_a_folder_of_a_training(tmp_path):
    settings = parse_settings([*GOOD, "--output_dir", str(tmp_path)])
    (tmp_path / CONFIG_NAME).touch()
    for refused in (check_same_run, save_run_config):
        with pytest.raises(ConfigError, match=r"belongs to a training \(training_config\.yaml\)"):
            refused(settings)
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG_NAME]


def test_another_benchmark(tmp_path):
    settings = parse_settings([*GOOD, "--output_dir", str(tmp_path)])
    save_run_config(settings)
    other = parse_settings([*GOOD, "--output_dir", str(tmp_path), "--snr_gamma", "5"])
    with pytest.raises(ConfigError, match=r"--snr_gamma is 5.0, but its default in .*mixed"):
        save_run_config(other)
    assert [path.name for path in tmp_path.iterdir()] == [SETTINGS_NAME]


def test_the_suite_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = parse_settings(["--suite", "tiny", "--seeds", "7", "--output_dir", "out"])
    settings.check()
    assert len(settings.subjects) == 12
    assert settings.seeds == [7]
    base = settings.training.pretrained_model_name_or_path
    assert (tmp_path / base).resolve() == ROOT / "samples/tiny-base"
    for source in settings.encoder_sources.values():
        assert (tmp_path / source / "config.json").is_file()
    assert settings.undeclared_methods() == []
    assert settings.declared == Declared(
        Endpoint("dino", "drift_dino"),
        (
            ("gralora-r16-k2", "lora-r16"),
            ("gralora-r16-k2", "lora-r32"),
            ("gralora-r4-k2", "lora-r4"),
        ),
    )
    # its rates are those of --rates auto, but for the two that r4 does without
    auto = ["base", "lora-r16", "gralora-r16-k2", "lora-r32", "lora-r4", "gralora-r4-k2"]
    left = set(at_rates(auto, ["auto"], 3e-3)) ^ set(settings.methods)
    assert left == {"lora-r4-lr8.5e-3", "gralora-r4-k2-lr1.2e-2"}


def test_methods_in_place_of_a_suites_are_compared_with_each_other(tmp_path):
    line = ["--suite", "tiny", "--output_dir", str(tmp_path)]
    own = parse_settings([*line, "--methods", "lora-r8", "gralora-r8-k2"])
    assert (own.endpoint, own.comparisons) == ("dino", ["gralora-r8-k2:lora-r8"])
    save_run_config(parse_settings(line))
    more = parse_settings([*line, "--methods", "lora-r8"])
    check_same_run(more)
    assert more.endpoint == "dino@drift_dino"  # of the run that it is added to


def test_what_a_run_decides_is_declared_by_its_first_command(tmp_path):
    line = [*GOOD, "--output_dir", str(tmp_path), "--learning_rate", "1e-3"]
    first = parse_settings([*line, "--methods", "base", "lora-r4", "gralora-r4-k2"])
    assert (first.endpoint, first.comparisons) == ("dinov2", ["gralora-r4-k2:lora-r4"])
    assert first.seeding == "subject"
    save_run_config(first)
    record = yaml.safe_load((tmp_path / SETTINGS_NAME).read_text())
    assert record["endpoint"] == "dinov2"
    assert record["comparisons"] == ["gralora-r4-k2:lora-r4"]
    assert record["seeding"] == "subject"
    # a method that is added is exploratory
    more = parse_settings([*line, "--methods", "lora-r8"])
    save_run_config(more)
    assert parse_settings(line).comparisons == ["gralora-r4-k2:lora-r4"]
    with pytest.raises(ConfigError) as caught:
        check_same_run(parse_settings([*line, "--endpoint", "clip_t", "--seeding", "shared"]))
    assert [problem.split(": ")[1].split(". ")[0] for problem in caught.value.problems] == [
        "what a run decides is declared before its first trial",
        "trials with both would be mixed",
    ]


def test_along_curves_where_there_are_rates(tmp_path):
    line = [*GOOD, "--output_dir", str(tmp_path), "--learning_rate", "1e-3", "--methods", "base"]
    line += ["lora-r4", "lora-r8", "gralora-r4-k2", "--encoders", "clip=x"]
    settings = parse_settings([*line, "--rates", "auto"])
    assert settings.endpoint == "clip_i@drift_clip_i"
    assert settings.comparisons == ["gralora-r4-k2:lora-r4", "gralora-r4-k2:lora-r8"]
    assert settings.methods[:5] == ["base", *(f"lora-r4-lr{r}" for r in AUTO)]
    save_run_config(settings)
    record = yaml.safe_load((tmp_path / SETTINGS_NAME).read_text())
    assert record["methods"] == settings.methods
    assert "rates" not in record
    wrong = [*line, "--output_dir", str(tmp_path / "new"), "--comparisons", "gralora-r4-k2:lora-r9"]
    with pytest.raises(ConfigError, match="contains gralora-r4-k2:lora-r9, but lora-r9 is not one"):
        check_same_run(parse_settings(wrong))


def test_a_folder_of_version_0_1_declares_nothing_and_shares_its_seeds(tmp_path):
    (tmp_path / SETTINGS_NAME).write_text("dreambooth_dir: db\nmethods: [lora-r4, gralora-r4-k2]")
    line = ["--config", str(tmp_path / SETTINGS_NAME), "--output_dir", str(tmp_path)]
    again = parse_settings(line)
    assert (again.seeding, again.declared) == ("shared", None)
    check_same_run(again)
    with pytest.raises(ConfigError, match="--endpoint is dino, but its default in"):
        check_same_run(parse_settings([*line, "--endpoint", "dino"]))
