"""Embeddings against transformers used directly, image by image."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Dinov2Model, ViTModel

from gralora_diffusion.benchmark.evaluation import encoders
from gralora_diffusion.benchmark.evaluation.encoders import (
    load_encoder,
    read_image_file,
    source_problem,
)
from gralora_diffusion.io.errors import DataError
from tests.benchmark import judges


def close(got, expected, tolerance=1e-6):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def rgb(path):
    return Image.open(path).convert("RGB")


def pixels(folder, image):
    return AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt")


def dino_pixels(image):
    """Resize(256, bicubic), CenterCrop(224), ToTensor, Normalize, as DINO's authors have it."""
    width, height = image.size
    scale = 256 / min(image.size)
    image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    values = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
    values = (values - np.float32(judges.MEAN)) / np.float32(judges.STD)
    return torch.from_numpy(values).permute(2, 0, 1)[None]


# -- against transformers --------------------------------------------------------------------------


@torch.no_grad()
def test_dinov2(dinov2, drawn):
    model = Dinov2Model.from_pretrained(dinov2).eval()
    expected = [model(**pixels(dinov2, rgb(p))).last_hidden_state[0, 0] for p in drawn]
    got = load_encoder(dinov2).embed_images(drawn)
    assert got.dtype == torch.float32
    close(got, torch.stack(expected))
    # what is called the pooled output is the same
    close(got, torch.cat([model(**pixels(dinov2, rgb(p))).pooler_output for p in drawn]))
    assert cosine_similarity(got[:1], got[1:]).max() < 0.999  # images can be told from each other


@torch.no_grad()
def test_dino_as_published(dino, drawn):
    model = ViTModel.from_pretrained(dino, add_pooling_layer=False).eval()
    expected = [model(dino_pixels(rgb(path))).last_hidden_state[0, 0] for path in drawn]
    close(load_encoder(dino).embed_images(drawn), torch.stack(expected), 2e-6)


@torch.no_grad()
def test_dino_as_its_processor_ships(dino, drawn):
    model = ViTModel.from_pretrained(dino, add_pooling_layer=False).eval()
    expected = [model(**pixels(dino, rgb(p))).last_hidden_state[0, 0] for p in drawn]
    got = load_encoder(dino, preprocessing="shipped").embed_images(drawn)
    close(got, torch.stack(expected))
    assert (got - load_encoder(dino).embed_images(drawn)).abs().max() > 0.1


@torch.no_grad()
def test_vit_of_another_size_as_its_processor_ships(tmp_path, drawn):
    folder = judges.save_vit(tmp_path, side=32)
    model = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    expected = [model(**pixels(folder, rgb(p))).last_hidden_state[0, 0] for p in drawn]
    close(load_encoder(folder).embed_images(drawn), torch.stack(expected))


@torch.no_grad()
def test_clip(clip, drawn):
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    texts = ["a dog", "a cat", "a red toy", "dog", "x", "a wet vase"]
    encoder = load_encoder(clip)
    assert encoder.reads_text
    images, words = encoder.embed_images(drawn), encoder.embed_texts(texts)
    for row, path, text in zip(range(6), drawn, texts, strict=True):
        inputs = {**pixels(clip, rgb(path)), **tokenizer(text, return_tensors="pt")}
        output = model(**inputs)
        close(images[row] / images[row].norm(), output.image_embeds[0])
        close(words[row] / words[row].norm(), output.text_embeds[0])


@torch.no_grad()
def test_text_longer_than_clip_reads(clip, caplog):
    encoder, model = load_encoder(clip), CLIPModel.from_pretrained(clip).eval()
    text = "abcdefghijklmnopqrstuvwxyz"
    with caplog.at_level(logging.WARNING):
        got = encoder.embed_texts([text, "a dog"])
    tokens = AutoTokenizer.from_pretrained(clip)(text)["input_ids"]
    ids = torch.tensor([[*tokens[:15], tokens[-1]]])  # the last is the end, whose embedding is read
    close(got[:1], model.get_text_features(input_ids=ids).pooler_output)
    assert [r.getMessage() for r in caplog.records] == [
        f"a text of 28 tokens is cut off after 16: {text}"
    ]


