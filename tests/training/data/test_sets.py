"""Samples of several sets: shares, weights, sizes, and settings of their own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.training.checks.options import find_warnings
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.buckets import Buckets
from gralora_diffusion.training.data.cache import LatentCache
from gralora_diffusion.training.data.caption_variants import CaptionRules
from gralora_diffusion.training.data.data_module import find_images
from gralora_diffusion.training.data.dataset import TrainingSet, collate
from gralora_diffusion.training.data.image_folder import Example, find_examples
from gralora_diffusion.training.data.sampler import Rotation
from gralora_diffusion.training.data.sets import SampledSet, described_sets, sampled_sets
from gralora_diffusion.training.data.transforms import CropPlan
from tests.training.runs import config, make_images, make_shapes

PLAN = CropPlan(8)
SHAPES = CropPlan(8, buckets=Buckets(8, 1, ((8, 16), (16, 8))))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Example]]:
    folder = tmp_path_factory.mktemp("sets")
    counts = {"a": [(20, 10)] * 3, "b": [(20, 10)] * 4 + [(10, 20)] * 2, "c": [(10, 20)] * 5}
    return {
        name: find_examples(make_shapes(folder / name, sizes, seed=number), name)
        for number, (name, sizes) in enumerate(counts.items())
    }


def prompts(samples: TrainingSet, epochs: int) -> list[Counter[str]]:
    length = len(samples)
    return [
        Counter(samples[t]["prompt"] for t in range(length * epoch, length * (epoch + 1)))
        for epoch in range(epochs)
    ]


def test_members_of_a_rotation_come_equally_often() -> None:
    turns = Rotation([3, 4, 5, 6, 7], 3, 0, "name")
    drawn = [turns.member(epoch, number) for epoch in range(10) for number in range(3)]
    for start in range(0, 30, 5):
        assert sorted(drawn[start : start + 5]) == [3, 4, 5, 6, 7]
    assert len({tuple(drawn[start : start + 5]) for start in range(0, 30, 5)}) > 3
    again = Rotation([3, 4, 5, 6, 7], 3, 0, "name")
    assert [again.member(9, 2), again.member(0, 0)] == [drawn[29], drawn[0]]
    assert [Rotation(range(99), 99, seed, "name").member(0, 0) for seed in (0, 1)] != [0, 1]


def test_repeats_of_each_set(found: dict[str, list[Example]]) -> None:
    parts = [SampledSet(found["a"], [PLAN], repeats=4), SampledSet(found["b"], [PLAN])]
    samples = TrainingSet(parts, 0)
    assert prompts(samples, 2) == [{"a": 12, "b": 6}] * 2


def test_a_share_is_met_while_each_image_comes_equally_often(
    found: dict[str, list[Example]],
) -> None:
    """Beside 3 images of 4 repeats, a share of 0.4 is 8 samples of 6 images in each epoch."""
    parts = [SampledSet(found["a"], [PLAN], repeats=4), SampledSet(found["b"], [PLAN], share=0.4)]
    samples = TrainingSet(parts, 0)
    assert prompts(samples, 3) == [{"a": 12, "b": 8}] * 3
    keys = Counter(samples[t]["content_key"] for t in range(3 * 20))
    assert {keys[e.content_key] for e in found["a"]} == {12}
    assert {keys[e.content_key] for e in found["b"]} == {4}
    seen = [samples[t]["content_key"] for t in range(40)]
    other = TrainingSet(parts, 0)
    assert [other[t]["content_key"] for t in reversed(range(40))] == seen[::-1]
    assert [TrainingSet(parts, 1)[t]["content_key"] for t in range(40)] != seen


def test_shares_of_all_sets_show_each_image_at_least_once(
    found: dict[str, list[Example]],
) -> None:
    parts = [SampledSet(found["a"], [PLAN], share=0.8), SampledSet(found["b"], [PLAN], share=0.2)]
    samples = TrainingSet(parts, 0)
    assert prompts(samples, 2) == [{"a": 24, "b": 6}] * 2


def test_batches_of_several_sets_have_one_size(found: dict[str, list[Example]]) -> None:
    parts = [
        SampledSet(found["a"], [SHAPES], repeats=2),
        SampledSet(found["b"], [SHAPES], share=0.3),
        SampledSet(found["c"], [PLAN]),
    ]
    samples = TrainingSet(parts, 0, batch_size=2)
    sizes = Counter()
    for start in range(0, 3 * len(samples), 2):
        batch = collate([samples[start], samples[start + 1]])
        ((height, width),) = {tuple(size) for size in batch["target_sizes"].tolist()}
        assert batch["pixel_values"].shape == (2, 3, height, width)
        sizes[height, width] += 1
    assert sizes.keys() == {(8, 16), (16, 8), (8, 8)}


def test_settings_and_weights_stay_with_their_set(found: dict[str, list[Example]]) -> None:
    parts = [
        SampledSet(found["a"], [PLAN], caption_rules=CaptionRules(prefix="x"), loss_weight=0.25),
        SampledSet(found["b"], [CropPlan(16)], caption_dropout=0.5),
    ]
    samples = TrainingSet(parts, 0)
    assert samples.prompts == ["x a", "b", ""]
    seen = {
        (s["prompt"], float(s["loss_weight"]), s["pixel_values"].shape[-1])
        for s in (samples[t] for t in range(40))
    }
    assert seen == {("x a", 0.25, 8), ("b", 1.0, 16), ("", 1.0, 16)}
    batch = collate([next(s for t in range(40) if (s := samples[t])["prompt"] == "x a")])
    assert torch.equal(batch["loss_weight"], torch.tensor([0.25]))
    alike = TrainingSet([parts[1]], 0)
    assert "loss_weight" not in alike[0]


def test_one_cache_serves_plans_of_several_resolutions(found: dict[str, list[Example]]) -> None:
    parts = [SampledSet(found["a"], [PLAN]), SampledSet(found["a"], [CropPlan(16)])]

    def same(pixels: Tensor) -> tuple[Tensor, Tensor]:
        return pixels, pixels

    cached = TrainingSet(parts, 0, cache=LatentCache(PLAN, "same"), cached_crops=99)
    assert cached.fill_cache(same, progress=False) == 3 * (9 + 17)
    for position in range(20):
        sample = cached[position]
        example = next(e for e in found["a"] if e.content_key == sample["content_key"])
        side = int(sample["target_size"][0])
        whole = example.load().resize((2 * side, side), 1)  # Lanczos
        top, left = sample["crop_top_left"].tolist()
        expected = torch.from_numpy(np.array(whole.crop((left, top, left + side, top + side))))
        expected = expected.permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(sample["mean"], expected.float(), rtol=0, atol=1e-6)


def test_each_resolution_is_trained_once_in_an_epoch(found: dict[str, list[Example]]) -> None:
    """Images of a size that two resolutions share, since they are small, come once in it."""
    plans = [CropPlan(side, buckets=Buckets(side, 1)) for side in (8, 12, 64)]
    samples = TrainingSet([SampledSet(found["c"], plans)], 0, batch_size=2)
    small = [CropPlan(8, buckets=Buckets(8, 1)).target_size((10, 20))]
    small += [CropPlan(12, buckets=Buckets(12, 1)).target_size((10, 20))]
    assert small[0] != small[1]
    own = CropPlan(64, buckets=Buckets(64, 1)).target_size((10, 20))
    for epoch in range(2):
        start = epoch * len(samples)
        sizes = [
            tuple(samples[t]["target_size"].tolist()) for t in range(start, start + len(samples))
        ]
        assert all(a == b for a, b in zip(sizes[::2], sizes[1::2], strict=True))
        assert Counter(sizes) == dict.fromkeys({*small, own}, 6)  # one of five comes twice
    # 12 x 12 is more than half of 10 x 20, so the image has another size at 64
    assert len({*small, own}) == 3
    twice = TrainingSet(
        [SampledSet(found["c"], [plans[2], CropPlan(99, buckets=Buckets(99, 1))])], 0
    )
    assert len(twice) == 5


def test_each_sample_has_one_of_the_captions(found: dict[str, list[Example]]) -> None:
    images = [replace(found["a"][0], caption="one", other_captions=("two, 2", "three"))]
    rules = CaptionRules(shuffle=True, prefix="x", count=4)
    samples = TrainingSet([SampledSet(images, [PLAN], caption_rules=rules)], 0)
    assert set(samples.prompts) == {"x one", "x two, 2", "x 2, two", "x three"}
    seen = Counter(samples[t]["prompt"] for t in range(300))
    assert seen.keys() == set(samples.prompts)
    third = [seen["x one"], seen["x three"], seen["x two, 2"] + seen["x 2, two"]]
    assert all(70 < count < 130 for count in third)
    alone = TrainingSet([SampledSet([found["a"][0]], [PLAN])], 0)
    assert len({samples.digest, alone.digest}) == 2


def test_digest_follows_sets_repeats_and_shares(found: dict[str, list[Example]]) -> None:
    a, b = found["a"], found["b"]
    chosen = [
        [SampledSet([*a, *b], [PLAN])],
        [SampledSet(a, [PLAN]), SampledSet(b, [PLAN])],
        [SampledSet(a, [PLAN], repeats=2), SampledSet(b, [PLAN])],
        [SampledSet(a, [PLAN]), SampledSet(b, [PLAN], share=2 / 3)],
    ]
    assert len({TrainingSet(parts, 0).digest for parts in chosen}) == 4


def of_file(folder: Path, text: str, **options: Any) -> TrainingConfig:
    (folder / "data.yaml").write_text(text, encoding="utf-8")
    options = {"instance_prompt": None, "data_config": folder / "data.yaml", **options}
    return config(pretrained_model_name_or_path="owner/base", **options)


def test_images_of_a_file_have_the_settings_of_their_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("dogs", "cats"):
        make_images(tmp_path / name, 2)
    text = """\
