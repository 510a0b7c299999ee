"""A resumed run is the run that was never stopped."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.checkpointing import save_accelerator_state, save_custom_state
from safetensors.torch import load_file, save_file

from gralora_diffusion.io.errors import CheckpointError
from gralora_diffusion.training.checkpoints.resume import PROGRESS_NAME
from gralora_diffusion.training.checkpoints.state import RunState, _load_tensors
from tests.training.runs import assert_close, assert_same_run, make_images, metrics, run

SAVED: dict[str, Any] = {"checkpointing_steps": 2}


def stopped_after(step: int, whole: Path, folder: Path) -> Path:
    """What ``whole`` left on the disk when it was at ``step``, and a little further."""
    folder.mkdir()
    shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    rows = (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n".join([*rows[: step + 1], rows[step + 1][:9]])  # killed in the middle of a line
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.2, "random_flip": True, "gradient_accumulation_steps": 2},
        {
            "train_text_encoder": True,
            "optimizer": "schedulefree",
            "hybrid_rank": 2,
            "rank_pattern": ["to_q=8", "q_proj=2"],
            "k_pattern": ["to_v=1"],
        },
        {
            "use_ema": True,
            "lr_scheduler": "cosine",
            "cache_latents": False,
            "noise_offset": 0.1,
            "input_perturbation": 0.1,
            "multires_noise_iterations": 3,
            "min_timestep": 200,
            "max_timestep": 900,
        },
        {
            "optimizer": "prodigy",
            "learning_rate": 1,
            "lr_scheduler": "linear",
            "snr_gamma": 5,
            "soft_min_snr": True,
        },
        {
            "optimizer": "adafactor",
            "loraplus_lr_ratio": 4.0,
            "caption_dropout": 0.5,
            "loss_type": "smooth_l1",
            "gradient_checkpointing": True,
        },
        {
            "with_prior_preservation": True,
            "prior_source": "teacher",
            "class_prompt": "a dog",
            "debiased_estimation_loss": True,
            "lr_scheduler": "piecewise_constant",
            "lr_step_rules": "1:3,0.1:5,0.01",
        },
        {
            "with_prior_preservation": True,
            "class_prompt": "a dog",
            "num_class_images": 4,
            "train_text_encoder": True,
            "lr_scheduler": "constant_with_warmup",
            "lr_warmup_steps": 3,
        },
        {"cache_latents": False, "dataloader_num_workers": 2, "random_flip": True},
        {"mixed_precision": "bf16", "train_text_encoder": True, "lr_scheduler": "polynomial"},
    ],
    ids=lambda options: "-".join(str(v) for v in options.values())[:60],
)
def test_resumed_run_ends_as_the_uninterrupted_one(
    base: Path, images: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    if options.get("num_class_images"):
        classes = make_images(tmp_path / "class", 4, seed=1)
        options = {**options, "class_data_dir": classes}
    shared = {
        **SAVED,
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        **options,
    }
    whole = run(output_dir=tmp_path / "whole", **shared)
    half = stopped_after(2, whole, tmp_path / "half")
    run(output_dir=half, resume_from_checkpoint="latest", **shared)
    assert_same_run(whole, half)


def test_accumulation_may_change_on_resume(base: Path, images: Path, tmp_path: Path) -> None:
    """accelerate counts passes: three done one by one must not be half of a step of two."""
    shared: dict[str, Any] = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        "checkpointing_steps": 3,
    }
    whole = run(output_dir=tmp_path / "whole", **shared)
    half = stopped_after(3, whole, tmp_path / "half")
    shared |= {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    run(output_dir=half, resume_from_checkpoint="latest", **shared)
    assert_close(whole, half, 1e-3)
    losses = [[row["loss"] for row in metrics(folder)] for folder in (whole, half)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# -- what a checkpoint may hold --------------------------------------------------------------------


def without_hashes(checkpoint: Path) -> None:
    """Make a checkpoint one of a version that wrote no hashes of its files."""
    progress = json.loads((checkpoint / PROGRESS_NAME).read_text(encoding="utf-8"))
    progress.pop("files", None)
    (checkpoint / PROGRESS_NAME).write_text(json.dumps(progress), encoding="utf-8")


def save_with_accelerate(self: RunState, folder: Path) -> None:
    """Write a checkpoint as version 0.1.0 did: everything besides the adapter by accelerate."""
    written_now(self, folder)
    for name in ("ema.safetensors", "optimizer.bin"):
        (folder / name).unlink(missing_ok=True)
    progress = json.loads((folder / PROGRESS_NAME).read_text(encoding="utf-8"))
    del progress["state"]
    (folder / PROGRESS_NAME).write_text(json.dumps(progress), encoding="utf-8")
    without_hashes(folder)
    save_accelerator_state(str(folder), [], [self.optimizer], [], [], 0, 0, self.accelerator.scaler)
    parts = [part for part in (self.lr_scheduler, self.ema) if part is not None]
    for index, part in enumerate(parts):
        save_custom_state(part, str(folder), index)


written_now = RunState.save


@pytest.mark.parametrize(
    "options",
    [
        {"use_ema": True, "lr_scheduler": "cosine"},
        {"optimizer": "schedulefree"},
        {"optimizer": "prodigy", "learning_rate": 1, "lr_scheduler": "linear"},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_checkpoints_of_accelerate_are_gone_on_with_exactly(
    base: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    shared = {
        **SAVED,
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        **options,
    }
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "save", save_with_accelerate)
        whole = run(output_dir=tmp_path / "whole", **shared)
    half = stopped_after(2, whole, tmp_path / "half")
    assert (half / "checkpoint-2" / "random_states_0.pkl").exists()
    run(output_dir=half, resume_from_checkpoint="latest", **shared)
    assert_same_run(whole, half)


class Program:
    """Makes a file when a pickle of it is read by who trusts it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("of_accelerate", [False, True])
