"""Data files: what their sets say, and every problem with them, at its line."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.options.fields import PerSet, options_with
from gralora_diffusion.training.checks.options import find_problems, validate
from gralora_diffusion.training.config.data_file import (
    ALL_IMAGES,
    ImageSet,
    read_data_file,
    sound_sections,
    with_data_file,
)
from gralora_diffusion.training.config.data_options import SetOptions
from gralora_diffusion.training.config.training_config import (
    TrainingConfig,
    names_in_set,
    options_table,
)
from tests.training.runs import config, make_images

BASE = {"pretrained_model_name_or_path": "owner/base", "instance_prompt": None}


def with_file(folder: Path, text: str, **options: Any) -> TrainingConfig:
    path = folder / "data.yaml"
    path.write_text(text, encoding="utf-8")
    return config(**{**BASE, "data_config": path, "output_dir": folder / "out", **options})


def image_sets(run: TrainingConfig, role: str = "train") -> list[ImageSet]:
    return [section.image_set for section in sound_sections(run, role)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("dogs", "cats", "others"):
        make_images(tmp_path / name)
    return tmp_path


def test_sets_have_the_runs_options_but_for_their_own(folder: Path) -> None:
    text = """\
- folder: dogs
  prompt: a photo of sks dog
  repeats: 3
  random_flip: yes
- folder: cats
  trigger_word: zwx
  prompt: a cat
  loss_weight: 0.5
  share: 0.25
  control_column: [a, b]
"""
    run = with_file(folder, text, shuffle_tags=True, repeats=2)
    dogs, cats = image_sets(run)
    first, second = dogs.options(run), cats.options(run)
    assert (first.instance_data_dir, first.instance_prompt) == ("dogs", "a photo of sks dog")
    assert (first.repeats, first.random_flip, first.shuffle_tags) == (3, True, True)
    assert (second.repeats, second.random_flip, second.shuffle_tags) == (2, False, True)
    assert (second.trigger_word, second.control_column) == ("zwx", ["a", "b"])
    assert [(s.share, s.loss_weight) for s in (dogs, cats)] == [(None, 1.0), (0.25, 0.5)]
    assert [s.place for s in (dogs, cats)] == [f"{folder}/data.yaml:{line}" for line in (1, 5)]
    assert [s.name(run) for s in (dogs, cats)] == ["dogs", "cats"]
    validate(run)


def test_a_file_is_parsed_once(folder: Path) -> None:
    run = with_file(folder, "- {folder: dogs, prompt: p}")
    assert read_data_file(run) is read_data_file(run)
    (before,) = read_data_file(run)
    run = with_file(folder, "- {folder: cats, prompt: p}")  # of the same size
    (after,) = read_data_file(run)
    assert (before.changes, after.changes) == (
        {"instance_data_dir": "dogs", "instance_prompt": "p"},
        {"instance_data_dir": "cats", "instance_prompt": "p"},
    )


def test_without_a_file_there_is_one_set_that_changes_nothing() -> None:
    run = config(**BASE)
    assert ALL_IMAGES.options(run) is run
    assert with_data_file(run) is run


def test_a_prior_stands_for_the_options_of_prior_preservation(folder: Path) -> None:
    text = """\
- {folder: dogs, prompt: a sks dog}
- role: prior
  folder: others
  prompt: a dog
  loss_weight: 0.5
"""
    run = with_file(folder, text)
    validate(run)
    resolved = with_data_file(run)
    assert resolved.with_prior_preservation
    assert (resolved.class_data_dir, resolved.class_prompt) == ("others", "a dog")
    assert (resolved.prior_loss_weight, resolved.num_class_images) == (0.5, 1)
    assert with_data_file(resolved) == resolved  # as a training_config.yaml has it
    validate(resolved)
    assert [s.name(run) for s in image_sets(run)] == ["dogs"]


def test_held_out_sets_have_the_options_of_held_out_images(folder: Path) -> None:
    text = """\
- {folder: dogs, prompt: a sks dog}
- role: held_out
  folder: cats
  prompt: a sks cat
  resolution: 24
  mask_data_dir: others
