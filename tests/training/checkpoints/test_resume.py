"""A checkpoint of another run is refused before any work, and one of this run is not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gralora_diffusion.io.errors import CheckpointError, ConfigError
from gralora_diffusion.training import loop
from gralora_diffusion.training.checkpoints.resume import (
    PROGRESS_NAME,
    check_base,
    check_options,
    deciding_options,
    describe_base,
    read_progress,
)
from gralora_diffusion.training.config.training_config import TrainingConfig
from tests.models import adapt, stable_diffusion
from tests.training.runs import assert_same_run, run

TEACHER = {"with_prior_preservation": True, "prior_source": "teacher", "class_prompt": "a dog"}


def checkpoint(folder: Path, base: Any = None, **options: Any) -> Path:
    """A checkpoint of nothing but what it says of its run."""
    progress = {"step": 2, "options": deciding_options(TrainingConfig(**options)), "base": base}
    (folder / PROGRESS_NAME).write_text(json.dumps(progress), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("there", "here", "told"),
    [
        ({}, {"snr_gamma": 5.0}, ["--snr_gamma None there, 5.0 here"]),
        (
            {"noise_offset": 0.1, "prediction_type": "epsilon"},
            {},
            ["--noise_offset 0.1 there, 0.0 here", "--prediction_type epsilon there, None here"],
        ),
        ({}, {"flow_shift": 3.0}, ["--flow_shift None there, 3.0 here"]),
        ({}, TEACHER, ["--with_prior_preservation False there, True here"]),
        (TEACHER, {}, ["--with_prior_preservation True there, False here"]),
        (
            TEACHER,
            {**TEACHER, "class_prompt": "a cat", "prior_loss_weight": 0.5},
            ["--class_prompt a dog there, a cat here", "--prior_loss_weight 1.0 there, 0.5 here"],
        ),
    ],
)
def test_other_options(tmp_path: Path, there: Any, here: Any, told: list[str]) -> None:
    path = checkpoint(tmp_path, **there)
    with pytest.raises(CheckpointError) as caught:
        check_options(path, read_progress(path), TrainingConfig(**here))
    assert f"({'; '.join(told)})" in str(caught.value)
    assert f"--initial_adapter {path} and another --output_dir" in str(caught.value)


@pytest.mark.parametrize(
    ("new", "told"),
    [
        ({"masked_loss": True}, "--masked_loss False there, True here"),
        ({"min_timestep": 500}, "--min_timestep None there, 500 here"),
        ({"input_perturbation": 0.1}, "--input_perturbation 0.0 there, 0.1 here"),
        ({}, None),
    ],
)
def test_options_that_an_earlier_version_did_not_have(
    tmp_path: Path, new: dict[str, Any], told: str | None
) -> None:
    path = checkpoint(tmp_path)
    progress = read_progress(path)
    for name in ("masked_loss", "min_timestep", "input_perturbation"):
        del progress["options"][name]
    if told is None:
        check_options(path, progress, TrainingConfig())
        return
    with pytest.raises(CheckpointError, match=re.escape(told)):
        check_options(path, progress, TrainingConfig(**new))


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (TEACHER, TEACHER),
        ({}, {"class_prompt": "of no prior"}),
        ({}, {"max_train_steps": 9, "learning_rate": 1.0, "lr_scheduler": "cosine", "seed": 3}),
    ],
)
def test_options_that_may_change(tmp_path: Path, there: Any, here: Any) -> None:
    path = checkpoint(tmp_path, **there)
    check_options(path, read_progress(path), TrainingConfig(**here))


def test_a_checkpoint_of_an_earlier_version(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    progress = {"step": 2, "options": {"optimizer": "adamw", "use_ema": False}}
    (path / PROGRESS_NAME).write_text(json.dumps(progress), encoding="utf-8")
    check_options(path, read_progress(path), TrainingConfig())
    with pytest.raises(CheckpointError, match="--snr_gamma None there"):
        check_options(path, read_progress(path), TrainingConfig(snr_gamma=5.0))
    with pytest.raises(CheckpointError, match="--use_ema False there, True here"):
        check_options(path, read_progress(path), TrainingConfig(use_ema=True))
    check_base(path, progress, describe_base(stable_diffusion(), TrainingConfig()))


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"step": 1}'),
        *(f'{{"step": {step}, "options": {{}}}}' for step in ('"x"', -1, 2**53 + 1)),
    ],
)
def test_a_damaged_checkpoint(tmp_path: Path, text: str) -> None:
    (tmp_path / PROGRESS_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cannot be resumed from: .* Resume from an earlier"):
        read_progress(tmp_path)


# -- the base --------------------------------------------------------------------------------------


def described(pipe: Any, precision: str = "no", source: str = "base") -> dict[str, Any]:
    config = TrainingConfig(pretrained_model_name_or_path=source, mixed_precision=precision)
    return describe_base(pipe.to(torch.float32), config)


def frozen(**options: Any) -> Any:
    pipe = stable_diffusion(**options)
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        model.requires_grad_(False)
    return pipe


def test_a_base_is_known_by_its_weights(tmp_path: Path) -> None:
    base = described(frozen(), source="there")
    with_adapter = frozen()
    adapt(with_adapter)
    for pipe in (frozen(), with_adapter):
        check_base(tmp_path, {"base": base}, described(pipe, source="elsewhere"))
    for name in ("unet", "vae", "text_encoder"):
        other = frozen()
        with torch.no_grad():
            list(getattr(other, name).parameters())[-1].flatten()[0] += 1e-3
        with pytest.raises(CheckpointError) as caught:
            check_base(tmp_path, {"base": base}, described(other, source="here"))
        assert f"trained on there, and the {name} of here differs from it" in str(caught.value)
    # half precision rounds the weights, so nothing can be said
    check_base(tmp_path, {"base": base}, described(frozen(seed=9), "bf16"))


def test_another_base_with_the_trainer(images: Path, base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "instance_data_dir": images,
        "max_train_steps": 2,
        "checkpointing_steps": 2,
    }
    whole = run(
        pretrained_model_name_or_path=base,
        output_dir=tmp_path / "whole",
        **{**options, "max_train_steps": 4},
    )
    run(pretrained_model_name_or_path=base, output_dir=tmp_path / "out", **options)
    stable_diffusion(seed=5).save_pretrained(tmp_path / "other")
    again = {**options, "output_dir": tmp_path / "out", "max_train_steps": 4}
    again["resume_from_checkpoint"] = "latest"
    with pytest.raises(
        CheckpointError, match=r"the text_encoder, unet, vae of .*other differs from it"
    ):
        run(pretrained_model_name_or_path=tmp_path / "other", **again)
    shutil.copytree(base, tmp_path / "moved")
    run(pretrained_model_name_or_path=tmp_path / "moved", **again)
    assert_same_run(whole, tmp_path / "out")


def test_options_are_compared_before_the_base_is_loaded(
    images: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        "output_dir": tmp_path / "out",
        "checkpointing_steps": 2,
    }
    run(max_train_steps=2, **options)

    def load(*arguments: object, **named: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(loop, "load_base", load)
    told = r"--noise_offset 0\.0 there, 0\.1 here; --rank 4 there, 6 here; --lora_alpha 4 there, 6"
    with pytest.raises(ConfigError, match=told):
        run(noise_offset=0.1, rank=6, resume_from_checkpoint="latest", **options)
    (tmp_path / "out/checkpoint-2/training_weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is not the file that was written with"):
        run(resume_from_checkpoint="latest", **options)