def rewrite(folder, name, **fields):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@torch.no_grad()
def test_files_as_they_were_written_years_ago(tmp_path, dino, clip, drawn):
    """As on the Hub: sizes as numbers, extractors of features, the wrong end of a text."""
    old_dino, old_clip = (
        shutil.copytree(folder, tmp_path / name)
        for folder, name in ((dino, "dino"), (clip, "clip"))
    )
    extractor = {"do_normalize": True, "do_resize": True, "image_mean": judges.MEAN}
    extractor |= {"image_std": judges.STD, "feature_extractor_type": "ViTFeatureExtractor"}
    path = old_dino / "preprocessor_config.json"
    path.write_text(json.dumps({**extractor, "resample": 2, "size": 224}))
    expected = load_encoder(dino).embed_images(drawn)
    assert torch.equal(load_encoder(old_dino).embed_images(drawn), expected)

    path = old_clip / "preprocessor_config.json"
    extractor = {k: v for k, v in json.loads(path.read_text()).items() if k != "crop_size"}
    del extractor["image_processor_type"]
    extractor |= {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32}
    path.write_text(json.dumps(extractor))
    text = json.loads((old_clip / "config.json").read_text())["text_config"]
    rewrite(old_clip, "config.json", text_config={**text, "eos_token_id": 2})
    new, old = load_encoder(clip), load_encoder(old_clip)
    assert torch.equal(old.embed_images(drawn), new.embed_images(drawn))
    close(old.embed_texts(["a dog", "x"]), new.embed_texts(["a dog", "x"]))


# -- order, batches, devices -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dinov2", "dino", "clip"])
def test_order_and_batches_do_not_matter(request, name, drawn):
    folder = request.getfixturevalue(name)
    expected = load_encoder(folder).embed_images(drawn)
    for batch_size in (1, 4, 6, 100):
        close(load_encoder(folder, batch_size=batch_size).embed_images(drawn), expected, 1e-5)
    close(load_encoder(folder).embed_images(drawn[::-1]), expected.flip(0), 1e-5)
    as_images = [rgb(drawn[0]), str(drawn[1]), *drawn[2:]]
    assert torch.equal(load_encoder(folder).embed_images(as_images), expected)


def test_texts_in_batches(clip):
    texts = ["a dog", "x", "a purple vase"]
    expected = load_encoder(clip).embed_texts(texts)
    close(load_encoder(clip, batch_size=1).embed_texts(texts), expected)
    close(load_encoder(clip, batch_size=2).embed_texts(texts[::-1]), expected.flip(0))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dinov2", "dino", "clip"])
def test_on_a_gpu(request, name, drawn):
    folder = request.getfixturevalue(name)
    expected = load_encoder(folder).embed_images(drawn)
    got = load_encoder(folder, device="cuda").embed_images(drawn)
    assert got.device.type == "cpu"
    close(got, expected, 1e-4)