- {folder: dogs, prompt: a dog, resolution: 24, trigger_word: sks, repeats: 3}
- {folder: cats, prompt: a cat, center_crop: true, share: 0.2, loss_weight: 2}
"""
    run = of_file(tmp_path, text, random_flip=True)
    images = find_images(run)
    dogs, cats = sampled_sets(run, images, 8)
    assert [e.caption for e in (*dogs.examples, *cats.examples)] == ["a dog"] * 2 + ["a cat"] * 2
    assert dogs.plans == [CropPlan(24, random_flip=True)]
    assert cats.plans == [CropPlan(16, center_crop=True, random_flip=True)]
    assert (dogs.repeats, dogs.share, cats.share, cats.loss_weight) == (3, None, 0.2, 2)
    assert TrainingSet([dogs, cats], 0).prompts == ["sks a dog", "a cat"]
    assert described_sets(run, images) == [
        "dogs: 2 images, repeats 3, 24 pixels",
        "cats: 2 images, 20 % of the samples, 16 pixels, loss weight 2",
    ]


def test_folders_with_repeats_are_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As kohya's scripts read them; the folder itself, given directly, is a plain one."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "data" / "10_sks dog", 2)
    make_images(tmp_path / "data" / "3_a cat", 3, seed=1)
    text = """\
