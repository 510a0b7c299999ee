"""The memory of a run against the memory that there is, before anything is loaded."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator

from gralora_diffusion.base_models.loading import find_base_family
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.buckets import Buckets
from gralora_diffusion.training.data.data_module import find_images
from gralora_diffusion.training.dry_run import memory_check
from gralora_diffusion.training.dry_run.memory_check import check_memory, memory_advice
from gralora_diffusion.training.runtime import memory
from gralora_diffusion.training.runtime.memory import DeviceMemory
from gralora_diffusion.training.runtime.offloading import NOTHING
from tests import ROOT

CONFIG = TrainingConfig(
    pretrained_model_name_or_path=str(ROOT / "samples/tiny-base"),
    instance_data_dir=str(ROOT / "samples/subjects/owl/train"),
    instance_prompt="an owl",
    train_batch_size=2,
)


def checked(free: int, total: int, monkeypatch: pytest.MonkeyPatch, **options) -> str:
    """What is said."""
    config = replace(CONFIG, **options)
    there = DeviceMemory(free, total)
    monkeypatch.setattr(memory_check, "device_memory", lambda device: there)
    images = find_images(config)
    family, accelerator = find_base_family(config), Accelerator(cpu=True)
    text, offloading = check_memory(config, family, images, [], accelerator)
    assert offloading == NOTHING
    return text


def test_a_small_run_is_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_check, "plan_run", None)
    assert checked(8 << 30, 8 << 30, monkeypatch) == "far below the 8.0 GiB of free memory"


@pytest.mark.parametrize(
    "options",
    [
        {"use_aspect_ratio_buckets": True},
        {"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "64,32;32,64"},
        {"pretrained_vae_model_name_or_path": str(ROOT / "samples/tiny-base/vae")},
    ],
)
def test_nor_one_with_buckets_or_another_vae(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    monkeypatch.setattr(memory_check, "plan_run", None)
    assert checked(8 << 30, 8 << 30, monkeypatch, **options).startswith("far below")


def test_the_bound_of_a_file_counts_the_folder_that_completes_it(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(bytes(1000))
    folder = CONFIG.pretrained_model_name_or_path
    alone = replace(CONFIG, pretrained_model_name_or_path=str(file))
    completed = replace(alone, base_config=folder)
    bound = memory_check._bytes_of_weights
    assert bound(completed) == 1000 + bound(CONFIG) > 1_000_000
    # what is on the Hub is not known
    for unknown in (
        alone,
        replace(CONFIG, pretrained_model_name_or_path="org/model"),
        replace(completed, base_config="org/model"),
        replace(CONFIG, pretrained_vae_model_name_or_path="org/vae"),
    ):
        assert bound(unknown) == float("inf")


@pytest.mark.parametrize("divisor", [8, 16, 32])
def test_no_bucket_is_above_the_bound(divisor: int) -> None:
    """Of every image, down to the smallest resolution."""
    config = replace(CONFIG, use_aspect_ratio_buckets=True)
    for side in (*range(divisor, 4 * divisor), 512, 1000, 1024):
        buckets = Buckets(side, divisor)
        largest = max(
            math.prod(buckets.nearest(round(4 * side * shape), 4 * side))
            for shape in (0.5, 0.57, 0.67, 0.75, 0.8, 1, 1.25, 1.33, 1.5, 1.75, 2)
        )
        assert largest <= memory_check._most_pixels(config, side)
    listed = replace(config, aspect_ratio_buckets="64,32;48,48")
    assert memory_check._most_pixels(listed, 1024) == 48 * 48


def test_little_memory_is_warned_of_and_far_too_little_is_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert "at the peak; 30 MiB free" in checked(30 << 20, 8 << 30, monkeypatch)
    (warning,) = caplog.messages
    assert "memory, but only 30 MiB is free. To need less, give --gradient_checkpointing" in warning
    with pytest.raises(ConfigError) as caught:
        checked(20 << 20, 20 << 20, monkeypatch, resolution=128)
    (problem,) = caught.value.problems
    assert problem.startswith("this run needs about ")
    assert "of memory for a step, but cpu has 20 MiB. To need less, give a lower" in problem


def test_a_plan_that_fails_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise NotImplementedError("an operator")

    monkeypatch.setattr(memory_check, "plan_run", fail)
    assert checked(1, 1, monkeypatch).startswith("not estimated")
    assert "could not be estimated: an operator" in caplog.text


def test_advice_names_what_is_not_used_yet() -> None:
    assert memory_advice(replace(CONFIG, resolution=64, train_text_encoder=True)) == (
        "To need less, give a lower --resolution (it is 64), --gradient_checkpointing, "
        "--train_batch_size 1 --gradient_accumulation_steps 2, --mixed_precision bf16, "
        "--quantization or no --train_text_encoder. --dry_run shows what takes it"
    )
    used = {"gradient_checkpointing": True, "mixed_precision": "bf16", "train_batch_size": 1}
    used["quantization"] = "torchao-int8"
    assert memory_advice(replace(CONFIG, **used)) == "See --dry_run for what takes it"


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("300\n")
    assert (1000, 300) in list(memory._limits_of_containers(tmp_path))
    (tmp_path / "memory.max").write_text("max\n")
    assert list(memory._limits_of_containers(tmp_path)) == []
