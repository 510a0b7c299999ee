"""The bundled edit base: small, whole, edits as it is told, and can be taught another edit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import tiny_edits
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image
from safetensors.torch import load_file

from gralora_diffusion.training.outputs.metrics import held_out_points
from tests.training.runs import ROOT, metrics, run

SAMPLES = ROOT / "samples"
BASE = SAMPLES / "tiny-edit-base"


def difference(image: Image.Image, other: Image.Image) -> float:
    """Return the mean squared difference of two images with pixels from 0 to 1."""
    pixels = [np.asarray(each.convert("RGB")).astype(float) / 255 for each in (image, other)]
    return float(((pixels[0] - pixels[1]) ** 2).mean())


def test_it_is_small_and_shares_what_it_can_with_the_base() -> None:
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert not {path.suffix for path in files} & {".bin", ".pt", ".pth", ".pkl"}
    unet = load_file(BASE / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in unet.values()} == {torch.float16}
    for part in ("vae", "tokenizer", "scheduler"):
        for path in (SAMPLES / "tiny-base" / part).iterdir():
            assert (BASE / part / path.name).read_bytes() == path.read_bytes()


def test_it_edits_as_it_is_told() -> None:
    """Pairs that it was not trained on: its image is far nearer to the edited one."""
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(BASE, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"guidance_scale": 4.0, "image_guidance_scale": 1.5}
    for number, kind in enumerate(tiny_edits.KINDS * 2):
        edit = tiny_edits.sample(random.Random(f"judged {number}"), kind)
        before, after = edit.before.draw(), edit.after.draw()
        generator = torch.Generator().manual_seed(number)
        (image,) = pipe(
            edit.instruction, before, num_inference_steps=12, generator=generator, **options
        ).images
        assert difference(image, after) < difference(before, after) / 2, edit.instruction


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_bundled_pairs_are_what_the_script_draws(split: str) -> None:
    folder = SAMPLES / "pairs" / "space" / split
    rng = random.Random(f"0/{split}")
    objects = tiny_edits.lesson_objects(split == "held_out")
    paths = sorted((folder / "images").glob("*.png"))
    assert len(paths) == (8 if split == "held_out" else 32)
    for path in paths:
        edit = tiny_edits.lesson(rng, "space", objects)
        assert path.with_suffix(".txt").read_text() == "put it in space\n"
        for image, scene in ((path, edit.after), (folder / "control" / path.name, edit.before)):
            assert Image.open(image).tobytes() == scene.draw().tobytes()


def test_it_learns_another_edit(tmp_path: Any) -> None:
    """The loss of pairs with other objects falls by most of what the base's is."""
    pairs = SAMPLES / "pairs" / "space"
    out = run(
        output_dir=tmp_path,
        pretrained_model_name_or_path=BASE,
        instance_data_dir=pairs / "train" / "images",
        control_data_dir=pairs / "train" / "control",
        held_out_data_dir=pairs / "held_out" / "images",
        held_out_control_data_dir=pairs / "held_out" / "control",
        held_out_steps=40,
        resolution=None,
        rank=16,
        target_preset="all",
        learning_rate=4e-3,
        train_batch_size=4,
        max_train_steps=40,
        checkpointing_steps=1000,
    )
    rows = metrics(out)
    *_, (step, _, _, high) = held_out_points(rows)
    base = next(row["held_out"]["base"] for row in rows if row["step"] == step)
    assert step == 40
    assert high < -base / 2