- {role: held_out, folder: others, prompt: a photo, trigger_word: sks}
"""
    run = with_file(
        folder, text, masked_loss=True, held_out_steps=3, max_train_steps=6, stop_when="overfit"
    )
    assert validate(run) == []
    first, second = (s.options(run) for s in image_sets(run, "held_out"))
    assert (first.held_out_data_dir, first.held_out_mask_data_dir) == ("cats", "others")
    assert (first.instance_prompt, first.resolution) == ("a sks cat", 24)
    assert (second.held_out_data_dir, second.held_out_mask_data_dir) == ("others", None)
    assert (second.instance_prompt, second.trigger_word) == ("a photo", "sks")
    resolved = with_data_file(run)
    assert resolved.held_out_data_dir == "cats"  # so that options that need one have an effect
    assert with_data_file(resolved) == resolved
    assert validate(resolved) == []


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("folder: dogs", ["{file}: --data_config must be a list, with a - before each"]),
        ("", ["{file}: --data_config must be a list, with a - before each of its entries"]),
        ("- 3", ["{file}:1: each entry must contain lines of the form `name: value`"]),
        ("- [", ["{file}: --data_config is not YAML: while parsing"]),
        (
            "- folder: dogs\n  prompt: p\n  repeat: 3\n  random_flip: maybe\n  folder_path: x\n"
            "- prompt: q\n  num_train_epochs: 3",
            [
                "{file}:3: repeat is not an option. Did you mean repeats?",
                "{file}:4: random_flip is 'maybe'; it must be true or false",
                "{file}:5: folder_path is called folder here",
                "{file}:7: num_train_epochs is not an option. See help for all options",
                "{file}:6: the set has no folder or dataset. Give the place of its images",
            ],
        ),
        (
            "- folder: dog\n  prompt: p\n  center_crop: true\n- folder: cats",
            [
                "{file}:1: folder is 'dog': there is no such folder. Did you mean",
                "{file}:4: prompt is missing, and 'cats' contains no captions",
            ],
        ),
        (
            "- folder: dogs\n  prompt: p\n  repeats: 0\n  tag_dropout: 1\n  resolution: 20",
            [
                "{file}:3: repeats is 0; it must be at least 1",
                "{file}:4: tag_dropout is 1.0; it must be at least 0 and below 1",
                "{file}:5: resolution is 20; it must be a multiple of 8",
            ],
        ),
        (
            "- folder: dogs\n  prompt: p\n  resolutions: [24, 30, 24]\n"
            "  aspect_ratio_buckets: 16,16",
            [
                "{file}:3: resolutions contains 30; each must be a multiple of 8",
                "{file}:3: resolutions contains 24 twice. Keep one",
                "{file}:3: resolutions and aspect_ratio_buckets exclude each other",
            ],
        ),
        (
            "- folder: dogs\n  dataset: a/b\n  prompt: p",
            ["{file}:1: folder is 'dogs' and dataset is 'a/b', but a run trains on only one"],
        ),
        (
            "- {folder: dogs, prompt: p}\n- folder: others\n  role: held_out\n  repeats: 2\n"
            "  prompt: p\n  loss_weight: 2\n  share: 0.5",
            [
                "{file}:4: repeats cannot be set for a set of role held_out; it must be one of",
                "{file}:7: share cannot be set for a set of role held_out. Leave it out",
                "{file}:6: loss_weight cannot be set for a set of role held_out. Leave it out",
            ],
        ),
        (
            "- {folder: dogs, prompt: p}\n- {role: held_out, folder: cat, prompt: p}\n"
            "- {role: held_out, folder: cats, prompt: p}\n- {role: held_out, prompt: p}",
            [
                "{file}:2: folder is 'cat': there is no such folder",
                "{file}:4: the set has no folder. Give the place of its images",
            ],
        ),
        (
            "- {folder: dogs, prompt: p}\n- {role: held_out, folder: cat, prompt: p}\n"
            "- {role: held_out, folder: cats}\n- role: held_out\n  folder: ./dogs\n  prompt: p",
            [
                "{file}:5: folder is './dogs', which the set at {file}:1 trains on. Held-out",
                "{file}:2: folder is 'cat': there is no such folder. Did you mean",
                "{file}:3: folder is 'cats', which contains no captions, and there is no prompt",
            ],
        ),
        (
            "- {folder: dogs, prompt: p}\n- folder: others\n  role: prior\n  prompt: q\n"
            "  random_flip: true\n  share: 0.2",
            [
                "{file}:5: random_flip cannot be set for a set of role prior",
                "{file}:6: share cannot be set for a set of role prior. Leave it out",
            ],
        ),
        (
            "- {folder: dogs, prompt: p}\n- {folder: others, role: prior}",
            ["{file}:2: with_prior_preservation needs prompt"],
        ),
        (
            "- {folder: dogs, prompt: p}\n- {folder: dogs, role: prior, prompt: q}",
            ["{file}:1: class_data_dir is 'dogs', which must not be the same folder as folder"],
        ),
        (
            "- {folder: dogs, prompt: p}\n- {folder: cats, role: prior, prompt: q}\n"
            "- {folder: others, role: prior, prompt: q}",
            ["{file}:3: a second set of role prior"],
        ),
        ("- {folder: dogs, role: prior, prompt: p}", ["{file}: no set has the role train"]),
        (
            "- folder: dogs\n  prompt: p\n  share: 0.5\n  repeats: 2",
            ["{file}:3: share and repeats exclude each other. Leave one out"],
        ),
        (
            "- {folder: dogs, prompt: p, share: 0.5}\n- {folder: cats, prompt: p, share: 0.4}",
            ["{file}:1: every set has a share, and their sum is 0.9; it must be 1"],
        ),
        (
            "- {folder: dogs, prompt: p, share: 0.5}\n- {folder: cats, prompt: p, share: 0.5}\n"
            "- {folder: others, prompt: p}",
            ["{file}:1: the shares have the sum 1; it must be below 1"],
        ),
        ("- {folder: dogs, prompt: p, share: 1.5}", ["{file}:1: share is 1.5; it must be above 0"]),
    ],
)
def test_every_problem_is_named_with_its_line(folder: Path, text: str, problems: list[str]) -> None:
    found = find_problems(with_file(folder, text))
    wanted = [problem.format(file=folder / "data.yaml") for problem in problems]
    assert len(found) == len(wanted), found
    for problem, start in zip(found, wanted, strict=True):
        assert problem.startswith(start)


@pytest.mark.parametrize(
    "text", ["- {folder: dogs, prompt: p, rnk%d: 8}\n", "- {role: held_out}\n"]
)
def test_a_file_is_not_read_far_beyond_its_problems(folder: Path, text: str) -> None:
    """Each unknown name is compared with all names there are."""
    many = "".join(text.replace("%d", str(i)) for i in range(500))
    with pytest.raises(ConfigError) as caught:
        validate(with_file(folder, many))
    assert 100 <= len(caught.value.problems) <= 202


def test_options_that_the_file_replaces_are_refused(folder: Path) -> None:
    text = "- {folder: dogs, prompt: p}\n- {folder: others, role: prior, prompt: q}"
    run = with_file(folder, text, instance_data_dir="cats", class_data_dir="cats")
    first, second = find_problems(run)
    assert "--instance_data_dir is 'cats', but the data file names the images" in first
    assert second.startswith("--class_data_dir is 'cats', but a set of")
    text = "- {folder: dogs, prompt: p}\n- {folder: others, role: held_out, prompt: q}"
    (problem,) = find_problems(
        with_file(folder, text, held_out_data_dir="cats", instance_prompt="p")
    )
    assert problem.startswith("--held_out_data_dir is 'cats', but a set of")
    text = "- {folder: dogs, prompt: p}"
    (problem,) = find_problems(with_file(folder, text, stop_when="overfit"))
    assert problem.startswith("--stop_when overfit needs images that are not trained on. Give a")
    missing = with_file(folder, text)
    (folder / "data.yaml").unlink()
    (problem,) = find_problems(missing)
    assert problem == f"{folder / 'data.yaml'}: --data_config cannot be read: No such file or " + (
        "directory. Give a YAML file"
    )
    with pytest.raises(ConfigError, match="cannot be read"):
        image_sets(missing)


def test_what_has_no_effect_in_a_set_is_named(folder: Path) -> None:
    text = "- folder: dogs\n  prompt: p\n  mask_data_dir: cats\n- {folder: cats, prompt: p}"
    (warning,) = validate(with_file(folder, text))
    assert warning.startswith(f"{folder}/data.yaml:1: these options have no effect without")
    assert warning.endswith("mask_data_dir")


def test_names_in_a_file_are_unique_and_documented() -> None:
    own = {f.name for f in fields(SetOptions)}
    for role in ("train", "prior", "held_out"):
        names = list(names_in_set(role).values())
        assert len(names) == len(set(names))
        for name in names:
            assert f"`{name}`" in options_table()
    assert all(f"| `{name}` |" in options_table() for name in own)
    assert options_with(TrainingConfig, PerSet)["instance_data_dir"] == PerSet("folder")
