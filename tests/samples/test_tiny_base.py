"""The bundled base: small, whole, draws what it is asked for, and can be taught a subject."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny_world
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from train_tiny_base import grid_prompts

from gralora_diffusion.benchmark.evaluation.encoders import load_encoder
from gralora_diffusion.benchmark.evaluation.metrics import normalize, pairwise_similarity
from gralora_diffusion.pipelines.generation import generate
from tests.training.runs import ROOT, run

BASE = ROOT / "samples" / "tiny-base"
ENCODERS = ROOT / "samples" / "tiny-encoders"
SUBJECTS = ROOT / "samples" / "subjects"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(BASE)


def test_it_is_small_and_of_safetensors() -> None:
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert not {path.suffix for path in files} & {".bin", ".pt", ".pth", ".pkl"}
    for part in ("unet", "vae"):
        with safe_open(BASE / part / "diffusion_pytorch_model.safetensors", "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118


def test_the_autoencoder_keeps_images_that_it_has_not_seen(
    pipe: StableDiffusionPipeline,
) -> None:
    images = [tiny_world.sample(random.Random(f"other {i}")).image for i in range(32)]
    pixels = pipe.image_processor.preprocess(images)
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample
    error = ((decoded.clamp(-1, 1) - pixels) / 2).square().mean(dim=(1, 2, 3))
    psnr = -10 * error.log10()
    assert psnr.mean() >= 27
    assert psnr.min() >= 24


@pytest.mark.parametrize("seen", [True, False])
def test_it_draws_what_it_is_asked_for(pipe: StableDiffusionPipeline, seen: bool) -> None:
    """Each image's own prompt is the nearest of 64, by an encoder that has not seen the base.

    ``seen``: combinations of object, colour and background that training had, or left out.
    """
    prompts = grid_prompts(seen)
    asked = [*range(0, 64, 5)]
    options = {"guidance_scale": 4.0, "inference_steps": 12, "batch_size": 13}
    images = [row[0] for row in generate(pipe, [prompts[i] for i in asked], **options)]
    clip = load_encoder(ENCODERS / "clip")
    nearest = (
        normalize(clip.embed_images(images)) @ normalize(clip.embed_texts(prompts)).T
    ).argmax(dim=1)
    right = sum(prompts[n] == prompts[i] for n, i in zip(nearest.tolist(), asked, strict=True))
    assert right >= len(asked) - 1


def test_it_learns_a_subject(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    """Similarity of images on new backgrounds to images of the subject that were held out.

    Over five seeds of the training it rose from 0.035 to 0.903 at the least, 0.921 at the most.
    """
    run(
        output_dir=tmp_path,
        pretrained_model_name_or_path=BASE,
        instance_data_dir=SUBJECTS / "robot" / "train",
        resolution=None,
        rank=16,
        target_preset="all",
        learning_rate=4e-3,
        train_batch_size=4,
        max_train_steps=60,
        checkpointing_steps=1000,
    )
    dino = load_encoder(ENCODERS / "dino")
    real = [Image.open(path) for path in sorted((SUBJECTS / "robot" / "held_out").glob("*.png"))]
    known = dino.embed_images(real)

    def similarity() -> float:
        prompts = [f"a sks toy {where}" for where in ("in the snow", "at night", "on checks")]
        options = {"guidance_scale": 1.5, "inference_steps": 12, "batch_size": 12}
        images = [image for row in generate(pipe, prompts, 4, **options) for image in row]
        return pairwise_similarity(dino.embed_images(images), known)

    before = similarity()
    pipe.load_gralora_weights(tmp_path)
    try:
        assert similarity() > before + 0.7
    finally:
        pipe.unload_gralora_weights()
