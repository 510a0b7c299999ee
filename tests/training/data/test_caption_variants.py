"""Captions as prompts: tags shuffled or left out, a prefix and a suffix."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from gralora_diffusion.training.data.caption_variants import CaptionRules
from gralora_diffusion.training.data.data_module import facts_of_samples, find_images
from gralora_diffusion.training.data.transforms import CropPlan
from tests.training.runs import config, one_set

CAPTION = "a dog, red,  big ,on grass,"
TAGS = ["a dog", "red", "big", "on grass"]


def test_the_trigger_is_in_every_prompt():
    """In place of ``[trigger]``, or first; upper and lower case do not matter."""
    rules = CaptionRules(trigger="sks dog")
    wanted = {
        "on grass": "sks dog on grass",
        "a photo of [trigger], on grass": "a photo of sks dog, on grass",
        "A Sks Dog": "A Sks Dog",
        "": "sks dog",
    }
    for caption, prompt in wanted.items():
        assert rules.variants(caption, 0) == (prompt,)
    rules = CaptionRules(trigger="sks", dropout=0.9, count=20)
    assert all("sks" in prompt for prompt in rules.variants("sks, red, big, old", 0))


def test_captions_are_left_as_they_are() -> None:
    assert CaptionRules().variants(CAPTION, 0) == (CAPTION,)
    assert CaptionRules(keep=2, count=5).variants(CAPTION, 0) == (CAPTION,)
    framed = CaptionRules(prefix="sks,", suffix="photo").variants(CAPTION, 0)
    assert framed == (f"sks, {CAPTION} photo",)
    assert CaptionRules(prefix="sks").variants("", 0) == ("sks",)


def test_shuffled() -> None:
    found = CaptionRules(shuffle=True, keep=1, count=200).variants(CAPTION, 0)
    assert len(found) == 6  # orders of three tags, each once
    for prompt in found:
        first, *others = prompt.split(", ")
        assert first == TAGS[0]
        assert sorted(others) == sorted(TAGS[1:])


def test_left_out() -> None:
    rules = CaptionRules(dropout=0.3, keep=1, count=1)
    counts = Counter[str]()
    for seed in range(2000):
        [prompt] = rules.variants(CAPTION, seed)
        tags = prompt.split(", ")
        assert tags == [tag for tag in TAGS if tag in tags]  # in their order
        counts.update(tags)
    assert counts.pop(TAGS[0]) == 2000
    assert all(0.67 < count / 2000 < 0.73 for count in counts.values())


def test_one_tag_always_stays() -> None:
    found = CaptionRules(dropout=0.99, count=100).variants(CAPTION, 0)
    assert all(found)
    assert "a dog" in found


def test_a_function_of_seed_and_caption() -> None:
    rules = CaptionRules(shuffle=True, dropout=0.2, count=4)
    assert rules.variants(CAPTION, 0) == rules.variants(CAPTION, 0)
    assert rules.variants(CAPTION, 0) != rules.variants(CAPTION, 1)
    fewer = CaptionRules(shuffle=True, dropout=0.2, count=2)
    assert fewer.variants(CAPTION, 0) == rules.variants(CAPTION, 0)[:2]


def test_samples_use_every_variant(images: Path, tmp_path: Path) -> None:
    options = config(
        instance_data_dir=images,
        instance_prompt=CAPTION,
        shuffle_tags=True,
        keep_tags=1,
        caption_variants=3,
        caption_prefix="sks,",
        pretrained_model_name_or_path="x",
    )
    rules = CaptionRules.of(options)
    assert rules == CaptionRules(prefix="sks,", shuffle=True, keep=1, count=3)
    found = find_images(options)
    samples = one_set(found, CropPlan(16), 0, caption_rules=rules)
    prompts = [samples[position]["prompt"] for position in range(60)]
    assert set(prompts) == set(samples.prompts) == set(rules.variants(found[0].caption, 0))
    assert prompts == [samples[position]["prompt"] for position in range(60)]


@pytest.mark.parametrize("changed", [{}, {"shuffle_tags": True}, {"caption_suffix": "x"}])
def test_another_rule_is_another_run(changed: dict[str, object]) -> None:
    assert (facts_of_samples(config(**changed)) == facts_of_samples(config())) is not changed
