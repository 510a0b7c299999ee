"""Runs whose base is streamed: the same adapter, bit for bit, with everything else as it was.

The device is the CPU too, so nothing is saved here; ``tests/base_models/test_streaming.py`` counts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gralora_diffusion.base_models.streaming import Streaming
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.runtime.offloading import (
    NOTHING,
    Offloading,
    obstacles,
    requested_offloading,
)
from gralora_diffusion.training.runtime.sharding import Sharding
from tests.training.runs import assert_same_run, config, run, run_two

_VALIDATION: dict[str, Any] = {
    "validation_prompt": "a dog",
    "num_validation_images": 1,
    "validation_inference_steps": 2,
    "validation_steps": 2,
}
_PRIOR: dict[str, Any] = {"with_prior_preservation": True, "class_prompt": "a dog"}
#: Family -> options of a run; together, all that a base goes through.
RUNS: dict[str, dict[str, Any]] = {
    "flux": {**_VALIDATION, "use_ema": True, "gradient_checkpointing": True},
    "flux2": {**_PRIOR, "prior_source": "teacher", "mixed_precision": "bf16"},
    "flux2-klein": {"optimizer": "schedulefree", "quantization": "torchao-int8", **_VALIDATION},
    "stable-diffusion": {**_VALIDATION, "train_text_encoder": True, "optimizer": "prodigy"},
    "stable-diffusion-3": {**_VALIDATION, "optimizer": "adafactor", "cache_latents": False},
    "stable-diffusion-xl": {
        **_PRIOR,
        "num_class_images": 2,
        "sample_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "optimizer": "adamw",
    },
}


def images_in(folder: Path) -> dict[str, bytes]:
    """Name -> pixels."""
    files = sorted(folder.rglob("*-*.png"))
    return {str(p.relative_to(folder)): Image.open(p).tobytes() for p in files}


@pytest.mark.parametrize("family", sorted(RUNS))
def test_a_run_is_the_same_and_is_resumed_without(
    family: str,
    images: Path,
    tmp_path: Path,
    saved_base: Callable[[str], Path],
) -> None:
    """It is interrupted after two steps and goes on with the whole base on the device."""
    base = saved_base(family)
    options = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        **RUNS[family],
    }
    folders = {}
    for name, offload in (("whole", "none"), ("streamed", "blocks")):
        places: dict[str, Any] = {"output_dir": tmp_path / name}
        if "num_class_images" in options:
            places["class_data_dir"] = tmp_path / f"class {name}"
        first = options | {"max_train_steps": 2} if offload == "blocks" else options
        folders[name] = run(offload_base=offload, **first, **places)
    resumed = run(resume_from_checkpoint="latest", **options, **places)
    assert_same_run(folders["whole"], resumed)
    if "validation_prompt" in options:
        drawn = images_in(folders["whole"])
        assert len(drawn) > 2
        assert images_in(resumed) == drawn
    if "num_class_images" in options:
        drawn = images_in(tmp_path / "class whole")
        assert len(drawn) == 2
        assert images_in(tmp_path / "class streamed") == drawn


def test_two_processes_and_other_initial_values(
    images: Path, tmp_path: Path, saved_base: Callable[[str], Path]
) -> None:
    base = saved_base("flux")
    options = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        "max_train_steps": 2,
        "gradient_checkpointing": True,
    }
    initial = run(output_dir=tmp_path / "initial", seed=5, **options)
    options["initial_adapter"] = initial
    whole = run_two(output_dir=tmp_path / "whole", **options)
    streamed = run_two(output_dir=tmp_path / "streamed", offload_base="0.25", **options)
    assert_same_run(whole, streamed)


def test_what_the_options_ask_for() -> None:
    assert requested_offloading(config()) == NOTHING
    assert requested_offloading(config(offload_base="none")) == NOTHING
    blocks = requested_offloading(config(offload_base="blocks"))
    assert blocks == Offloading(Streaming(0.0), encoders=True)
    part = requested_offloading(config(offload_base="0.3", train_text_encoder=True))
    assert part == Offloading(Streaming(0.3), encoders=False)


@pytest.mark.parametrize("value", ["1", "-0.1", "some", "nan"])
def test_a_value_that_is_none_of_these(value: str, images: Path) -> None:
    with pytest.raises(ConfigError, match="it must be auto, none, blocks, or a fraction from 0"):
        run(offload_base=value, pretrained_model_name_or_path="base", instance_data_dir=images)


def test_what_does_not_go_together() -> None:
    def found(sharding: Sharding | None = None, **options: Any) -> list[str]:
        return [text.partition(",")[0] for text in obstacles(config(**options), sharding)]

    assert found(offload_base="blocks") == []
    assert found(Sharding()) == ["cannot be used with FSDP"]
    assert found(torch_compile=True, quantization="bnb-nf4") == [
        "cannot be used with --torch_compile",
        "cannot be used with bitsandbytes",
    ]
    assert found(quantization="torchao-int8") == []
    assert found(bnb_quantization_config_path="a.json") == ["cannot be used with bitsandbytes"]
