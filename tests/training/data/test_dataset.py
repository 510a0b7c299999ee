"""Samples: images meet their own captions in every epoch, with and without a cache."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from gralora_diffusion.training.data.buckets import Buckets
from gralora_diffusion.training.data.cache import LatentCache
from gralora_diffusion.training.data.dataset import collate
from gralora_diffusion.training.data.image_folder import find_examples
from gralora_diffusion.training.data.sampler import StreamBatchSampler
from gralora_diffusion.training.data.transforms import CropPlan
from tests.training.runs import one_set

PLAN = CropPlan(8, random_flip=True)
SHADES = {"dark": 20, "dim": 90, "light": 170, "bright": 240, "middle": 128}


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Images of one shade in red and noise in green; the caption names the shade."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, (caption, shade) in enumerate(SHADES.items()):
        pixels = np.full((8, 16, 3), shade, dtype=np.uint8)
        pixels[..., 1] = np.random.default_rng(number).integers(0, 256, (8, 16))
        image = Image.fromarray(pixels)
        if number % 2:
            image = image.rotate(90, expand=True)
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    return find_examples(folder)


def identity(pixel_values):
    """An encoder whose latents are the pixels, so that they can be recognized."""
    return pixel_values, pixel_values.abs()


def cached_set(examples, **options):
    cache = LatentCache(PLAN, "identity")
    training_set = one_set(examples, PLAN, 0, cache=cache, **options)
    training_set.fill_cache(identity, progress=False)
    return training_set


def test_processes_share_the_filling_of_a_folder(examples, tmp_path):
    """Each encodes a part of the images; afterwards none is missing anything."""
    sets = [
        one_set(examples, PLAN, 0, cache=LatentCache(PLAN, "identity", tmp_path)) for _ in range(3)
    ]
    done = [
        own.fill_cache(identity, slice(index, None, 3), progress=False)
        for index, own in enumerate(sets)
    ]
    assert sum(done) == sum(len(kept) for _, kept in sets[0]._wanted(slice(None)))
    assert all(done)
    assert not any(own.fill_cache(identity, progress=False) for own in sets)
    alone = cached_set(examples)
    for position in range(10):
        assert torch.equal(sets[2][position]["mean"], alone[position]["mean"])


def shade_of(image):
    return round(float((image[0].mean() + 1) * 127.5))


@pytest.mark.parametrize("cached", [False, True])
def test_captions_stay_with_their_images_over_epochs(examples, cached):
    training_set = cached_set(examples) if cached else one_set(examples, PLAN, 0)
    seen = Counter()
    orders = set()
    for epoch in range(6):
        samples = [training_set[t] for t in range(epoch * 5, epoch * 5 + 5)]
        orders.add(tuple(sample["prompt"] for sample in samples))
        for sample in samples:
            image = sample["mean" if cached else "pixel_values"]
            assert shade_of(image) == SHADES[sample["prompt"]]
            seen[sample["prompt"]] += 1
    assert seen == dict.fromkeys(SHADES, 6)
    assert len(orders) > 3


def test_images_that_count_more_than_once(examples):
    """Each as often as its own number times that for all, in an epoch that is so much longer."""
    own = dict(zip(SHADES, (3, 1, 1, 2, 1), strict=True))
    counted = [replace(e, repeats=own[e.caption]) for e in examples]
    training_set = one_set(counted, PLAN, 0, repeats=2)
    assert len(training_set) == 2 * 8
    for epoch in range(3):
        seen = Counter(training_set[t]["prompt"] for t in range(16 * epoch, 16 * epoch + 16))
        assert seen == {caption: 2 * count for caption, count in own.items()}
    other = list(counted)
    other[0], other[3] = replace(other[0], repeats=2), replace(other[3], repeats=3)
    digests = {one_set(chosen, PLAN, 0).digest for chosen in (examples, counted, other)}
    assert len(digests) == 3
    shapes = one_set(counted, SHAPES, 0, batch_size=2)
    for start in range(0, len(shapes), 2):
        sizes = {tuple(shapes[t]["target_size"].tolist()) for t in (start, start + 1)}
        assert len(sizes) == 1


def test_sample_is_the_variant_that_it_tells(examples):
    """Worked out from the image by hand: mirror, then cut at crop_top_left."""
    for training_set, name in ((one_set(examples, PLAN, 0), "pixel_values"),
                               (cached_set(examples), "mean")):  # fmt: skip
        for t in range(25):
            sample = training_set[t]
            source = next(e.source for e in examples if e.content_key == sample["content_key"])
            whole = np.asarray(Image.open(source))
            assert sample["original_size"].tolist() == list(whole.shape[:2])
            assert sample["target_size"].tolist() == [8, 8]
            top, left = sample["crop_top_left"].tolist()
            candidates = [
                torch.tensor(np.array(side[top : top + 8, left : left + 8])).permute(2, 0, 1)
                / 127.5 - 1
                for side in (whole, whole[:, ::-1])
            ]  # fmt: skip
            assert any(torch.allclose(sample[name], c, atol=1e-6) for c in candidates)
            if name == "mean":
                assert torch.equal(sample["std"], sample["mean"].abs())


@pytest.mark.parametrize("cached", [False, True])
def test_crops_and_flips_stay_random_over_epochs(examples, cached):
    training_set = cached_set(examples, cached_crops=6) if cached else one_set(examples, PLAN, 0)
    variants = defaultdict(set)
    for t in range(5 * 60):
        sample = training_set[t]
        image = sample["mean" if cached else "pixel_values"]
        variants[sample["prompt"]].add(image.numpy().tobytes())
    counts = [len(found) for found in variants.values()]
    if cached:
        assert counts == [6] * 5
    else:
        assert min(counts) > 12  # of 9 places times 2 directions


def test_samples_depend_on_the_position_only(examples):
    first, second = cached_set(examples), cached_set(examples)
    for t in (17, 3, 99, 3):
        a, b = first[t], second[t]
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)
    other = one_set(examples, PLAN, 1)
    assert [first[t]["prompt"] for t in range(20)] != [other[t]["prompt"] for t in range(20)]


def test_repeats_count_in_the_epoch(examples):
    training_set = one_set(examples, PLAN, 0, repeats=3)
    assert len(training_set) == 15
    seen = Counter(training_set[t]["prompt"] for t in range(15))
    assert seen == dict.fromkeys(SHADES, 3)


def test_class_stream_uses_all_its_images_in_its_own_order(examples):
    instance = one_set(examples[:2], PLAN, 0)
    classes = one_set(examples, PLAN, 0, name="class")
    loader = [(instance[t]["prompt"], classes[t]["prompt"]) for t in range(5)]
    assert {prompt for _, prompt in loader} == set(SHADES)
    again = one_set(examples, PLAN, 0)
    assert [again[t]["prompt"] for t in range(20)] != [classes[t]["prompt"] for t in range(20)]


def test_caption_dropout_drops_its_share_and_is_reproducible(examples):
    training_set = cached_set(examples, caption_dropout=0.3)
    prompts = [training_set[t]["prompt"] for t in range(2000)]
    # five standard deviations of a binomial: 5 * sqrt(0.3 * 0.7 / 2000) = 0.051
    assert abs(prompts.count("") / 2000 - 0.3) < 0.052
    assert prompts == [training_set[t]["prompt"] for t in range(2000)]
    assert sorted(training_set.prompts) == sorted(["", *SHADES])
    undropped = cached_set(examples)
    assert undropped.prompts == list(SHADES)
    kept = [(p, undropped[t]["prompt"]) for t, p in enumerate(prompts[:100]) if p]
    assert all(prompt == full for prompt, full in kept)


SHAPES = CropPlan(8, random_flip=True, buckets=Buckets(8, 1, ((8, 16), (16, 8), (12, 12))))


@pytest.mark.parametrize("cached", [False, True])
def test_micro_batches_have_one_shape_and_hold_every_image(examples, cached):
    """Three wide images and two tall ones, in batches of two."""
    cache = LatentCache(SHAPES, "identity") if cached else None
    training_set = one_set(examples, SHAPES, 0, batch_size=2, cache=cache)
    if cached:
        training_set.fill_cache(identity, progress=False)
    assert len(training_set) == 6
    name = "mean" if cached else "pixel_values"
    for epoch in range(4):
        seen = Counter()
        for start in range(epoch * 6, epoch * 6 + 6, 2):
            batch = collate([training_set[start], training_set[start + 1]])
            (size,) = {tuple(size) for size in batch["target_sizes"].tolist()}
            assert batch[name].shape == (2, 3, *size)
            assert size == tuple(batch["original_sizes"][0].tolist())
            for image, prompt in zip(batch[name], batch["prompts"], strict=True):
                assert shade_of(image) == SHADES[prompt]
            seen.update(batch["prompts"])
        assert set(seen) == set(SHADES)
        assert sorted(seen.values()) == [1, 1, 1, 1, 2]


def test_repeats_fill_up_a_bucket_without_padding(examples):
    training_set = one_set(examples, SHAPES, 0, repeats=2, batch_size=2)
    assert len(training_set) == 10
    seen = Counter(training_set[t]["prompt"] for t in range(10))
    assert seen == dict.fromkeys(SHADES, 2)


def test_the_user_is_told_of_buckets_and_padding(examples, caplog):
    with caplog.at_level(logging.INFO, logger="gralora_diffusion"):
        one_set(examples, PLAN, 0, batch_size=2)
        assert not caplog.records
        one_set(examples, SHAPES, 0, batch_size=2)
        first, second = (record.getMessage() for record in caplog.records)
        assert first == (
            "instance images by aspect-ratio bucket (height,width): "
            "8,16: 3 (+1 repeated in each epoch); 16,8: 2"
        )
        assert "last batch of 2" in second
        caplog.clear()
        one_set(examples, SHAPES, 0, name="class")
        (only,) = (record.getMessage() for record in caplog.records)
        assert only == "class images by aspect-ratio bucket (height,width): 8,16: 3; 16,8: 2"


def test_digest_follows_buckets_and_the_batches_they_make(examples):
    others = CropPlan(8, buckets=Buckets(8, 1, ((8, 16), (12, 12))))
    digests = [one_set(examples, plan, 0, batch_size=2).digest for plan in (SHAPES, others)]
    digests += [one_set(examples, PLAN, 0, batch_size=size).digest for size in (2, 3)]
    digests.append(one_set(examples, SHAPES, 0, batch_size=3).digest)
    assert digests[2] == digests[3]
    assert len(set(digests)) == 4


def test_digest_follows_images_captions_and_repeats(examples):
    digest = one_set(examples, PLAN, 0).digest
    assert one_set(list(examples), PLAN, 5).digest == digest
    assert one_set(examples[:4], PLAN, 0).digest != digest
    assert one_set(examples, PLAN, 0, repeats=2).digest != digest


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_with_workers_gives_the_samples_of_the_positions(examples, workers):
    training_set = cached_set(examples)
    sampler = StreamBatchSampler(
        start_step=2, max_steps=4, batch_size=3, process_index=1, num_processes=2
    )
    loader = DataLoader(
        training_set, batch_sampler=sampler, collate_fn=collate, num_workers=workers
    )
    for batch, positions in zip(loader, [[15, 16, 17], [21, 22, 23]], strict=True):
        samples = [training_set[t] for t in positions]
        assert batch["positions"] == positions
        assert batch["prompts"] == [sample["prompt"] for sample in samples]
        assert batch["content_keys"] == [sample["content_key"] for sample in samples]
        for many, one in (("mean", "mean"), ("std", "std"), ("original_sizes", "original_size"),
                          ("crop_top_lefts", "crop_top_left"),
                          ("target_sizes", "target_size")):  # fmt: skip
            assert torch.equal(batch[many], torch.stack([sample[one] for sample in samples]))
    assert "pixel_values" not in batch
