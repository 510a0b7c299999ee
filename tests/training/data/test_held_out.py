"""Held-out images: found as the subject's are, and never trained on."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.training.checkpoints.store import CheckpointStore
from gralora_diffusion.training.checks.options import find_problems, find_warnings
from gralora_diffusion.training.config.data_file import with_data_file
from gralora_diffusion.training.data.data_module import find_images
from gralora_diffusion.training.data.held_out import find_held_out_images, held_out_config
from gralora_diffusion.training.data.sets import by_set
from gralora_diffusion.training.preparation import find_beginning
from gralora_diffusion.training.runtime.acceleration import (
    accelerate_left_as_it_was,
    make_accelerator,
)
from tests.training.runs import config, make_images


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    return make_images(tmp_path / "held out", 3, seed=1)


def test_captions_are_those_of_the_subject(held_out: Path, images: Path) -> None:
    (held_out / "1.txt").write_text("a sks dog in snow")
    chosen = config(instance_data_dir=images, held_out_data_dir=held_out)
    found = find_held_out_images(chosen, {"--instance_data_dir": find_images(chosen)})
    assert [example.caption for example in found] == ["a sks dog", "a sks dog in snow", "a sks dog"]
    assert find_held_out_images(config(instance_data_dir=images), {}) == []


def test_images_that_are_trained_on_are_refused_all_at_once(
    base: Path, held_out: Path, images: Path, tmp_path: Path
) -> None:
    classes = make_images(tmp_path / "class", 2, seed=2)
    shutil.copyfile(images / "1.png", held_out / "x.png")
    shutil.copyfile(classes / "0.png", held_out / "y.png")
    shutil.copyfile(held_out / "2.png", held_out / "z.png")
    chosen = config(
        pretrained_model_name_or_path=base,
        instance_data_dir=images,
        held_out_data_dir=held_out,
        output_dir=tmp_path / "out",
        with_prior_preservation=True,
        class_prompt="a dog",
        class_data_dir=classes,
        num_class_images=2,
    )
    with accelerate_left_as_it_was(), pytest.raises(DataError) as error:
        find_beginning(chosen, CheckpointStore(chosen.output_dir), make_accelerator(chosen))
    text = str(error.value)
    assert "x.png is the same image as 1.png of --instance_data_dir" in text
    assert "y.png is the same image as 0.png of --class_data_dir" in text
    assert "2.png and z.png are the same image, which would count 2 times" in text
    assert len(error.value.problems) == 3


def test_sets_of_a_data_file_keep_their_settings_and_are_compared_with_each_other(
    held_out: Path, images: Path, tmp_path: Path
) -> None:
    other = make_images(tmp_path / "other", 2, seed=4)
    file = tmp_path / "data.yaml"
    file.write_text(
        f"- {{folder: {images}, prompt: a sks dog}}\n"
        f"- {{role: held_out, folder: {held_out}, prompt: a sks cat, trigger_word: sks}}\n"
        f"- {{role: held_out, folder: {other}, prompt: a fox, resolution: 24}}\n"
    )
    chosen = with_data_file(config(data_config=file, instance_prompt=None))
    found = find_held_out_images(chosen, {})
    assert [example.caption for example in found] == ["a sks cat"] * 3 + ["a fox"] * 2
    measured = held_out_config(chosen)
    own = {own.trigger_word: own.resolution for _, own, _ in by_set(measured, found)}
    assert own == {"sks": 16, None: 24}
    assert all(own.center_crop for _, own, _ in by_set(measured, found))

    shutil.copyfile(images / "1.png", other / "x.png")
    shutil.copyfile(held_out / "2.png", other / "z.png")
    with pytest.raises(DataError) as error:
        find_held_out_images(chosen, {"--data_config": find_images(chosen)})
    assert "x.png is the same image as 1.png of --data_config" in str(error.value)
    assert "2.png and z.png are the same image" in str(error.value)

    (held_out / "1.png").write_bytes(b"no image")
    (other / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError) as error:
        find_held_out_images(chosen, {})
    assert [
        f"{file}:{line}: {name} cannot" in str(error.value)
        for line, name in ((2, "1.png"), (3, "0.png"))
    ] == [True, True]


def test_control_images_of_a_folder_of_their_own(held_out: Path, tmp_path: Path) -> None:
    before = make_images(tmp_path / "before", 2, seed=3)
    chosen = config(held_out_data_dir=held_out, held_out_control_data_dir=before)
    with pytest.raises(DataError, match=r"--held_out_control_data_dir .* no control image for 2"):
        find_held_out_images(chosen, {})
    make_images(before, 3, seed=3)
    found = find_held_out_images(chosen, {})
    paths = [control.source for example in found for control in example.controls]
    assert paths == [before / f"{number}.png" for number in range(3)]


def test_an_interval_needs_two_images(tmp_path: Path) -> None:
    chosen = config(held_out_data_dir=make_images(tmp_path / "one", 1), stop_when="overfit")
    with pytest.raises(DataError, match="needs an interval over the images, and there is only one"):
        find_held_out_images(chosen, {})


def test_bad_images_are_skipped_or_refused_as_others_are(
    held_out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (held_out / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"(?s)--held_out_data_dir .*1\.png"):
        find_held_out_images(config(held_out_data_dir=held_out), {})
    with caplog.at_level(logging.WARNING):
        found = find_held_out_images(config(held_out_data_dir=held_out, skip_bad_images=True), {})
    assert len(found) == 2
    assert "1.png" in caplog.text


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"held_out_data_dir": "images"}, "which is also --instance_data_dir"),
        ({"held_out_data_dir": "none"}, "there is no such folder"),
        ({"held_out_data_dir": "empty"}, "this folder is empty"),
        ({"stop_when": "overfit"}, "--stop_when overfit needs --held_out_data_dir"),
        ({"held_out_mask_data_dir": "empty"}, "--held_out_mask_data_dir is .*: this folder is"),
        ({"held_out_steps": 0}, "--held_out_steps is 0; it must be at least 1"),
    ],
)
def test_options_that_cannot_be_followed(
    images: Path, held_out: Path, tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"images": images, "none": tmp_path / "none", "empty": tmp_path / "empty"}
    given = {name: places.get(str(value), value) for name, value in options.items()}
    if "stop_when" not in given:
        given = {"held_out_data_dir": held_out, **given}
    found = find_problems(config(instance_data_dir=images, **given))
    assert any(problem.split(".*")[0] in text for text in found), found


def test_a_run_that_is_too_short_to_be_measured_is_told_so(held_out: Path) -> None:
    chosen = config(held_out_data_dir=held_out, max_train_steps=6, held_out_steps=7)
    assert any("only measured before the first step" in w for w in find_warnings(chosen))


def test_nothing_is_random_about_a_held_out_sample(images: Path) -> None:
    chosen = config(
        instance_data_dir=images,
        random_flip=True,
        caption_dropout=0.5,
        shuffle_tags=True,
        tag_dropout=0.5,
        control_dropout=0.5,
    )
    measured = held_out_config(chosen)
    assert measured.center_crop
    assert not measured.random_flip
    assert not any([measured.caption_dropout, measured.tag_dropout, measured.control_dropout])
    assert not measured.shuffle_tags
    assert measured.seed != chosen.seed