def test_precision_is_not_of_the_surroundings(dinov2, drawn):
    encoder = load_encoder(dinov2)
    expected = encoder.embed_images(drawn)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(encoder.embed_images(drawn), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_loading_draws_no_random_numbers(dino, clip):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_encoder(dino)
    load_encoder(clip)
    assert torch.equal(torch.rand(3), expected)


# -- embeddings that are kept ----------------------------------------------------------------------


def test_kept_by_content(dinov2, drawn, tmp_path, monkeypatch):
    encoder = load_encoder(dinov2)
    counted = []
    monkeypatch.setattr(
        encoders,
        "read_image_file",
        lambda picture: counted.append(picture) or read_image_file(picture),
    )
    first = encoder.embed_images(drawn[:3], keep=True)
    assert counted == drawn[:3]
    copy = shutil.copy(drawn[1], tmp_path / "copy.png")
    again = encoder.embed_images([copy, drawn[4], drawn[0]], keep=True)
    assert counted == [*drawn[:3], drawn[4]]  # nothing was read twice
    assert torch.equal(again[[0, 2]], first[[1, 0]])
    shutil.copy(drawn[5], copy)  # another image under the same name
    close(encoder.embed_images([copy], keep=True), load_encoder(dinov2).embed_images([drawn[5]]))
    encoder.embed_images(drawn[:1])
    assert counted[-1] == drawn[0]  # read anew, unless told to keep


# -- images ----------------------------------------------------------------------------------------


def save_odd(folder):
    """One image in many guises; each file and the RGB image that it is."""
    image = rgb(judges.draw(folder / "source", 1, seed=3)[0])
    grey = image.convert("L")
    deep = np.asarray(grey).astype(np.uint16) * 257
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    half = image.copy()
    half.putalpha(128)
    white = Image.new("RGB", image.size, "white")
    palette = image.quantize(16)
    files = {
        "grey.png": (grey, grey),
        "deep.png": (Image.fromarray(deep), grey),
        "half.png": (half, Image.composite(image, white, half.getchannel("A"))),
        "cmyk.tiff": (image.convert("CMYK"), image.convert("CMYK")),
        "palette.png": (palette, palette),
    }
    for name, (picture, _) in files.items():
        picture.save(folder / name)
    turned.save(folder / "turned.png", exif=exif)
    expected = {name: plain.convert("RGB") for name, (_, plain) in files.items()}
    return {**expected, "turned.png": image}


def test_images_of_every_kind(tmp_path, dinov2, clip):
    expected = save_odd(tmp_path)
    assert (
        expected["turned.png"].size
        == ImageOps.exif_transpose(Image.open(tmp_path / "turned.png")).size
    )
    for name, image in expected.items():
        got = np.asarray(read_image_file(tmp_path / name)).astype(int)
        # blending with white rounds in one way or the other
        np.testing.assert_allclose(got, np.asarray(image), atol=1 if name == "half.png" else 0)
        with Image.open(tmp_path / name) as opened:  # an open image is read as its file is
            np.testing.assert_array_equal(np.asarray(read_image_file(opened)), got)
    for folder in (dinov2, clip):
        encoder = load_encoder(folder)
        names = [name for name in expected if name != "half.png"]
        of_files = encoder.embed_images([tmp_path / name for name in names])
        close(of_files, encoder.embed_images([expected[name] for name in names]))


def test_broken_images_are_named(tmp_path, dinov2, drawn):
    encoder = load_encoder(dinov2)
    cut = tmp_path / "cut.png"
    cut.write_bytes(drawn[0].read_bytes()[:-400])
    text = tmp_path / "text.png"
    text.write_text("no picture", encoding="utf-8")
    for keep in (False, True):
        with pytest.raises(DataError, match=r"cut\.png:\n  cannot be decoded: .*truncated"):
            encoder.embed_images([drawn[1], cut], keep=keep)
        with pytest.raises(DataError, match=r"text\.png:\n  cannot be decoded: it is not an image"):
            encoder.embed_images([text], keep=keep)
        with pytest.raises(DataError, match=r"none\.png:\n  cannot be read: No such file"):
            encoder.embed_images([tmp_path / "none.png"], keep=keep)
        with pytest.raises(DataError, match=str(tmp_path)):
            encoder.embed_images([tmp_path], keep=keep)
    with pytest.raises(DataError, match="floating-point"):
        encoder.embed_images([Image.new("F", (8, 8))])


# -- what is refused -------------------------------------------------------------------------------


def test_refused(tmp_path, dinov2, dino):
    with pytest.raises(ValueError, match=r"'.*nowhere' cannot be loaded: there is no such file"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'published' or 'shipped'"):
        load_encoder(dino, preprocessing="other")
    with pytest.raises(ValueError, match="batch_size is 0"):
        load_encoder(dino, batch_size=0)
    with pytest.raises(ValueError, match="no text encoder"):
        load_encoder(dinov2).embed_texts(["a dog"])
    with pytest.raises(ValueError, match="nothing to embed"):
        load_encoder(dinov2).embed_images([])


def test_encoder_that_misses_weights_is_refused(tmp_path, dinov2):
    shutil.copytree(dinov2, tmp_path / "part")
    weights = tmp_path / "part" / "model.safetensors"
    tensors = load_file(weights)
    missing = next(name for name in tensors if "layernorm" in name)
    del tensors[missing]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"is incomplete: it has no weights for {missing}\\. Give"):
        load_encoder(tmp_path / "part")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.json", "this folder has no config.json. Give a transformers folder"),
        ("model.safetensors", "this folder has no weights, model.safetensors or "),
        ("preprocessor_config.json", "has no image processor, preprocessor_config.json or "),
    ],
)
def test_a_folder_that_misses_a_part_is_refused(tmp_path, dinov2, missing, said):
    """By its names, before anything is loaded."""
    folder = shutil.copytree(dinov2, tmp_path / "part")
    assert source_problem(folder) is None
    (folder / missing).unlink()
    assert said in source_problem(folder)
    with pytest.raises(ValueError, match=rf"'{folder}' cannot be loaded: .*{said}"):
        load_encoder(folder)


def test_sources_that_can_and_cannot_be(tmp_path, dinov2):
    assert source_problem("facebook/dinov2-base") is None
    assert source_problem(dinov2.with_name(dinov2.name[:-1])).endswith(f"Did you mean '{dinov2}'?")
    lost = source_problem(tmp_path / "lost")
    assert lost.startswith(f"there is no such file or folder in '{tmp_path}'. Give a transformers")
    (tmp_path / "file.safetensors").touch()
    assert "this is a file. Give a" in source_problem(tmp_path / "file.safetensors")
    assert "nor a Hub id" in source_problem("dino v2")
