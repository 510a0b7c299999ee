"""Caches against encoding again, with a real VAE; damaged files; two writers; interruption."""

from __future__ import annotations

import logging
import multiprocessing
import time
from operator import itemgetter

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from gralora_diffusion.base_models.loading import existing_models
from gralora_diffusion.families import get_family
from gralora_diffusion.io.errors import DataError
from gralora_diffusion.training.data import cache
from gralora_diffusion.training.data.cache import (
    LatentCache,
    PromptCache,
    prompt_fingerprint,
    vae_fingerprint,
)
from gralora_diffusion.training.data.image_folder import find_examples
from gralora_diffusion.training.data.transforms import CropPlan, Variant
from tests.models import PIPELINES

PLAN = CropPlan(16, random_flip=True)


def tiny_vae(seed=0):
    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    ).requires_grad_(True)


class Encoder:
    """The VAE as the cache takes it; remembers the sizes of its batches."""

    def __init__(self, vae):
        self.vae = vae
        self.batches = []

    def __call__(self, pixel_values):
        self.batches.append(len(pixel_values))
        posterior = self.vae.encode(pixel_values.to(self.vae.dtype)).latent_dist
        return posterior.mean * 0.5, posterior.std * 0.5


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture
def examples(tmp_path):
    """Three images of unlike shapes and their captions: landscape, square, portrait."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, (height, width) in {"a": (20, 33), "b": (24, 24), "c": (40, 18)}.items():
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name, encoding="utf-8")
    return find_examples(folder)


def wanted(examples, count=5):
    return [(e, PLAN.kept(e.size, e.content_key, count, seed=0)) for e in examples]


def everything(cache, examples):
    return {
        (example.caption, variant): itemgetter("mean", "std")(cache.get(example.cache_key, variant))
        for example, variants in wanted(examples)
        for variant in variants
    }


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], **tolerance)


def anew(vae, examples):
    """Every variant encoded by itself."""
    result = {}
    for example, variants in wanted(examples):
        image = Image.open(example.source)
        for variant in variants:
            with torch.no_grad():
                mean, std = Encoder(vae)(PLAN.pixel_values(image, variant)[None])
            result[example.caption, variant] = (mean[0], std[0])
    return result


@pytest.mark.parametrize("on_disk", [False, True])
def test_cache_holds_what_encoding_anew_gives(vae, examples, tmp_path, on_disk):
    cache = LatentCache(PLAN, "vae", tmp_path / "deep" / "cache" if on_disk else None)
    encoder = Encoder(vae)
    assert cache.fill(wanted(examples), encoder, batch_size=2, progress=False) == 5 + 2 + 5
    assert encoder.batches == [2, 2, 1, 2, 2, 2, 1]
    assert_same(everything(cache, examples), anew(vae, examples))
    assert not any(t.requires_grad for pair in everything(cache, examples).values() for t in pair)
    assert cache.fill(wanted(examples), encoder, progress=False) == 0
    assert len(encoder.batches) == 7
    assert len({t.shape for t, _ in everything(cache, examples).values()}) == 1


def test_latents_keep_the_encoders_dtype(vae, examples, tmp_path):
    encoder = Encoder(tiny_vae().to(torch.bfloat16))
    for folder in (None, tmp_path / "cache"):
        cache = LatentCache(PLAN, "bf16", folder)
        cache.fill(wanted(examples), encoder, progress=False)
        dtypes = {t.dtype for pair in everything(cache, examples).values() for t in pair}
        assert dtypes == {torch.bfloat16}


def test_same_image_twice_is_encoded_once(vae, examples):
    cache = LatentCache(PLAN, "vae")
    assert cache.fill(wanted(examples * 2), Encoder(vae), progress=False) == 12


def test_what_was_never_filled_is_not_found(examples, tmp_path):
    with pytest.raises(KeyError):
        LatentCache(PLAN, "vae").get(examples[0].content_key, Variant(0, 0, 16, 16, False))
    with pytest.raises(DataError, match="Start again"):
        LatentCache(PLAN, "vae", tmp_path).get(
            examples[0].content_key, Variant(0, 0, 16, 16, False)
        )


def test_key_depends_on_all_that_the_latents_depend_on():
    keys = [
        LatentCache(plan, fingerprint).key(content, variant)
        for plan in (PLAN, CropPlan(16, interpolation="box"))
        for fingerprint in ("vae", "other vae")
        for content in ("picture", "other picture")
        for place in ((0, 0), (1, 0), (0, 1))
        for size in ((16, 16), (24, 16), (16, 24))
        for variant in (Variant(*place, *size, False), Variant(*place, *size, True))
    ]
    assert len(set(keys)) == len(keys) == 2 * 2 * 2 * 3 * 3 * 2


def test_latents_of_another_decoder_or_encoding_are_not_found(monkeypatch):
    variant = Variant(0, 0, 16, 16, False)
    keys = {LatentCache(PLAN, "vae").key("picture", variant)}
    for name in ("DECODER_VERSION", "_ENCODING_VERSION"):
        monkeypatch.setattr(cache, name, getattr(cache, name) + 1)
        keys.add(LatentCache(PLAN, "vae").key("picture", variant))
    assert len(keys) == 3


def test_fingerprint_follows_parameters_dtype_and_config_but_not_the_place(tmp_path):
    vae = tiny_vae()
    fingerprint = vae_fingerprint(vae)
    vae.save_pretrained(tmp_path)
    assert vae_fingerprint(AutoencoderKL.from_pretrained(tmp_path)) == fingerprint
    assert vae_fingerprint(tiny_vae(seed=1)) != fingerprint
    assert vae_fingerprint(tiny_vae().to(torch.bfloat16)) != fingerprint
    vae.register_to_config(scaling_factor=0.3)
    assert vae_fingerprint(vae) != fingerprint


def test_interrupted_filling_goes_on_to_the_very_same_latents(vae, examples, tmp_path):
    whole = LatentCache(PLAN, "vae", tmp_path / "whole")
    whole.fill(wanted(examples), Encoder(vae), batch_size=4, progress=False)
    part = LatentCache(PLAN, "vae", tmp_path / "part")

    calls = []

    def stops(pixel_values):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return Encoder(vae)(pixel_values)

    with pytest.raises(KeyboardInterrupt):
        part.fill(wanted(examples), stops, batch_size=4, progress=False)
    # as a kill between two files of one batch would leave it
    example, variants = wanted(examples)[0]
    key = part.key(example.content_key, variants[2])
    (tmp_path / "part" / f"{key}.safetensors").unlink()
    assert part.fill(wanted(examples), Encoder(vae), batch_size=4, progress=False) == 1 + 2 + 5
    assert_same(everything(part, examples), everything(whole, examples), rtol=0, atol=0)


def test_damaged_files_are_encoded_again_with_a_warning(vae, examples, tmp_path, caplog):
    folder = tmp_path / "cache"
    cache = LatentCache(PLAN, "vae", folder)
    cache.fill(wanted(examples), Encoder(vae), progress=False)
    before = everything(cache, examples)
    cut, empty, junk, *_ = sorted(folder.iterdir())
    cut.write_bytes(cut.read_bytes()[:-8])
    empty.write_bytes(b"")
    junk.write_bytes(b"x" * 500)
    with caplog.at_level(logging.WARNING):
        assert cache.fill(wanted(examples), Encoder(vae), progress=False) == 3
    assert "3 damaged files, which are encoded again" in caplog.text
    assert_same(everything(cache, examples), before, rtol=0, atol=0)
    cut.write_bytes(b"")
    with pytest.raises(DataError, match="Start again"):
        everything(cache, examples)


@pytest.mark.parametrize(("old", "new"), [(b'"mean"', b'"mfan"'), (b'"F32"', b'"F4"}')])
def test_a_damaged_header_is_refused_or_encoded_again(vae, examples, tmp_path, old, new):
    cache = LatentCache(PLAN, "vae", tmp_path)
    cache.fill(wanted(examples), Encoder(vae), progress=False)
    before = everything(cache, examples)
    file = min(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes().replace(old, new, 1))
    if b"mfan" in new:  # a header that safetensors reads
        with pytest.raises(DataError, match=r"not what was written\. Start again"):
            everything(cache, examples)
        assert not file.exists()
    assert cache.fill(wanted(examples), Encoder(vae), progress=False) == 1
    assert_same(everything(cache, examples), before, rtol=0, atol=0)


def test_changed_content_is_never_trained_on(vae, examples, tmp_path):
    cache = LatentCache(PLAN, "vae", tmp_path)
    cache.fill(wanted(examples), Encoder(vae), progress=False)
    before = everything(cache, examples)
    file = max(tmp_path.glob("*.safetensors"))
    whole = bytearray(file.read_bytes())
    whole[-5] ^= 1  # one bit of one number
    file.write_bytes(whole)
    assert cache.fill(wanted(examples), Encoder(vae), progress=False) == 0  # headers only
    with pytest.raises(DataError, match=r"not what was written\. Start again"):
        everything(cache, examples)
    assert cache.fill(wanted(examples), Encoder(vae), progress=False) == 1
    assert_same(everything(cache, examples), before, rtol=0, atol=0)


def test_latents_that_are_no_numbers_are_refused(examples):
    def broken(pixel_values):
        mean = torch.full((len(pixel_values), 4, 8, 8), float("nan"))
        return mean, torch.ones_like(mean)

    with pytest.raises(DataError, match=r"(?s)a\.png.*NaN or infinity.*--mixed_precision"):
        LatentCache(PLAN, "vae").fill(wanted(examples), broken, progress=False)


def test_a_folder_that_cannot_be_written_is_named(vae, examples, tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    cache = LatentCache(PLAN, "vae", tmp_path / "file" / "cache")
    with pytest.raises(DataError, match=r"(?s)--latent_cache_dir .*cannot be written"):
        cache.fill(wanted(examples), Encoder(vae), progress=False)


def write_over_and_over(example, folder, started):
    """Encode into ``folder`` and empty it again, until killed."""
    torch.set_num_threads(1)

    def encode(pixel_values):
        mean = torch.ones(len(pixel_values), 4, 256, 256)
        return mean, mean

    variants = PLAN.kept(example.size, example.content_key, 3, seed=0)
    while True:
        LatentCache(PLAN, "vae", folder).fill([(example, variants)], encode, progress=False)
        started.set()
        for file in folder.glob("*.safetensors"):
            file.unlink(missing_ok=True)


def test_killed_and_concurrent_writers_leave_only_whole_files(examples, tmp_path):
    # not forked from this process, whose threads and locks would not live there
    server = multiprocessing.get_context("forkserver")
    folder = tmp_path / "cache"
    for delay in (0.05, 0.13):
        started = [server.Event() for _ in range(2)]
        writers = [
            server.Process(
                target=write_over_and_over, args=(examples[0], folder, event), daemon=True
            )
            for event in started
        ]
        try:
            for writer in writers:
                writer.start()
            assert all(event.wait(120) for event in started)
            time.sleep(delay)
            assert all(writer.is_alive() for writer in writers), "a writer failed"
        finally:
            for writer in writers:
                writer.kill()
                writer.join()
        for file in folder.glob("*.safetensors"):
            assert torch.equal(load_file(file)["mean"], torch.ones(4, 256, 256))


# -- prompts ---------------------------------------------------------------------------------------


class TextEncoder:
    """Tells prompts apart by their letters; remembers its batches."""

    def __init__(self):
        self.embedding = torch.nn.Embedding(256, 6).to(torch.bfloat16)
        self.batches = []

    def __call__(self, prompts):
        self.batches.append(list(prompts))
        letters = [list(prompt.encode().ljust(8))[:8] for prompt in prompts]
        embeds = self.embedding(torch.tensor(letters))
        return {"prompt_embeds": embeds, "pooled": embeds.mean(1)}


def test_prompts_are_encoded_once_and_found_by_text():
    torch.manual_seed(0)
    encoder, cache = TextEncoder(), PromptCache()
    assert cache.fill(["b", "a", "b", "", "c"], encoder, batch_size=3) == 4
    assert encoder.batches == [["b", "a", ""], ["c"]]
    assert cache.fill(["c", "d"], encoder) == 1
    got = cache.batch(["a", "", "a", "d"])
    expected = encoder(["a", "", "a", "d"])
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.dtype == torch.bfloat16
        assert not tensor.requires_grad
        assert torch.equal(tensor, expected[name])
    with pytest.raises(KeyError, match="never seen"):
        cache.batch(["never seen"])


def test_prompts_in_a_folder_are_encoded_once_and_alone(tmp_path, caplog):
    """Alone, so that what a file holds does not depend on which others lacked."""
    torch.manual_seed(0)
    encoder = TextEncoder()
    first = PromptCache("clip", tmp_path / "deep" / "cache")
    assert first.fill(["b", "a", "b", ""], encoder) == 3
    assert encoder.batches == [["b"], ["a"], [""]]
    again = PromptCache("clip", tmp_path / "deep" / "cache")
    assert again.fill(["a", "c", "b", ""], encoder) == 1
    got = again.batch(["a", "", "c"])
    for name, tensor in encoder(["a", "", "c"]).items():
        assert got[name].dtype == torch.bfloat16
        assert torch.equal(got[name], tensor)
    assert PromptCache("another clip", tmp_path / "deep" / "cache").fill(["a"], encoder) == 1
    file = tmp_path / "deep" / "cache" / f"{again.key('a')}.safetensors"
    file.write_bytes(b"x" * 9)
    assert again.fill(["a", "b"], encoder) == 1
    assert "1 damaged files, which are encoded again" in caplog.text
    file.write_bytes(b"x" * 9)
    with pytest.raises(DataError, match="Start again"):
        again.batch(["a"])
    assert again.fill(["a", "b"], encoder) == 1
    assert torch.equal(again.batch(["a"])["pooled"], encoder(["a"])["pooled"])


def test_keys_of_prompts_and_fingerprints():
    keys = {PromptCache(f).key(prompt) for f in ("a", "b") for prompt in ("", "a", "b", "prompt")}
    assert len(keys) == 8


def fingerprint(pipe, length=None):
    family = get_family(pipe)
    encoders = existing_models(pipe, family.all_text_encoders)
    return prompt_fingerprint(lambda p: family.encode_prompts(pipe, p, length), encoders)


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_fingerprint_of_text_encoders_follows_all_that_they_make(name):
    pipe = PIPELINES[name]()
    family, found = get_family(pipe), {fingerprint(pipe)}
    assert fingerprint(PIPELINES[name]()) in found
    for encoder_name in family.all_text_encoders:
        other = PIPELINES[name]()
        encoder = getattr(other, encoder_name)
        with torch.no_grad():  # a token that no prompt here has
            encoder.get_input_embeddings().weight[-5, 0] += 1
        found.add(fingerprint(other))
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.mul_(1.01)
        found.add(fingerprint(other))
    found.add(fingerprint(PIPELINES[name]().to(torch.bfloat16)))
    expected = 2 + 2 * len(family.all_text_encoders)
    if family.max_sequence_length:
        found.add(fingerprint(pipe, 24))
        expected += 1
    if "force_zeros_for_empty_prompt" in pipe.config:
        pipe.register_to_config(force_zeros_for_empty_prompt=False)
        found.add(fingerprint(pipe))
        expected += 1
    assert len(found) == expected