- {folder: data/10_sks dog, prompt: sks dog, repeats: 10}
- {folder: data/3_a cat, prompt: a cat, repeats: 3}
"""
    by_names = config(instance_data_dir="data", instance_prompt=None)
    by_file = of_file(tmp_path, text)
    epochs, lines = [], []
    for run in (by_names, by_file):
        images = find_images(run)
        epochs.append(prompts(TrainingSet(sampled_sets(run, images, 8), 0), 2))
        lines.append(described_sets(run, images))
    assert epochs == [[{"sks dog": 20, "a cat": 9}] * 2] * 2
    assert lines[0] == lines[1]
    assert lines[0] == [
        "10_sks dog: 2 images, repeats 10, 16 pixels",
        "3_a cat: 3 images, repeats 3, 16 pixels",
    ]
    assert described_sets(by_names, [e for e in find_images(by_names) if not e.concept]) == []
    plain = config(instance_data_dir="data/10_sks dog", instance_prompt="a photo")
    assert {(e.caption, e.repeats) for e in find_images(plain)} == {("a photo", 1)}
    (warning,) = find_warnings(plain)
    assert "the number in its own name has no effect" in warning
    assert warning.endswith("Give its parent folder, or --repeats 10")


def test_problems_with_images_of_all_sets_are_named_with_their_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("dogs", "cats"):
        make_images(tmp_path / name, 2)
    (tmp_path / "dogs" / "0.png").write_bytes(b"no image")
    (tmp_path / "cats" / "0.txt").write_text("a cat", encoding="utf-8")
    run = of_file(tmp_path, "- {folder: dogs, prompt: a dog}\n- folder: cats\n")
    with pytest.raises(DataError) as raised:
        find_images(run)
    first, second, third, fourth = raised.value.problems
    assert first.startswith(f"{tmp_path}/data.yaml:1: 0.png cannot be decoded")
    assert second == f"{tmp_path}/data.yaml:1: To train without these images, give skip_bad_images"
    assert third == f"{tmp_path}/data.yaml:2: 1.png has no caption"
    assert fourth.startswith(f"{tmp_path}/data.yaml:2: Give prompt for all images without one")
