"""A resumed run is the run that was never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import assert_close, assert_same_run, make_pictures, metrics, run


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
        {"use_ema": True, "lr_scheduler": "cosine", "cache_latents": False, "noise_offset": 0.1},
        {"optimizer": "prodigy", "learning_rate": 1, "lr_scheduler": "linear", "snr_gamma": 5},
        {"optimizer": "adafactor", "caption_dropout": 0.5, "gradient_checkpointing": True},
        {
            "with_prior_preservation": True,
            "prior_source": "teacher",
            "class_prompt": "a dog",
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
    base: Path, pictures: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    if options.get("num_class_images"):
        classes = make_pictures(tmp_path / "class", 4, seed=1)
        options = {**options, "class_data_dir": classes}
    shared = {"pretrained_model_name_or_path": base, "instance_data_dir": pictures, **options}
    whole = run(output_dir=tmp_path / "whole", **shared)
    half = stopped_after(2, whole, tmp_path / "half")
    run(output_dir=half, resume_from_checkpoint="latest", **shared)
    assert_same_run(whole, half)


def test_accumulation_may_change_on_resume(base: Path, pictures: Path, tmp_path: Path) -> None:
    """accelerate counts passes: three done one by one must not be half of a step of two."""
    shared: dict[str, Any] = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": pictures,
        "checkpointing_steps": 3,
    }
    whole = run(output_dir=tmp_path / "whole", **shared)
    half = stopped_after(3, whole, tmp_path / "half")
    shared |= {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    run(output_dir=half, resume_from_checkpoint="latest", **shared)
    assert_close(whole, half, 1e-3)
    losses = [[row["loss"] for row in metrics(folder)] for folder in (whole, half)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