def test_no_program_in_a_checkpoint_is_run(
    base: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    of_accelerate: bool,
) -> None:
    if of_accelerate:
        monkeypatch.setattr(RunState, "save", save_with_accelerate)
    shared: dict[str, Any] = {"pretrained_model_name_or_path": base, "instance_data_dir": images}
    shared |= {**SAVED, "use_ema": True, "max_train_steps": 2}
    whole = run(output_dir=tmp_path / "whole", **shared)
    files = sorted(path.name for path in (whole / "checkpoint-2").iterdir())
    pickles = [name for name in files if not name.endswith((".safetensors", ".json"))]
    if not of_accelerate:
        assert pickles == ["optimizer.bin"]
    for name in pickles:
        folder = tmp_path / name
        shutil.copytree(whole / "checkpoint-2", folder / "checkpoint-2")
        mark = tmp_path / f"{name}-ran"
        torch.save({"x": Program(mark)}, folder / "checkpoint-2" / name)
        without_hashes(folder / "checkpoint-2")
        again = {**shared, "output_dir": folder, "resume_from_checkpoint": "latest"}
        if name.startswith("random_states"):
            run(**again)  # which is not read
        else:
            with pytest.raises(CheckpointError) as caught:
                run(**again)
            assert f"{name} is damaged, or contains code that could run" in str(caught.value)
            assert "Resume from an earlier checkpoint" in str(caught.value)
            assert "weights_only" not in str(caught.value)  # torch's advice to trust the file
        assert not mark.exists()


def test_old_formats_of_torch_are_not_read(tmp_path: Path) -> None:
    """torch unpacks the oldest, an archive by tar, into a folder. No version wrote them."""
    path = tmp_path / "optimizer.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"optimizer\.bin is damaged"):
        _load_tensors(path)
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(ValueError, match=r"optimizer\.bin is damaged"):
        _load_tensors(path)
    torch.save({"a": torch.ones(2)}, path)
    assert torch.equal(_load_tensors(path)["a"], torch.ones(2))


@pytest.fixture(scope="module")
def averaged(base: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with an average of its weights and a checkpoint."""
    options: dict[str, Any] = {"pretrained_model_name_or_path": base, "instance_data_dir": images}
    options |= {**SAVED, "use_ema": True, "max_train_steps": 2}
    return run(output_dir=tmp_path_factory.mktemp("averaged") / "out", **options)


def damaged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "0": torch.zeros(3, 3)}


@pytest.mark.parametrize(
    "what", ["schedule", "ema", "shape of ema", "shape of optimizer", "tail", "device"]
)
def test_a_damaged_checkpoint_is_told(
    base: Path, images: Path, averaged: Path, tmp_path: Path, what: str
) -> None:
    shared: dict[str, Any] = {"pretrained_model_name_or_path": base, "instance_data_dir": images}
    shared |= {**SAVED, "use_ema": True, "max_train_steps": 2, "output_dir": tmp_path / "out"}
    checkpoint = shutil.copytree(averaged, tmp_path / "out") / "checkpoint-2"
    without_hashes(checkpoint)  # of versions that had only the checks below
    progress = json.loads((checkpoint / PROGRESS_NAME).read_text(encoding="utf-8"))
    if what in ("schedule", "ema"):
        progress["state"][what] = {"last_epoch": None, "decay": "x"}
    elif what == "shape of ema":
        save_file(
            damaged(load_file(checkpoint / "ema.safetensors")), checkpoint / "ema.safetensors"
        )
    elif what == "device":
        (checkpoint / "optimizer.bin").unlink()
        (checkpoint / "optimizer.bin").symlink_to("/dev/zero")
    elif what == "shape of optimizer":
        state = torch.load(checkpoint / "optimizer.bin", weights_only=True)
        state["state"][0]["exp_avg"] = torch.zeros(1, 1, 1)
        torch.save(state, checkpoint / "optimizer.bin")
    else:
        whole = (checkpoint / "optimizer.bin").read_bytes()
        (checkpoint / "optimizer.bin").write_bytes(whole[: len(whole) // 2])
    (checkpoint / PROGRESS_NAME).write_text(json.dumps(progress), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cannot be resumed from: .* Resume from an earlier"):
        run(resume_from_checkpoint="latest", **shared)


@pytest.mark.parametrize("name", ["training_weights.safetensors", "optimizer.bin", "none"])
def test_files_that_were_not_written_together_are_refused(
    base: Path, images: Path, averaged: Path, tmp_path: Path, name: str
) -> None:
    """A state that lacks a parameter's moments could be read, and would start anew."""
    shared: dict[str, Any] = {"pretrained_model_name_or_path": base, "instance_data_dir": images}
    shared |= {**SAVED, "use_ema": True, "max_train_steps": 2, "output_dir": tmp_path / "out"}
    checkpoint = shutil.copytree(averaged, tmp_path / "out") / "checkpoint-2"
    if name == "none":
        (checkpoint / "ema.safetensors").unlink()
        name = "ema.safetensors"
    elif name == "optimizer.bin":
        state = torch.load(checkpoint / name, weights_only=True)
        del state["state"][0]
        torch.save(state, checkpoint / name)
    else:
        tensors = load_file(checkpoint / name)
        tensors[min(tensors)] += 1
        save_file(tensors, checkpoint / name, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} is not the file that was written with"):
        run(resume_from_checkpoint="latest", **shared)
