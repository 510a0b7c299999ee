"""Runs with held-out images: nothing about the training changes, and it ends when it overfits."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gralora_diffusion.training.checkpoints.resume import PROGRESS_NAME
from gralora_diffusion.training.runtime.control import read_status
from tests.training.runs import (
    adapter,
    assert_same_run,
    learned,
    make_images,
    metrics,
    run,
    run_two,
)


@pytest.fixture
def data(base: Path, images: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        "held_out_data_dir": make_images(tmp_path / "held out", 3, seed=1),
    }


def same(first: Path, second: Path) -> bool:
    a, b = adapter(first), adapter(second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "options",
    [
        {"use_ema": True, "train_text_encoder": True, "caption_dropout": 0.3},
        {"optimizer": "schedulefree", "cache_latents": False, "gradient_accumulation_steps": 2},
    ],
    ids=["EMA and text encoder", "schedule-free"],
)
def test_measuring_changes_nothing(
    data: dict[str, Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    options |= {"lora_dropout": 0.2, "random_flip": True}
    measured = run(output_dir=tmp_path / "measured", **data, **options, held_out_steps=2)
    del data["held_out_data_dir"]
    plain = run(output_dir=tmp_path / "plain", **data, **options)
    assert same(measured, plain)
    rows = learned(measured)
    assert [row["step"] for row in rows if "held_out" in row] == [0, 2, 4, 6]
    without = [{k: v for k, v in row.items() if k != "held_out"} for row in rows[1:]]
    assert without == learned(plain)


def test_a_set_of_a_data_file_is_measured_as_the_options_say(
    data: dict[str, Any], tmp_path: Path
) -> None:
    options = {"held_out_steps": 1, "max_train_steps": 2}
    plain = run(output_dir=tmp_path / "plain", **data, **options)
    file = tmp_path / "data.yaml"
    folders = data.pop("instance_data_dir"), data.pop("held_out_data_dir")
    file.write_text(f"- folder: {folders[0]}\n- role: held_out\n  folder: {folders[1]}\n")
    by_set = run(output_dir=tmp_path / "set", data_config=file, **data, **options)
    assert_same_run(plain, by_set)
    assert same(plain / "best", by_set / "best")

    # the same images as two sets, in the same order
    for number, name in enumerate(("0.png", "1.png", "2.png")):
        (part := tmp_path / f"part {number > 1}").mkdir(exist_ok=True)
        shutil.copyfile(folders[1] / name, part / name)
    sets = [f"- {{role: held_out, folder: {tmp_path}/part {more}}}" for more in (False, True)]
    file.write_text("\n".join([f"- folder: {folders[0]}", *sets]))
    by_sets = run(output_dir=tmp_path / "sets", data_config=file, **data, **options)
    assert_same_run(plain, by_sets)


OVERFIT: dict[str, Any] = {
    "checkpointing_steps": 1,
    "held_out_steps": 2,
    "stop_when": "overfit",
    "overfit_patience": 2,
    "resume_from_checkpoint": "latest",
}


def test_a_run_ends_when_it_overfits_and_keeps_its_best(
    data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So few steps do not overfit; the best losses in a checkpoint are made better than any."""
    options = {**data, **OVERFIT}
    whole = run(output_dir=tmp_path / "whole", **options, max_train_steps=2)
    path = whole / "checkpoint-2" / PROGRESS_NAME
    progress = json.loads(path.read_text(encoding="utf-8"))
    record, best = progress["held_out"], progress["held_out"]["best_step"]
    record["best"] = [[loss - 1 for loss in row] for row in record["best"]]
    path.write_text(json.dumps(progress), encoding="utf-8")
    kept = adapter(whole / "best")
    capsys.readouterr()

    run(output_dir=whole, **options, max_train_steps=14)
    shown = capsys.readouterr().out
    assert "ended at step 6 of 14: the loss of the held-out images was worse than" in shown
    assert f"at step {best} by more than its 95% interval in 2 measurements in a row" in shown
    assert str(whole / "best") in shown
    assert f"at step {best}, which is the best" in (whole / "README.md").read_text("utf-8")
    assert read_status(whole).state == "finished"
    assert same(whole, whole / "checkpoint-6")
    assert all(torch.equal(tensor, kept[key]) for key, tensor in adapter(whole / "best").items())

    # resumed: it has ended, and has nothing left to do
    before = learned(whole)
    run(output_dir=whole, **options, max_train_steps=14)
    assert "ended at step 6 of 14" in capsys.readouterr().out
    assert learned(whole) == before

    # killed after the first worse measurement
    parts = tmp_path / "parts"
    shutil.copytree(whole / "checkpoint-5", parts / "checkpoint-5")
    shutil.copyfile(whole / "metrics.jsonl", parts / "metrics.jsonl")
    run(output_dir=parts, **options, max_train_steps=14)
    assert_same_run(whole, parts)
    assert same(whole / "best", parts / "best")

    # a higher patience goes on from there
    run(output_dir=parts, **{**options, "overfit_patience": 9}, max_train_steps=8)
    assert [row["step"] for row in metrics(parts)] == list(range(9))
    assert same(whole / "best", parts / "best")


def test_a_checkpoint_takes_back_a_later_best(data: dict[str, Any], tmp_path: Path) -> None:
    options = {**data, "checkpointing_steps": 3, "held_out_steps": 2}
    whole = run(output_dir=tmp_path / "whole", **options)
    parts = tmp_path / "parts"
    run(output_dir=parts, **options, max_train_steps=4)
    shutil.rmtree(parts / "checkpoint-3")
    run(output_dir=parts, **{**options, "max_train_steps": 3}, overwrite_output_dir=True)
    shutil.copytree(whole / "best", parts / "best", dirs_exist_ok=True)  # of a later step
    run(output_dir=parts, resume_from_checkpoint="latest", **options)
    assert same(whole / "best", parts / "best")
    assert learned(whole) == learned(parts)


def test_other_held_out_images_begin_anew(
    data: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"checkpointing_steps": 2, "held_out_steps": 2}
    out = run(output_dir=tmp_path / "out", **data, **options, max_train_steps=2)
    data["held_out_data_dir"] = make_images(tmp_path / "others", 2, seed=5)
    with caplog.at_level(logging.WARNING):
        run(output_dir=out, resume_from_checkpoint="latest", **data, **options, max_train_steps=4)
    assert "the checkpoint has no measurements of these held-out images" in caplog.text
    assert [row["held_out"]["images"] for row in metrics(out) if "held_out" in row] == [3, 3, 2]
    assert same(out / "best", out)  # the only measurement of the new images

    # without held-out images, nothing is measured; a new run in the folder has no best
    del data["held_out_data_dir"]
    run(output_dir=out, overwrite_output_dir=True, **data, max_train_steps=2)
    assert not (out / "best").exists()


def test_two_processes_share_the_images(data: dict[str, Any], tmp_path: Path) -> None:
    """Three images: one process measures one more than it has to."""
    options = {**data, "held_out_steps": 1, "max_train_steps": 1, "adam_epsilon": 1e-4}
    one = run(output_dir=tmp_path / "one", **options, train_batch_size=2)
    two = run_two(output_dir=tmp_path / "two", **options, train_batch_size=1)
    for ours, theirs in zip(metrics(one), metrics(two), strict=True):
        for key, value in ours["held_out"].items():
            assert theirs["held_out"][key] == pytest.approx(value, rel=1e-3, abs=1e-6)
