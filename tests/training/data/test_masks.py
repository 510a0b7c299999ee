"""Masks: which one an image has, what is refused by name, and what becomes of one in a crop."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.training.data.buckets import Buckets
from gralora_diffusion.training.data.cache import LatentCache
from gralora_diffusion.training.data.data_module import find_images
from gralora_diffusion.training.data.dataset import TrainingSet, collate
from gralora_diffusion.training.data.hf_dataset import find_dataset_examples
from gralora_diffusion.training.data.image_folder import Example, find_examples
from gralora_diffusion.training.data.masks import MaskPlaces, latent_mask
from gralora_diffusion.training.data.transforms import CropPlan, Variant
from gralora_diffusion.training.preparation import digest_of
from tests.training.runs import config, one_set

SIZE = (12, 8)
BESIDE = MaskPlaces()


def image(path: Path, size: tuple[int, int] = SIZE, seed: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels, mode).save(path)
    return path


def mask(path: Path, box: tuple[int, int, int, int] = (2, 2, 6, 6), **options: Any) -> Path:
    """White in the box, black elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("L", options.get("size", SIZE), 0)
    picture.paste(options.get("level", 255), box)
    picture.save(path)
    return path


def boxes(folder: Path, places: MaskPlaces = BESIDE, **options: Any) -> dict[str, Any]:
    """Image -> the box of its mask."""
    found = find_examples(folder, "a dog", masks=places, **options)
    return {e.source.name: e.mask and e.mask.box for e in found}


def problems(folder: Path, places: MaskPlaces = BESIDE) -> list[str]:
    with pytest.raises(DataError) as caught:
        find_examples(folder, "a dog", masks=places)
    return caught.value.problems


# -- where they are --------------------------------------------------------------------------------


def test_masks_beside_the_images(tmp_path, caplog):
    names = ("a.mask.png", "b-masklabel.tiff", "c_mask.PNG", "D-Mask.bmp", "e_masklabel.png")
    for number, name in enumerate(names):
        image(tmp_path / f"{'abcde'[number]}.png", seed=number)
        mask(tmp_path / name, (number, 0, number + 1, 1))
    image(tmp_path / "f.png")
    image(tmp_path / "gas_mask.png")
    mask(tmp_path / "f-condlabel.png")
    mask(tmp_path / "gone-masklabel.png")
    expected = {f"{'abcde'[n]}.png": (n, 0, n + 1, 1) for n in range(5)}
    with caplog.at_level(logging.WARNING):
        assert boxes(tmp_path) == {**expected, "f.png": None, "gas_mask.png": None}
    assert "masks left out, since they belong to no image (2)" in caplog.text
    assert "f-condlabel.png, gone-masklabel.png" in caplog.text


def test_masks_in_a_folder(tmp_path, caplog):
    images, masks = tmp_path / "images", tmp_path / "images" / "masks"
    image(images / "1.jpg")
    image(images / "2.png")
    image(images / "3.png")
    mask(masks / "1.png", (1, 0, 2, 1))
    mask(masks / "2.png", (2, 0, 3, 1))
    mask(masks / "2.webp", (5, 0, 6, 1))
    mask(masks / "other.png")
    with caplog.at_level(logging.WARNING):
        assert boxes(images, MaskPlaces(masks)) == {
            "1.jpg": (1, 0, 2, 1),
            "2.png": (2, 0, 3, 1),
            "3.png": None,
        }
    assert "sub-folders" not in caplog.text
    assert "they belong to no image (2)" in caplog.text
    assert str(masks / "other.png") in caplog.text


def test_masks_of_concepts(tmp_path, caplog):
    image(tmp_path / "10_sks dog" / "1.png")
    image(tmp_path / "2_cat" / "1.png", seed=1)
    mask(tmp_path / "masks" / "10_sks dog" / "1.png", (1, 0, 2, 1))
    mask(tmp_path / "2_cat" / "1.mask.png", (2, 0, 3, 1))
    with caplog.at_level(logging.WARNING):
        found = find_examples(tmp_path, masks=MaskPlaces(tmp_path / "masks"))
    assert [(e.concept, e.mask.box) for e in found] == [
        ("10_sks dog", (1, 0, 2, 1)),
        ("2_cat", (2, 0, 3, 1)),
    ]
    assert not caplog.text


