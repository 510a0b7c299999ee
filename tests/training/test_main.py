"""What a user meets who does something wrong: a text, an exit code, and nothing left behind."""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import gralora_diffusion.training.loop as loop
from gralora_diffusion.adapters.layers import GraloraLayer
from gralora_diffusion.training.main import main
from gralora_diffusion.training.runtime.folder_lock import owned
from tests.models import stable_diffusion
from tests.training.runs import (
    arguments,
    assert_same_run,
    fork,
    make_images,
    make_shapes,
    run,
)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    logger = logging.getLogger("gralora_diffusion")
    level = logger.level
    yield
    logger.setLevel(level)


def error_of(capsys: pytest.CaptureFixture[str], code: int, **options: Any) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments(**options))
    text = capsys.readouterr().err
    assert caught.value.code == code, text
    assert "Traceback" not in text
    return text[text.index("error: ") :]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rank": 6, "gralora_k": 4}, r"--rank is 6 and --gralora_k is 4; k must divide the rank"),
    (
        {"instance_data_dir": "nowhere"},
        r"--instance_data_dir is 'nowhere': there is no such folder",
    ),
    ({"pretrained_model_name_or_path": "./no"}, r"--pretrained_model_name_or_path is './no'"),
    ({"pretrained_model_name_or_path": None}, r"--pretrained_model_name_or_path is missing"),
    ({"target_preset": "atention"}, r"--target_preset is 'atention'; .*unet.* attention\+ff"),
    (
        {"train_text_encoder": True, "text_encoder_target_preset": "all"},
        r"--text_encoder_target_preset is 'all'; .*text_encoder.* attention, attention\+ff",
    ),
    ({"family": "sdxl"}, r"--family is 'sdxl'; it must be one of .*stable-diffusion"),
    ({"with_prior_preservation": True}, r"--with_prior_preservation needs --class_prompt"),
    (
        {"rank_pattern": ["to_(q=8"]},
        r"--rank_pattern contains 'to_\(q=8': 'to_\(q' is not a regular",
    ),
    ({"optimizer": "adamv"}, r"--optimizer is 'adamv'; it must be one of .*adamw"),
    ({"learning_rate": "fast"}, r"--learning_rate is 'fast'; it must be a number"),
    ({"learing_rate": 1}, r"--learing_rate is not an option. Did you mean --learning_rate"),
    ({"resume_from_checkpoint": "checkpoint-7"}, r"checkpoint-7, but there is no such checkpoint"),
    ({"resolution": 17}, r"--resolution is 17; it must be a multiple of 8"),
    ({"mixed_precision": "fp8"}, r"--mixed_precision is 'fp8'; it must be one of"),
    ({"lr_scheduler": "cosinus"}, r"--lr_scheduler is 'cosinus'; .* Did you mean cosine"),
    ({"config": "none.yaml"}, r"none.yaml: --config cannot be read: No such file"),
    ({"push_to_hub": True}, r"--push_to_hub: the repository out cannot be created"),
]


@pytest.mark.parametrize(
    ("options", "text"), WRONG, ids=lambda v: "-".join(v) if isinstance(v, dict) else ""
)
def test_wrong_options_leave_nothing_and_load_no_model(
    base: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    text: str,
) -> None:
    def no_model(*arguments: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loop, "load_base", no_model)
    usual = {"pretrained_model_name_or_path": base, "instance_data_dir": images}
    got = error_of(capsys, 2, **{**usual, "output_dir": tmp_path / "out", **options})
    assert re.search(text, got, re.DOTALL), got
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", ["instance", "class", "empty", "stray"])
def test_wrong_images_are_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str
) -> None:
    folder = make_images(tmp_path / "pictures")
    options: dict[str, Any] = {"pretrained_model_name_or_path": base, "instance_data_dir": folder}
    if which == "class":
        classes = make_images(tmp_path / "class", 2)
        options |= {"with_prior_preservation": True, "class_prompt": "a dog"}
        options |= {"class_data_dir": classes, "num_class_images": 5}
        (classes / "bad.png").write_bytes(b"no picture")
    elif which == "instance":
        (folder / "bad.png").write_bytes(b"no picture")
    else:
        for file in folder.iterdir():
            file.unlink()
        if which == "stray":
            (folder / "notes.md").write_text("no picture", encoding="utf-8")
    got = error_of(capsys, 2, output_dir=tmp_path / "out", **options)
    named = {"empty": "is empty", "stray": "notes.md"}.get(which, "bad.png cannot be decoded")
    assert named in got
    assert not (tmp_path / "out").exists()


