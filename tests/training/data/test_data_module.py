"""What the batches of a run hold."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from gralora_diffusion.families import get_family, mend_clip_skip
from gralora_diffusion.io.errors import DataError
from gralora_diffusion.training.data.data_module import Batches, find_class_images, find_images
from tests.models import stable_diffusion
from tests.training.runs import config, make_images, make_shapes

FAMILY = get_family("stable-diffusion")


def batches(images: Path, **options: Any) -> Batches:
    chosen = config(
        pretrained_model_name_or_path="owner/base", instance_data_dir=images, **options
    ).with_defaults({"resolution": 16})
    return Batches(
        chosen,
        FAMILY,
        stable_diffusion(),
        find_images(chosen),
        find_class_images(chosen),
        Accelerator(cpu=True),
    )


@pytest.mark.parametrize("options", [{}, {"cache_latents": False, "dataloader_num_workers": 1}])
def test_positions_go_on_from_the_first_step(images: Path, options: dict[str, Any]) -> None:
    data = batches(images, gradient_accumulation_steps=2, **options)
    whole = [batch["positions"] for batch, _ in data.steps(0, 3)]
    assert whole == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert [batch["positions"] for batch, _ in data.steps(2, 3)] == whole[4:]


def test_cached_latents_are_the_vaes(images: Path) -> None:
    cached = batches(images, center_crop=True)
    fresh = batches(images, center_crop=True, cache_latents=False)
    (a, none), (b, _) = next(cached.steps(0, 1)), next(fresh.steps(0, 1))
    assert none is None
    assert a["content_keys"] == b["content_keys"]
    with torch.no_grad():
        mean, std = fresh.encode_images(b["pixel_values"])
    torch.testing.assert_close(a["mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a["std"], std, rtol=1e-4, atol=1e-5)


def test_prompts_are_encoded_once_unless_the_encoder_trains(images: Path) -> None:
    pipe = stable_diffusion()
    data = batches(images, caption_dropout=0.5)
    assert data.prompts is not None
    for prompt in ("a sks dog", ""):
        with torch.no_grad():
            expected, _ = pipe.encode_prompt([prompt], "cpu", 1, False)
        encoded = data.prompts.batch([prompt])["prompt_embeds"]
        torch.testing.assert_close(encoded, expected, rtol=1e-5, atol=1e-5)
    assert batches(images, train_text_encoder=True).prompts is None


def test_prompts_are_encoded_without_the_layers_to_skip(images: Path) -> None:
    pipe = stable_diffusion()
    mend_clip_skip(pipe)
    data = batches(images, clip_skip=1)
    assert data.prompts is not None
    encoded = data.prompts.batch(["a sks dog"])["prompt_embeds"]
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(["a sks dog"], "cpu", 1, False, clip_skip=1)
        whole, _ = pipe.encode_prompt(["a sks dog"], "cpu", 1, False)
    torch.testing.assert_close(encoded, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(encoded, whole, atol=1e-2)
    assert data.digest != batches(images).digest


def test_class_images_have_their_own_stream(images: Path, tmp_path: Path) -> None:
    classes = make_images(tmp_path / "class", 4, seed=3)
    data = batches(
        images,
        with_prior_preservation=True,
        class_prompt="a dog",
        class_data_dir=classes,
        num_class_images=4,
    )
    seen = [other for _, other in data.steps(0, 2)]
    assert len({key for batch in seen if batch for key in batch["content_keys"]}) == 4
    assert {prompt for batch in seen if batch for prompt in batch["prompts"]} == {"a dog"}


#: As (width, height), with what --aspect_ratio_buckets "16,24;16,16;24,16" makes of them.
WIDE, SQUARE, TALL = (30, 20), (21, 20), (20, 33)


@pytest.mark.parametrize("cached", [True, False])
def test_buckets_leave_out_no_image_of_subject_or_class(tmp_path: Path, cached: bool) -> None:
    classes = make_shapes(tmp_path / "class", [TALL] * 5 + [SQUARE] * 4 + [WIDE], seed=3)
    data = batches(
        make_shapes(tmp_path / "instance", [WIDE, WIDE, SQUARE]),
        aspect_ratio_buckets="16,24;16,16;24,16",
        cache_latents=cached,
        with_prior_preservation=True,
        class_prompt="a dog",
        class_data_dir=classes,
        num_class_images=10,
    )
    assert len(data) == 4
    seen: tuple[set[str], set[str]] = (set(), set())
    shapes = set()
    for pair in data.steps(0, 6):  # of two images each: an epoch of the class, three of instances
        for batch, keys in zip(pair, seen, strict=True):
            assert batch is not None
            pixels = batch["mean" if cached else "pixel_values"]
            ((height, width),) = {tuple(size) for size in batch["target_sizes"].tolist()}
            shrunk = 2 if cached else 1  # by the tiny VAE
            assert pixels.shape[2:] == (height // shrunk, width // shrunk)
            keys.update(batch["content_keys"])
        shapes.add(tuple(tuple(batch["target_sizes"][0].tolist()) for batch in pair if batch))
    assert (len(seen[0]), len(seen[1])) == (3, 10)
    assert any(instance != other for instance, other in shapes)


def test_class_images_are_none_of_the_subject(images: Path, tmp_path: Path) -> None:
    classes = make_images(tmp_path / "class", 3, seed=2)
    chosen = config(
        pretrained_model_name_or_path="owner/base",
        instance_data_dir=images,
        with_prior_preservation=True,
        class_prompt="a dog",
        class_data_dir=classes,
        num_class_images=3,
    )
    found = find_images(chosen)
    assert list(find_class_images(chosen, found)) == list(find_class_images(chosen))
    shutil.copyfile(images / "1.png", classes / "2.png")
    shutil.copyfile(images / "0.png", classes / "x.png")
    with pytest.raises(DataError) as error:
        find_class_images(chosen, found)
    assert str(error.value).startswith(f"--class_data_dir {str(classes)!r}:")
    pairs = {"2.png": "1.png", "x.png": "0.png"}
    assert error.value.problems == [
        f"{name} is the same image as {other}, which is trained on as the subject. Class images "
        "should show other members of the class: remove one of them"
        for name, other in pairs.items()
    ]


def test_shapes_are_made_from_the_resolution_and_the_families_divisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(FAMILY), "size_divisor", lambda self, pipe: 4)
    folder = make_shapes(tmp_path, [(320, 160), (100, 100), (9, 16)])
    data = batches(folder, use_aspect_ratio_buckets=True)
    # 2:1 with 16 * 16 pixels is 22.6 x 11.3; 9:16 with 12 * 12 is 9 x 16
    assert data.instance.targets == [(12, 24), (16, 16), (16, 8)]


def test_digest_follows_what_decides_the_samples(images: Path, tmp_path: Path) -> None:
    usual = batches(images).digest
    assert batches(images, learning_rate=1).digest == usual
    changed: list[dict[str, Any]] = [
        {"instance_prompt": "another"},
        {"train_batch_size": 3},
        {"seed": 1},
        {"random_flip": True},
        {"use_aspect_ratio_buckets": True},
        {"aspect_ratio_buckets": "16,24;24,16"},
    ]
    digests = [batches(images, **options).digest for options in changed]
    digests.append(batches(make_images(tmp_path / "others", seed=9)).digest)
    assert len({usual, *digests}) == 8
