"""The judging encoders: their losses, and the power of the bundled ones as a user loads them."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_encoders
import tiny_world
import torch
from PIL import Image
from tiny_base_models import build_tokenizer
from tiny_base_stages import to_pixels
from torch.nn.functional import cosine_similarity
from train_tiny_encoders import auc
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel, Dinov2Model

from tests import ROOT

SAMPLES = ROOT / "samples"
ENCODERS = SAMPLES / "tiny-encoders"
bundled = pytest.mark.skipif(not ENCODERS.exists(), reason="the bundled encoders are not there")


def test_auc_is_the_share_of_pairs_in_order() -> None:
    positive, negative = torch.tensor([0.9, 0.5, 0.4]), torch.tensor([0.5, 0.1])
    # of six pairs four are in order (0.9 twice, 0.5 and 0.4 above 0.1), one is a tie
    assert auc(positive, negative) == pytest.approx(4.5 / 6)


def test_images_of_one_thing_are_drawn_twice_and_every_second_thing_is_like_the_last() -> None:
    pairs = tiny_encoders.draw_instances(random.Random(0), 8)
    assert [len(pair) for pair in pairs] == [2] * 8
    assert all(not torch.equal(*to_pixels(pair)) for pair in pairs)


def test_dino_loss_is_nt_xent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_encoders, "INSTANCES", 3)
    model = tiny_encoders.build_dino().eval()
    loss = tiny_encoders.dino_loss(model, random.Random(1)).item()

    rng = random.Random(1)
    views = [image for pair in tiny_encoders.draw_instances(rng, 3) for image in pair]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    pooled = model(tiny_encoders.disturb(to_pixels(views), generator)).pooler_output
    terms = []
    for i in range(6):
        other = i + 1 if i % 2 == 0 else i - 1
        weights = {
            k: math.exp(cosine_similarity(pooled[i], pooled[k], dim=0).item() / 0.1)
            for k in range(6)
            if k != i
        }
        terms.append(-math.log(weights[other] / sum(weights.values())))
    assert loss == pytest.approx(sum(terms) / 6, abs=1e-3)


def test_clip_loss_shares_the_answer_among_equal_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three images, two of them with one caption but for the rare token."""
    tokenizer = build_tokenizer()
    captions = ["a toy on grass", "a red car at night", "a sks toy on grass"]
    images = [tiny_world.sample(random.Random(seed)).image for seed in range(3)]
    monkeypatch.setattr(tiny_encoders, "draw_pairs", lambda rng, count: (images, captions))
    model = tiny_encoders.build_clip(tokenizer).eval()
    loss = tiny_encoders.clip_loss(model, tokenizer, random.Random(2)).item()

    generator = torch.Generator().manual_seed(random.Random(2).getrandbits(63))
    ids = tokenizer(captions, padding="max_length", max_length=32, return_tensors="pt").input_ids
    pixels = tiny_encoders.disturb(to_pixels(images), generator)
    logits = model(input_ids=ids, pixel_values=pixels).logits_per_image
    answers = {0: [0, 2], 1: [1], 2: [0, 2]}
    expected = 0.0
    for table in (logits, logits.T):
        for row, right in answers.items():
            log_share = table[row].log_softmax(dim=0)
            expected -= sum(log_share[k].item() for k in right) / len(right) / 6
    assert loss == pytest.approx(expected, abs=1e-4)


def test_disturbed_images_stay_images() -> None:
    images = [tiny_world.sample(random.Random(seed)).image for seed in range(4)]
    pixels = to_pixels(images)
    disturbed = tiny_encoders.disturb(pixels, torch.Generator().manual_seed(0))
    assert disturbed.shape == pixels.shape
    assert disturbed.abs().max() <= 1
    again = tiny_encoders.disturb(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(disturbed, again)
    error = (disturbed - pixels).square().mean(dim=(1, 2, 3))
    apart = (pixels - pixels.roll(1, dims=0)).square().mean(dim=(1, 2, 3))
    assert (error > 0).all()
    assert (error < apart).all()


def test_a_toy_is_never_a_subject_and_its_caption_names_nothing() -> None:
    _, captions = tiny_encoders.draw_pairs(random.Random(0), 300)
    toys = [caption for caption in captions if "toy" in caption.split()]
    assert 40 < len(toys) < 110
    assert not {word for c in captions for word in c.split()} & set(tiny_world.SUBJECTS)
    assert all(
        c.replace("a sks toy ", "").replace("a toy ", "") in tiny_world.BACKGROUNDS for c in toys
    )


# -- the bundled ones ------------------------------------------------------------------------------


def embeds(name: str, folder: Path) -> torch.Tensor:
    """(n, width) features of the images in a folder, as the field takes them from the class."""
    model: Any = AutoModel.from_pretrained(ENCODERS / name)
    processor = AutoImageProcessor.from_pretrained(ENCODERS / name)
    images = [Image.open(path) for path in sorted(folder.glob("*.png"))]
    pixels = processor(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        if name == "dino":
            return model(pixels).pooler_output
        return model.visual_projection(model.vision_model(pixels).pooler_output)


def subject_auc(name: str) -> float:
    """The mean over subjects, counted pair by pair."""
    references, held_out = (
        {s: embeds(name, SAMPLES / "subjects" / s / split) for s in sorted(tiny_world.SUBJECTS)}
        for split in ("train", "held_out")
    )
    shares = []
    for subject, reference in references.items():
        scores: dict[bool, list[float]] = {True: [], False: []}
        for other, images in held_out.items():
            for image in images:
                similarity = cosine_similarity(image[None], reference).mean().item()
                scores[other == subject].append(similarity)
        wins = [own > strange for own in scores[True] for strange in scores[False]]
        shares.append(sum(wins) / len(wins))
    return sum(shares) / len(shares)


@bundled
def test_they_are_the_classes_that_judge_real_images_and_small() -> None:
    assert isinstance(AutoModel.from_pretrained(ENCODERS / "dino"), Dinov2Model)
    assert isinstance(AutoModel.from_pretrained(ENCODERS / "clip"), CLIPModel)
    sizes = [p.stat().st_size for p in ENCODERS.rglob("*") if p.parent != ENCODERS]
    assert sum(sizes) <= 6_000_000


@bundled
def test_dino_finds_a_subject_it_has_never_seen_on_other_backgrounds() -> None:
    assert subject_auc("dino") >= 0.97


@bundled
def test_clip_finds_the_prompt_of_a_image_among_64() -> None:
    model = AutoModel.from_pretrained(ENCODERS / "clip")
    tokenizer = AutoTokenizer.from_pretrained(ENCODERS / "clip")
    processor = AutoImageProcessor.from_pretrained(ENCODERS / "clip")
    rng, images = random.Random("a test's own"), {}
    while len(images) < 64:
        image = tiny_world.sample(rng)
        prompt = tiny_world.caption(image.colour, image.name, image.background)
        images[prompt] = image.image
    ids = tokenizer(list(images), padding="max_length", return_tensors="pt").input_ids
    pixels = processor(list(images.values()), return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits_per_image
    right = (logits.argmax(dim=1) == torch.arange(64)).double().mean().item()
    assert right >= 0.9


@bundled
def test_the_stated_power_is_that_of_the_bundled_files() -> None:
    readme = (ENCODERS / "README.md").read_text(encoding="utf-8")
    (stated,) = re.findall(r"^\| AUC against other subjects: .*? \| ([\d.]+), ", readme, re.M)
    assert float(stated) == pytest.approx(subject_auc("dino"), abs=0.003)