@pytest.mark.parametrize("column", ["mask", "mask_file_name", "region"])
def test_masks_in_a_metadata_file(tmp_path, caplog, column):
    """A mask of any name is no image, wherever it is."""
    for name in ("1.png", "2.png", "sub/3.png"):
        image(tmp_path / name)
    mask(tmp_path / "m1.png", (1, 0, 2, 1))
    mask(tmp_path / "masks" / "m3.png", (3, 0, 4, 1))
    rows = [
        {"file_name": "1.png", "text": "one", column: "m1.png"},
        {"file_name": "2.png", "text": "two", column: None},
        {"file_name": "sub/3.png", "text": "three", column: "./masks/m3.png"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    places = MaskPlaces(column="region" if column == "region" else None)
    with caplog.at_level(logging.WARNING):
        assert boxes(tmp_path, places) == {
            "1.png": (1, 0, 2, 1),
            "2.png": None,
            "3.png": (3, 0, 4, 1),
        }
    assert not caplog.text


def test_masks_of_transparency(tmp_path):
    picture = Image.new("RGBA", SIZE, (200, 10, 10, 0))
    picture.paste((10, 200, 10, 255), (3, 1, 7, 5))
    picture.save(tmp_path / "1.png")
    image(tmp_path / "2.png")
    image(tmp_path / "3.png", mode="RGBA")
    opaque = Image.open(tmp_path / "3.png").convert("RGBA")
    opaque.putalpha(255)
    opaque.save(tmp_path / "3.png")
    picture.save(tmp_path / "4.png")
    mask(tmp_path / "4.mask.png", (0, 0, 1, 1))
    found = boxes(tmp_path, MaskPlaces(from_alpha=True))
    assert found == {"1.png": (3, 1, 7, 5), "2.png": None, "3.png": None, "4.png": (0, 0, 1, 1)}
    assert boxes(tmp_path)["1.png"] is None
    (first, *_) = find_examples(tmp_path, "a dog", masks=MaskPlaces(from_alpha=True))
    expected = np.zeros((8, 12), np.uint8)
    expected[1:5, 3:7] = 255
    assert np.array_equal(np.asarray(first.mask.load()), expected)


def test_masks_of_a_dataset(tmp_path, caplog):
    def data(path: Path) -> dict[str, Any]:
        return {"bytes": path.read_bytes(), "path": None}

    rows = {
        "image": [data(image(tmp_path / "x.png", seed=n)) for n in range(3)],
        "mask": [data(mask(tmp_path / "m.png", (1, 0, 2, 1))), None, data(tmp_path / "m.png")],
    }
    table = datasets.Dataset.from_dict(rows)
    for name in rows:
        table = table.cast_column(name, datasets.Image())
    (tmp_path / "set").mkdir()
    table.to_parquet(str(tmp_path / "set" / "train-00000.parquet"))

    def found(**options: Any) -> list[Example]:
        cache = str(tmp_path / "cache")
        return find_dataset_examples(str(tmp_path / "set"), "a dog", cache_dir=cache, **options)

    for places in (BESIDE, MaskPlaces(column="mask")):
        examples = found(masks=places)
        assert [e.mask and e.mask.box for e in examples] == [(1, 0, 2, 1), None, (1, 0, 2, 1)]
    assert np.array_equal(np.asarray(examples[0].mask.load()), Image.open(tmp_path / "m.png"))
    assert not caplog.text
    assert [e.mask for e in found()] == [None] * 3
    assert "masks left out, since --masked_loss is not given: column mask" in caplog.text
    with pytest.raises(DataError, match="--mask_column is 'region', but there is no such column"):
        found(masks=MaskPlaces(column="region"))


# -- what is refused -------------------------------------------------------------------------------


def test_masks_that_cannot_be_used_are_all_named(tmp_path):
    for name in "abcdefghi":
        image(tmp_path / f"{name}.png")
    mask(tmp_path / "a.mask.png")
    mask(tmp_path / "b.mask.png", size=(8, 12))
    mask(tmp_path / "c.mask.png", size=(24, 16))
    mask(tmp_path / "d.mask.png", level=0)
    mask(tmp_path / "e.mask.png", level=1)
    image(tmp_path / "f.mask.png")
    (tmp_path / "g.mask.png").write_bytes(b"junk")
    clear = Image.new("RGBA", SIZE, (255, 255, 255, 0))
    clear.save(tmp_path / "h.png")
    mask(tmp_path / "i.mask.png", level=15)  # as of a map of classes
    found = problems(tmp_path, MaskPlaces(from_alpha=True))
    size = "pixels, but the image has 12 x 8. Give a mask of the image's size"
    black = "is all black, so nothing of the image would be trained."
    expected = [
        f"b.png: its mask b.mask.png has 8 x 12 {size}",
        f"c.png: its mask c.mask.png has 24 x 16 {size}",
        f"d.png: its mask d.mask.png {black}",
        "e.png: its mask e.mask.png has only the values 0 and 1 on a scale of 255. Multiply its "
        "values by 255",
        "f.png: its mask f.mask.png cannot be used: it has colors, but a mask is white, gray and",
        "g.png: its mask g.mask.png cannot be used: it is not an image in a format",
        f"h.png: the mask of its opacity {black}",
        "i.png: its mask i.mask.png has no value above 15 on a scale of 255, so nearly nothing of",
        "To train without these images, give --skip_bad_images",
    ]
    assert [f.startswith(e) for f, e in zip(found, expected, strict=True)] == [True] * 9, found
    kept = boxes(tmp_path, MaskPlaces(from_alpha=True), skip_bad_images=True)
    assert kept == {"a.png": (2, 2, 6, 6)}


def test_a_mask_that_is_a_link_to_itself(tmp_path):
    """For which ``Path.resolve`` raises."""
    image(tmp_path / "a.png")
    (tmp_path / "a.mask.png").symlink_to(tmp_path / "a.mask.png")
    assert problems(tmp_path)[0].startswith("a.png: its mask a.mask.png cannot be used: ")


def test_several_masks_of_an_image(tmp_path):
    for name in ("1.png", "2.png"):
        image(tmp_path / name)
        mask(tmp_path / f"{name[0]}_mask.png")
    mask(tmp_path / "2-mask.png")
    masks = tmp_path / "masks"
    mask(masks / "1.png")
    # the same file under two names is one mask
    rows = [{"file_name": "1.png"}, {"file_name": "2.png", "mask": "2_mask.png"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert problems(tmp_path, MaskPlaces(masks)) == [
        f"1.png has several masks: {masks / '1.png'}, 1_mask.png. Keep one of them",
        "2.png has several masks: 2_mask.png, 2-mask.png. Keep one of them",
    ]
    (tmp_path / "2-mask.png").unlink()
    (masks / "1.png").unlink()
    assert boxes(tmp_path) == dict.fromkeys(("1.png", "2.png"), (2, 2, 6, 6))


def test_a_mask_of_several_images(tmp_path):
    """By its name it may be of either; a metadata file may give it to both."""
    for name in ("1.png", "1.bmp", "2.png", "2.bmp"):
        image(tmp_path / name)
    mask(tmp_path / "1-mask.png")
    mask(tmp_path / "masks" / "2.png")
    places = MaskPlaces(tmp_path / "masks")
    assert problems(tmp_path, places) == [
        "masks belong to several images by their names: 1-mask.png (1.bmp, 1.png), "
        f"{tmp_path}/masks/2.png (2.bmp, 2.png). Rename the images, or name the mask of each in "
        "the metadata file"
    ]
    lines = [
        {"file_name": f"{n}.{end}", "mask": "1-mask.png"} for n in (1, 2) for end in ("png", "bmp")
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8")
    assert set(boxes(tmp_path).values()) == {(2, 2, 6, 6)}


def test_metadata_that_names_no_mask(tmp_path):
    for name in ("1.png", "2.png", "3.png", "4.png"):
        image(tmp_path / name)
    rows = [
        {"file_name": "1.png", "mask": "gone.png"},
        {"file_name": "2.png", "mask": "../2.png"},
        {"file_name": "3.png", "mask": 3},
        {"file_name": "4.png", "mask": "1.png"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert problems(tmp_path) == [
        "metadata.jsonl, line 3: the mask is 3; it must be the path of an image",
        "listed as images and as masks: 1.png",
        "2.png: its mask in the metadata file is ../2.png, which is not in the folder",
        "4.png: its mask 1.png cannot be used: it has colors, but a mask is white, gray and black",
        "To train without these images, give --skip_bad_images",
    ]
    (tmp_path / "metadata.jsonl").write_text(json.dumps({**rows[0], "mask": "."}))
    assert problems(tmp_path) == ["1.png: its mask in the metadata file is ., which is not a file"]
    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows[0]))
    assert problems(tmp_path) == [
        "1.png: its mask in the metadata file is gone.png, which does not exist"
    ]
    assert problems(tmp_path, MaskPlaces(column="region"))[0].startswith(
        "--mask_column is 'region'"
    )


def test_masks_that_are_not_wanted_are_named(tmp_path, caplog):
    image(tmp_path / "1.png")
    image(tmp_path / "2.png")
    mask(tmp_path / "1.mask.png")
    mask(tmp_path / "m.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "2.png", "mask": "m.png"}))
    for role, why in (("instance", "--masked_loss is not given"), ("class", "trained as a whole")):
        caplog.clear()
        found = find_examples(tmp_path, "a dog", role=role)
        assert [(e.source.name, e.mask) for e in found] == [("1.png", None), ("2.png", None)]
        assert why in caplog.text
        assert "(2): 1.mask.png, m.png" in caplog.text


def test_images_without_masks(tmp_path, caplog):
    image(tmp_path / "1.png")
    image(tmp_path / "2.png")
    options = {"instance_data_dir": str(tmp_path), "masked_loss": True}
    with pytest.raises(DataError, match=r"no image has a mask\. Put masks"):
        find_images(config(**options))
    with pytest.raises(DataError, match="no image has a mask, and all are opaque"):
        find_images(config(**options, mask_from_alpha=True))
    mask(tmp_path / "2.mask.png")
    assert [bool(e.mask) for e in find_images(config(**options))] == [False, True]
    assert "images without a mask, which are trained as a whole (1): 1.png" in caplog.text


# -- what becomes of them --------------------------------------------------------------------------


def gradient_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """A mask whose levels tell every pixel from its neighbours."""
    width, height = size
    levels = np.add.outer(np.arange(height) * 7, np.arange(width) * 3) % 255 + 1
    picture = Image.fromarray(levels.astype(np.uint8))
    picture.save(path)
    return picture


@pytest.mark.parametrize("random_flip", [False, True])
@pytest.mark.parametrize("buckets", [None, Buckets(16, 8, ((16, 16), (16, 32)))])
def test_a_mask_is_cut_as_its_image(tmp_path, buckets, random_flip):
    """An image whose three channels are its mask, read with the mask's own filter."""
    size = (60, 36)
    same = gradient_mask(tmp_path / "1.mask.png", size)
    Image.merge("RGB", [same] * 3).save(tmp_path / "1.png")
    examples = find_examples(tmp_path, "a dog", masks=BESIDE)
    plan = CropPlan(16, random_flip=random_flip, interpolation="box", buckets=buckets)
    samples = one_set(examples, plan, seed=3)
    seen = set()
    for position in range(12):
        sample = samples[position]
        pixels = sample["pixel_values"][:1] / 2 + 0.5
        torch.testing.assert_close(sample["mask"], pixels, rtol=0, atol=1e-6)
        seen.add(tuple(sample["crop_top_left"].tolist()))
    assert len(seen) > 1


def test_a_mask_is_resized_by_area_whatever_images_are_resized_by(tmp_path):
    size = (24, 16)
    picture = gradient_mask(tmp_path / "m.png", size)
    plan = CropPlan(8, interpolation="lanczos", random_flip=True)
    levels = np.asarray(picture, dtype=float) / 255
    expected = levels.reshape(8, 2, 12, 2).mean((1, 3))[:, 2:10]
    values = plan.mask_values(picture, Variant(2, 0, 8, 8, flip=False))
    np.testing.assert_allclose(values[0].numpy(), expected, atol=1.01 / 255)
    flipped = plan.mask_values(ImageOps.mirror(picture), Variant(2, 0, 8, 8, flip=True))
    assert torch.equal(values, flipped)
    latents = latent_mask(values, (2, 4))
    blocks = values.numpy().reshape(2, 4, 4, 2).mean((1, 3))
    np.testing.assert_allclose(latents[0].numpy(), blocks, rtol=1e-6)


def identity(pixels):
    """An encoder of latents of half the size."""
    halves = torch.nn.functional.avg_pool2d(pixels, 2)
    return halves, halves.abs()


def test_cached_masks_and_their_keys(tmp_path):
    image(tmp_path / "1.png", (40, 16))
    image(tmp_path / "2.png", (40, 16), seed=1)
    mask(tmp_path / "1.mask.png", (0, 4, 20, 12), size=(40, 16))
    plan = CropPlan(8, random_flip=True)

    def filled() -> tuple[TrainingSet, int]:
        examples = find_examples(tmp_path, "a dog", masks=BESIDE)
        cache = LatentCache(plan, "identity", tmp_path / "cache")
        samples = one_set(examples, plan, 0, cache=cache, cached_crops=4)
        return samples, samples.fill_cache(identity, progress=False)

    samples, made = filled()
    assert made == 8
    for position in range(8):
        sample = samples[position]
        assert sample["mask"].shape == (1, 4, 4)
        example = next(e for e in samples.examples if e.content_key == sample["content_key"])
        if example.mask is None:
            assert torch.equal(sample["mask"], torch.ones(1, 4, 4))
            continue
        left, top = sample["crop_top_left"].flip(0).tolist()
        options = [
            latent_mask(plan.mask_values(example.mask.load(), Variant(left, top, 8, 8, f)), (4, 4))
            for f in (False, True)
        ]
        assert any(torch.equal(sample["mask"], option) for option in options)
    assert collate([samples[0], samples[1]])["mask"].shape == (2, 1, 4, 4)
    digests = {samples.digest, digest_of(samples.examples)}
    assert filled()[1] == 0
    mask(tmp_path / "1.mask.png", (0, 4, 19, 12), size=(40, 16))
    samples, made = filled()
    assert made == 4  # of the image whose mask is another
    (tmp_path / "1.mask.png").unlink()
    whole, made = filled()
    assert made == 4
    assert "mask" not in whole[0]
    digests |= {samples.digest, digest_of(samples.examples)}
    digests |= {whole.digest, digest_of(whole.examples)}
    assert len(digests) == 6


def test_crops_that_miss_the_mask_are_told(tmp_path, caplog):
    for number, box in enumerate([(0, 0, 8, 16), (12, 0, 28, 16), (0, 0, 40, 16), (19, 3, 21, 9)]):
        image(tmp_path / f"{number}.png", (40, 16), seed=number)
        mask(tmp_path / f"{number}.mask.png", box, size=(40, 16))
    examples = find_examples(tmp_path, "a dog", masks=BESIDE)
    one_set(examples, CropPlan(16), 0)
    missed = "masks whose white part a crop may miss; such a sample trains nothing inside"
    assert f"{missed} (2): 0.png, 3.png" in caplog.text
    caplog.clear()
    one_set(examples, CropPlan(16, center_crop=True), 0)
    assert "(1): 0.png" in caplog.text
    missing = {
        e.source.name
        for e in examples
        for left in range(25)
        if not CropPlan(16).mask_values(e.mask.load(), Variant(left, 0, 16, 16, False)).any()
    }
    assert missing == {"0.png", "3.png"}


def test_a_mask_that_changes_after_the_start_is_noticed(tmp_path):
    image(tmp_path / "1.png")
    mask(tmp_path / "1.mask.png")
    (example,) = find_examples(tmp_path, "a dog", masks=BESIDE)
    example.mask.load()
    mask(tmp_path / "1.mask.png", (0, 0, 1, 1))
    with pytest.raises(DataError, match="was changed after the run started"):
        example.mask.load()
