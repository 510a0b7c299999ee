"""What a unit leaves for those that follow, or run beside it: nothing but what they share."""

import gc
import shutil

import pytest
import torch
from diffusers.training_utils import EMAModel
from PIL import Image

from gralora_diffusion.benchmark.methods import Method
from tests.benchmark.test_runner import made

PRIOR = {"with_prior_preservation": True, "num_class_images": 3}


@pytest.fixture
def prepared(world, tmp_path):
    return *made(world, tmp_path, use_ema=True), tmp_path


def test_no_optimizer_and_no_average_is_kept(prepared):
    """Of full fine-tuning they are several times the base, and count in the next unit's peak."""
    runner, task, output = prepared
    runner.run(task, Method.parse("full"), 0, output / "unit")
    gc.collect()
    kinds = (torch.optim.Optimizer, EMAModel)
    assert [type(kept) for kept in gc.get_objects() if isinstance(kept, kinds)] == []


def test_a_trial_that_was_stopped_leaves_the_next_as_it_would_be(world, tmp_path, monkeypatch):
    """In the first of two micro-batches."""
    output = tmp_path
    runner, task = made(world, output, gradient_accumulation_steps=2)
    whole = runner.run(task, Method.parse("lora-r4"), 0, output / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("gralora_diffusion.training.loop.mean_loss", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runner.run(task, Method.parse("lora-r4"), 0, output / "stopped")
    again = runner.run(task, Method.parse("lora-r4"), 0, output / "again")
    assert again.scores == whole.scores


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_broken_image_of_the_base_is_drawn_again(prepared):
    runner, task, output = prepared
    before = runner.run(task, Method.parse("lora-r4"), 0, output / "before")
    for broken in (output / "base" / "seed0").rglob("*_0.png"):
        broken.write_bytes(broken.read_bytes()[:60])
    after = runner.run(task, Method.parse("lora-r4"), 0, output / "after")
    assert after.scores == before.scores


def test_class_images_do_not_depend_on_the_seed_that_comes_first(world, tmp_path):
    drawn = []
    for seed in (1, 0):
        output = tmp_path / str(seed)
        runner, task = made(world, output, **PRIOR)
        runner.run(task, Method.parse("lora-r4"), seed, output / "unit")
        files = sorted((output / "class_pictures" / "a_dog").iterdir())
        drawn.append([Image.open(file).tobytes() for file in files])
    assert len(drawn[0]) == 3
    assert drawn[0] == drawn[1]


def test_a_trial_completes_the_class_images_that_another_began(world, tmp_path):
    """It is stopped when one of them is there, and the next must train on all."""
    runner, task = made(world, tmp_path / "alone", **PRIOR)
    alone = runner.run(task, Method.parse("lora-r4"), 0, tmp_path / "alone" / "unit")
    theirs = tmp_path / "alone" / "class_pictures" / "a_dog"

    runner, task = made(world, tmp_path / "again", **PRIOR)
    ours = tmp_path / "again" / "class_pictures" / "a_dog"
    ours.mkdir(parents=True)
    shutil.copy(theirs / "class-00000.png", ours)
    again = runner.run(task, Method.parse("lora-r4"), 0, tmp_path / "again" / "unit")
    assert len(list(ours.glob("*.png"))) == 3
    assert again.scores == alone.scores
