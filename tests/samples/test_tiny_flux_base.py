"""The bundled base in the shape of FLUX: small, whole, and it draws what it is asked for."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny_flux_models as models
import tiny_world
import torch
import train_tiny_flux_base as script
from accelerate import Accelerator
from diffusers import FluxPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from tiny_base_run import Run
from tiny_base_stages import psnr, to_pixels
from train_tiny_base import grid_prompts

from gralora_diffusion.benchmark.evaluation.encoders import load_encoder
from gralora_diffusion.benchmark.evaluation.metrics import normalize, pairwise_similarity
from gralora_diffusion.pipelines.generation import generate
from tests.training.runs import ROOT, run

SAMPLES = ROOT / "samples"
BASE = SAMPLES / "tiny-flux-base"
SMALL = {"size": 64, "max_sequence_length": models.T5_TOKENS, "inference_steps": 12}


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    return FluxPipeline.from_pretrained(BASE)


def test_it_is_small_and_of_safetensors() -> None:
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert not {path.suffix for path in files} & {".bin", ".pt", ".pth", ".pkl"}
    for part in ("transformer", "vae"):
        with safe_open(BASE / part / "diffusion_pytorch_model.safetensors", "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118


def test_the_autoencoder_keeps_images_that_it_has_not_seen(pipe: FluxPipeline) -> None:
    pixels = to_pixels([tiny_world.sample(random.Random(f"other {i}")).image for i in range(32)])
    with torch.no_grad():
        decoded = pipe.vae(pixels).sample
    assert min(psnr(d, p) for d, p in zip(decoded, pixels, strict=True)) >= 27


@pytest.mark.parametrize("seen", [True, False])
def test_it_draws_what_it_is_asked_for(pipe: FluxPipeline, seen: bool) -> None:
    """Each image's own prompt is the nearest of 64, by an encoder that has not seen the base.

    ``seen``: combinations of object, colour and background that training had, or left out.
    """
    prompts = grid_prompts(seen)
    asked = [*range(0, 64, 5)]
    rows = generate(pipe, [prompts[i] for i in asked], **SMALL, batch_size=13)
    images = [row[0] for row in rows]
    clip = load_encoder(SAMPLES / "tiny-encoders" / "clip")
    nearest = (
        normalize(clip.embed_images(images)) @ normalize(clip.embed_texts(prompts)).T
    ).argmax(dim=1)
    right = sum(prompts[n] == prompts[i] for n, i in zip(nearest.tolist(), asked, strict=True))
    assert right >= len(asked) - 1


def test_it_learns_a_subject(pipe: FluxPipeline, tmp_path: Path) -> None:
    """Similarity of images on new backgrounds to images of the subject that were held out."""
    run(
        output_dir=tmp_path,
        pretrained_model_name_or_path=BASE,
        instance_data_dir=SAMPLES / "subjects" / "robot" / "train",
        resolution=64,
        max_sequence_length=models.T5_TOKENS,
        rank=16,
        target_preset="attention+ff",
        learning_rate=4e-3,
        train_batch_size=4,
        max_train_steps=60,
        checkpointing_steps=1000,
    )
    dino = load_encoder(SAMPLES / "tiny-encoders" / "dino")
    real = (SAMPLES / "subjects" / "robot" / "held_out").glob("*.png")
    known = dino.embed_images([Image.open(path) for path in sorted(real)])

    def similarity() -> float:
        prompts = [f"a sks toy {where}" for where in ("in the snow", "at night", "on checks")]
        rows = generate(pipe, prompts, 4, **SMALL, batch_size=12)
        images = [image for row in rows for image in row]
        return pairwise_similarity(dino.embed_images(images), known)

    before = similarity()
    pipe.load_gralora_weights(tmp_path)
    try:
        assert similarity() > before + 0.5
    finally:
        pipe.unload_gralora_weights()


@pytest.mark.parametrize("text", ["an sks orange mushroom on a brick wall", "a Cat, at 6 pm!", ""])
def test_the_t5_tokenizer_keeps_every_word(pipe: FluxPipeline, text: str) -> None:
    ids = pipe.tokenizer_2(text).input_ids
    assert pipe.tokenizer_2.unk_token_id not in ids
    assert pipe.tokenizer_2.decode(ids, skip_special_tokens=True) == text


def test_the_autoencoder_starts_as_the_tiny_bases() -> None:
    """Its first channels are the base's, and inside of the border it decodes to the same."""
    base = StableDiffusionPipeline.from_pretrained(script.BASE).vae.eval()
    vae = models.continue_vae(base).eval()
    pixels = to_pixels([tiny_world.sample(random.Random(0)).image])
    with torch.no_grad():
        latents, known = (each.encode(pixels).latent_dist.mean for each in (vae, base))
        torch.testing.assert_close(latents[:, :8], known, atol=1e-4, rtol=1e-4)
        first = vae.decoder.conv_in(latents)
        second = base.decoder.conv_in(base.post_quant_conv(known))
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(first[inside], second[inside], atol=1e-4, rtol=1e-4)


def test_a_few_steps_from_nothing_to_a_folder(tmp_path: Path) -> None:
    """Every stage, with a resume in the middle."""
    torch.manual_seed(0)
    work = Run(Accelerator(cpu=True), tmp_path, 0)
    base = StableDiffusionPipeline.from_pretrained(script.BASE)
    script.train_vae(work, models.continue_vae(base.vae), 1, 2, 3e-4, models.distance_from_normal)
    script.encode(work, 4)
    for steps in (1, 2):
        base = StableDiffusionPipeline.from_pretrained(script.BASE)
        script.train_transformer(work, base, steps, 2, 1e-3, bf16=False)
    pipe, step = script.trained_pipeline(work, base)
    assert step == 2
    script.save(pipe, tmp_path / "base")
    loaded = FluxPipeline.from_pretrained(tmp_path / "base")
    (image,) = loaded("a red car on grass", num_inference_steps=1, **script.OPTIONS).images
    assert image.size == (64, 64)
