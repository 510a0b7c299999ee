"""Whole runs of the trainer on every family: all it does on the way, resumed, and loaded again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageChops

from gralora_diffusion.adapters.adapter_file import WEIGHTS_NAME
from gralora_diffusion.families import get_family
from gralora_diffusion.pipelines.generation import generate
from gralora_diffusion.training.checks.paths import made_in
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.optimization.adapters import restore
from gralora_diffusion.training.runtime.acceleration import accelerate_left_as_it_was
from tests.models import PIPELINES
from tests.training.optimization.test_step import make_trainer
from tests.training.runs import (
    adapter,
    assert_close,
    assert_same_run,
    make_images,
    make_shapes,
    metrics,
    run,
    run_two,
)

STEPS = 4


@pytest.fixture(scope="module", params=sorted(PIPELINES))
def base(request: pytest.FixtureRequest, saved_base: Callable[[str], Path]) -> Path:
    return saved_base(request.param)


def options(base: Path, images: Path, **changes: Any) -> dict[str, Any]:
    family = get_family(base.name)
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        "max_train_steps": STEPS,
        "checkpointing_steps": 2,
        "resolution": 32,
        "gradient_checkpointing": True,
    }
    if family.text_encoders:
        values["train_text_encoder"] = True
        values["text_encoder_lr"] = 1e-2
    return {**values, **changes}


def test_run_with_class_images_resumed_and_loaded(base: Path, images: Path, tmp_path: Path) -> None:
    family = get_family(base.name)
    shared = options(
        base,
        images,
        with_prior_preservation=True,
        class_prompt="a dog",
        class_data_dir=make_shapes(tmp_path / "class", [(27, 20), (20, 40)], seed=1),
        num_class_images=3 if family.objective == "ddpm" else 2,  # drawing takes long with Flux
        sample_batch_size=1,
        aspect_ratio_buckets="32,48;32,32;48,32",  # class images as wide as the others, and not
        validation_prompt="a sks dog",
        validation_steps=2,
        num_validation_images=1,
        validation_inference_steps=2,
        seed=3,
        held_out_data_dir=make_shapes(tmp_path / "held out", [(32, 48), (40, 36)], seed=2),
        held_out_steps=2,
    )
    whole = run(**shared, output_dir=tmp_path / "whole")
    drawn = list((tmp_path / "class").glob("class-*.png"))
    assert len(drawn) == shared["num_class_images"] - 2
    assert sorted(p.name for p in (whole / "validation").iterdir()) == [
        f"step-{step:06d}" for step in (0, 2, STEPS)
    ]
    # what an input in that folder could be lost by
    written = made_in(TrainingConfig(output_dir=str(whole)))
    assert sorted(written) == sorted(path.name for path in whole.iterdir())
    for tensor in adapter(whole).values():
        assert tensor.isfinite().all()
    measured = {row["step"]: row["held_out"] for row in metrics(whole) if "held_out" in row}
    assert list(measured) == [0, 2, STEPS]
    assert measured[0]["difference"] == 0 < measured[0]["base"]  # the second factors are zero
    assert all(measured[STEPS]["levels"].values())

    run(**{**shared, "max_train_steps": 2}, output_dir=tmp_path / "parts")
    resumed = run(**shared, output_dir=tmp_path / "parts", resume_from_checkpoint="latest")
    assert_same_run(whole, resumed)

    # what was trained is what is loaded: the last validation image, drawn anew
    pipe = DiffusionPipeline.from_pretrained(base)
    report = pipe.load_gralora_weights(whole)
    usual = family.usual_text_encoders or family.text_encoders
    assert list(report.layers) == [family.denoiser, *usual]
    sampling = {"seed": 3, "size": 32, "inference_steps": 2}
    ((image,),) = generate(pipe, ["a sks dog"], **sampling)
    last = Image.open(whole / "validation" / f"step-{STEPS:06d}" / "00-00.png")
    assert np.asarray(ImageChops.difference(image, last)).max() <= 1
    pipe.unload_gralora_weights()
    ((plain,),) = generate(pipe, ["a sks dog"], **sampling)
    assert ImageChops.difference(plain, last).getbbox() is not None


def test_it_learns(base: Path, tmp_path: Path) -> None:
    """The loss on the trained image falls, at noise that the training has not seen."""
    shared = options(base, make_images(tmp_path / "one", 1), gradient_checkpointing=False)
    shared |= {"checkpointing_steps": 100, "train_batch_size": 4, "train_text_encoder": None}
    shared["text_encoder_lr"] = None
    out = run(**{**shared, "max_train_steps": 20}, output_dir=tmp_path / "out")
    with accelerate_left_as_it_was():
        trainer = make_trainer(**shared, seed=99, output_dir=tmp_path / "other")
        batches = list(trainer.data.steps(0, 8))

        def loss() -> float:
            with torch.no_grad():
                losses = [trainer.step(trainer.batch_builder.build(batch)) for batch, _ in batches]
            return float(torch.cat(losses).mean())

        with torch.no_grad():
            for parameter in trainer.parameters:
                parameter.zero_()
        before = loss()
        restore(trainer.pipe, [trainer.family.denoiser], out / WEIGHTS_NAME)
        assert loss() < 0.97 * before


@pytest.mark.parametrize("name", ["flux", "stable-diffusion-xl"])
def test_two_processes_are_one(
    name: str, images: Path, tmp_path: Path, saved_base: Callable[[str], Path]
) -> None:
    """With text encoders of which not every layer is read."""
    shared = options(saved_base(name), images, max_train_steps=2, checkpointing_steps=5)
    shared |= {"train_batch_size": 2, "adam_epsilon": 1e-4}  # else rounding is all that counts
    one = run(**shared, output_dir=tmp_path / "one")
    shared["train_batch_size"] = 1
    two = run_two(**shared, output_dir=tmp_path / "two", timeout=300)
    assert_close(one, two, 1e-3)