def test_layers_that_cannot_be_adapted_are_all_named(
    base: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    got = error_of(
        capsys,
        2,
        pretrained_model_name_or_path=base,
        instance_data_dir=images,
        output_dir=tmp_path / "out",
        lora_layers="norm1,norm2",
    )
    assert "--rank, --gralora_k, --lora_layers or --target_preset do not fit the base" in got
    layers = got.count("Norm, which is not supported")
    assert layers > 8
    assert f"{layers} of {layers} target layers" in got
    assert not (tmp_path / "out").exists()


def test_widths_that_k_does_not_divide_get_a_smaller_one(
    base: Path, images: Path, tmp_path: Path
) -> None:
    """It is reported and stored in the adapter: widths are powers of two."""
    options = {"pretrained_model_name_or_path": base, "instance_data_dir": images}
    options |= {"max_train_steps": 1, "rank": 6, "gralora_k": 3, "lora_alpha": 3}
    options |= {"alpha_pattern": ["to_q=12"], "output_dir": tmp_path / "out"}
    code, text = fork(**options).wait()
    assert code == 0, text
    assert "unet: k is lowered to 2 on 32 of 32 layers, as their widths require: " in text
    pipe = stable_diffusion()
    pipe.load_gralora_weights(tmp_path / "out")
    for path, layer in pipe.unet.named_modules():
        if isinstance(layer, GraloraLayer):
            assert layer.gralora_k == {"default": 2}
            assert layer.scaling == {"default": 2.0 if path.endswith("to_q") else 0.5}


@pytest.mark.parametrize("holder", ["run", "benchmark", "class"])
def test_a_folder_of_another(
    base: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], holder: str
) -> None:
    """Nothing is written into it, whatever the run would have overwritten."""
    folder = tmp_path / ("class" if holder == "class" else "out")
    folder.mkdir()
    (folder / ("benchmark.yaml" if holder == "benchmark" else "kept.txt")).touch()
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        "output_dir": tmp_path / "out",
        "overwrite_output_dir": True,
    }
    if holder == "class":
        options |= {"with_prior_preservation": True, "class_prompt": "a dog"}
        options |= {"class_data_dir": folder, "num_class_images": 1}
    with ExitStack() as held:
        if holder != "benchmark":
            held.enter_context(owned(folder, ""))
        before = sorted(folder.iterdir())
        text = error_of(capsys, 2, **options)
        assert sorted(folder.iterdir()) == before
    name = "--class_data_dir" if holder == "class" else "--output_dir"
    why = (
        "belongs to a benchmark (benchmark.yaml)"
        if holder == "benchmark"
        else "is in use by process"
    )
    assert f"{name} '{folder}' {why}" in text
    assert len(list(folder.iterdir())) == 1
    assert folder.name == "out" or not (tmp_path / "out").exists()


def test_nan_ends_with_one(
    base: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"pretrained_model_name_or_path": base, "instance_data_dir": images}
    options |= {"learning_rate": 1e30, "checkpointing_steps": 1}
    got = error_of(capsys, 1, output_dir=tmp_path / "out", **options)
    assert f"Last checkpoint: {tmp_path / 'out' / 'checkpoint-'}" in got


def test_full_disk_outside_of_checkpoints(
    base: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(loop.MetricsFile, "add", full)
    options = {"pretrained_model_name_or_path": base, "instance_data_dir": images}
    got = error_of(capsys, 1, output_dir=tmp_path / "out", **options)
    assert "No space left on device" in got
    assert "No checkpoint was written yet (--checkpointing_steps is 1000)" in got
    assert "--resume_from_checkpoint" not in got  # which would start from the beginning


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 9 bytes")])
def test_out_of_memory_ends_in_one_message(
    base: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def full(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(loop.Trainer, "_optimizer_step", full)
    options = {"pretrained_model_name_or_path": base, "instance_data_dir": images}
    got = error_of(capsys, 1, output_dir=tmp_path / "out", **options)
    (line,) = [text for text in got.splitlines() if text.startswith("error: ")]
    assert line.startswith("error: out of memory: ")
    assert ". To need less, give a lower --resolution (it is 16), --gradient_checkpointing" in line


@pytest.mark.parametrize("buckets", [False, True])
def test_killed_at_any_moment_and_resumed(base: Path, tmp_path: Path, buckets: bool) -> None:
    sizes = [(30, 20), (20, 30), (20, 20), (40, 20), (31, 21)] if buckets else [(27, 20)] * 3
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": make_shapes(tmp_path / "pictures", sizes),
        "use_aspect_ratio_buckets": buckets,
        "max_train_steps": 20,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 2,
        "train_text_encoder": True,
        "lora_dropout": 0.1,
        "use_ema": True,
    }
    if buckets:
        options |= {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 4}
        shapes = [(20, 40), (20, 40), (20, 40), (40, 20)]
        options["class_data_dir"] = make_shapes(tmp_path / "class", shapes, seed=1)
    whole = run(output_dir=tmp_path / "whole", **options)
    options |= {"output_dir": tmp_path / "out", "resume_from_checkpoint": "latest"}
    killed = fork(**options)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("checkpoint-3*")) and time.monotonic() < deadline:
        assert not killed.process.exitcode
        time.sleep(0.01)
    killed.process.kill()
    killed.wait(60)
    code, text = fork(**options).wait()
    assert code == 0, text[-3000:]
    assert_same_run(whole, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".unfinished*"))
