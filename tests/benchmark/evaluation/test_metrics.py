"""Scores against loops over images and pairs that use transformers directly."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from gralora_diffusion.benchmark.evaluation import metrics
from gralora_diffusion.benchmark.evaluation.encoders import load_encoder
from gralora_diffusion.benchmark.evaluation.metrics import (
    diversity,
    paired_similarity,
    pairwise_similarity,
    score_captioned,
    score_drift,
    score_prior,
    score_subject,
)
from gralora_diffusion.io.errors import DataError
from tests.benchmark import judges


@pytest.fixture(scope="module")
def encoders(dinov2, dino, clip):
    return {
        "dinov2": load_encoder(dinov2, batch_size=4),
        "dino": load_encoder(dino, preprocessing="shipped"),
        "clip": load_encoder(clip, batch_size=1),
    }


@pytest.fixture(scope="module")
def see(dinov2, dino, clip):
    """name -> the embedding of a file, by transformers alone; "text" embeds a text."""

    def image_by(folder):
        processor = AutoImageProcessor.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder).eval()

        @torch.no_grad()
        def embed(path):
            pixels = processor(images=Image.open(path).convert("RGB"), return_tensors="pt")
            if hasattr(model, "get_image_features"):
                return model.get_image_features(**pixels).pooler_output[0]
            return model(**pixels).last_hidden_state[0, 0]

        return embed

    model, tokenizer = AutoModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)

    @torch.no_grad()
    def text(words):
        return model.get_text_features(**tokenizer(words, return_tensors="pt")).pooler_output[0]

    return {"dinov2": image_by(dinov2), "dino": image_by(dino), "clip_i": image_by(clip)}, text


def cosine(a, b):
    return float(cosine_similarity(a.double(), b.double(), dim=0))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def near(value):
    return pytest.approx(value, abs=1e-6)


# -- of embeddings ---------------------------------------------------------------------------------


def test_similarities_of_embeddings():
    a, b = torch.randn(5, 7), 10 * torch.randn(5, 7)
    pairs = [[cosine(x, y) for y in b] for x in a]
    assert pairwise_similarity(a, b[:3]) == near(mean(p for row in pairs for p in row[:3]))
    assert paired_similarity(a, b) == near(mean(pairs[i][i] for i in range(5)))
    distances = [1 - cosine(x, y) for x, y in itertools.combinations(a, 2)]
    assert diversity(a) == near(mean(distances))
    assert paired_similarity(a, 3 * a) == near(1)
    assert diversity(a[:1].repeat(4, 1)) == near(0)
    assert diversity(torch.tensor([[1.0, 0], [-1, 0]])) == near(2)


def test_scores_are_plain_floats():
    a = torch.randn(3, 4)
    values = (pairwise_similarity(a, a), paired_similarity(a, a), diversity(a))
    assert {type(value) for value in values} == {float}


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_embeddings_without_direction_are_refused(bad):
    a = torch.randn(3, 4)
    broken = a.clone()
    broken[1] = bad
    for score in (pairwise_similarity, paired_similarity):
        with pytest.raises(ValueError, match="zero or not finite"):
            score(a, broken)
    with pytest.raises(ValueError, match="zero or not finite"):
        diversity(broken)


def test_numbers_that_do_not_fit_are_refused():
    a = torch.randn(3, 4)
    with pytest.raises(ValueError, match="3 embeddings cannot be paired with 2"):
        paired_similarity(a, a[:2])
    with pytest.raises(ValueError, match="at least two images"):
        diversity(a[:1])
    with pytest.raises(ValueError, match=r"shape \(0, 4\)"):
        pairwise_similarity(a, a[:0])


# -- of images -------------------------------------------------------------------------------------


def test_subject(encoders, see, drawn, real):
    images, text = see
    groups, prompts = [drawn[:3], drawn[3:5], drawn[5:]], ["a wet dog", "a dog", "a red dog"]
    got = score_subject(encoders, groups, prompts, real)
    assert set(got.overall) == {"dinov2", "dino", "clip_i", "clip_t"}
    for name, see_image in images.items():
        pairs = [[cosine(see_image(d), see_image(r)) for r in real] for d in drawn]
        assert got.overall[name] == near(mean(p for row in pairs for p in row))
        for number, (start, end) in enumerate([(0, 3), (3, 5), (5, 6)]):
            expected = mean(p for row in pairs[start:end] for p in row)
            assert got.by_prompt[number][name] == near(expected)
    prompt_of = [0, 0, 0, 1, 1, 2]
    fits = [
        cosine(images["clip_i"](d), text(prompts[n])) for d, n in zip(drawn, prompt_of, strict=True)
    ]
    assert got.overall["clip_t"] == near(mean(fits))
    assert [s["clip_t"] for s in got.by_prompt] == [
        near(mean(fits[:3])),
        near(mean(fits[3:5])),
        near(fits[5]),
    ]
    json.dumps([got.overall, got.by_prompt])
    # images of different kinds are told apart, so the above is not 1 = 1
    assert max(got.overall.values()) < 0.99


def test_subject_with_diversity(encoders, see, drawn, real):
    images, _ = see
    groups = [drawn[:3], drawn[3:]]
    got = score_subject(encoders, groups, ["a dog", "a cat"], real, with_diversity=True)
    for name, see_image in images.items():
        expected = [
            mean(1 - cosine(a, b) for a, b in itertools.combinations(map(see_image, group), 2))
            for group in groups
        ]
        assert [s[f"div_{name}"] for s in got.by_prompt] == [near(value) for value in expected]
        assert got.overall[f"div_{name}"] == near(mean(expected))


def test_captioned(encoders, see, drawn, real):
    images, text = see
    groups, captions = [drawn[:2], drawn[2:3], drawn[3:]], ["a vase", "a can", "a toy"]
    got = score_captioned(encoders, groups, captions, real)
    assert set(got.overall) == {"dinov2", "dino", "clip_i", "clip_t"}
    pairs = list(zip(drawn, [0, 0, 1, 2, 2, 2], strict=True))
    for name, see_image in images.items():
        similar = [cosine(see_image(d), see_image(real[n])) for d, n in pairs]
        assert got.overall[name] == near(mean(similar))
        assert got.by_prompt[2][name] == near(mean(similar[3:]))
    fits = [cosine(images["clip_i"](d), text(captions[n])) for d, n in pairs]
    assert got.overall["clip_t"] == near(mean(fits))


def test_drift(encoders, see, drawn, tmp_path):
    images, _ = see
    base = judges.draw(tmp_path, 6, seed=7)
    got = score_drift(encoders, [drawn[:4], drawn[4:]], [base[:4], base[4:]])
    assert set(got.overall) == {"drift_dinov2", "drift_dino", "drift_clip_i"}
    for name, see_image in images.items():
        moved = [1 - cosine(see_image(a), see_image(b)) for a, b in zip(drawn, base, strict=True)]
        assert got.overall[f"drift_{name}"] == near(mean(moved))
        assert got.by_prompt[1][f"drift_{name}"] == near(mean(moved[4:]))
    still = score_drift(encoders, [drawn], [drawn])
    assert all(value == near(0) for value in still.overall.values())


def test_prior(encoders, see, drawn, real, tmp_path):
    images, _ = see
    base = judges.draw(tmp_path, 6, seed=7)
    got = score_prior(encoders, drawn, base, real)
    assert len(got) == 6
    for name, see_image in images.items():
        seen = [see_image(path) for path in drawn]
        pres = mean(cosine(a, see_image(r)) for a in seen for r in real)
        moved = mean(1 - cosine(a, see_image(b)) for a, b in zip(seen, base, strict=True))
        assert got[f"pres_{name}"] == near(pres)
        assert got[f"prior_{name}"] == near(moved)


def test_real_images_are_embedded_once(dinov2, drawn, real, monkeypatch):
    encoders = {"dinov2": load_encoder(dinov2)}
    read = metrics.Encoder._embed_images
    counts = []
    monkeypatch.setattr(
        metrics.Encoder,
        "_embed_images",
        lambda self, images: counts.append(len(images)) or read(self, images),
    )
    first = score_subject(encoders, [drawn], ["a dog"], real)
    assert counts == [6, 3]
    assert score_subject(encoders, [drawn], ["a dog"], real) == first
    assert counts == [6, 3, 6]


def test_refused(encoders, drawn, real):
    with pytest.raises(ValueError, match="images of 2 prompts, but 1 prompts"):
        score_subject(encoders, [drawn, drawn], ["a dog"], real)
    with pytest.raises(ValueError, match="a prompt has none"):
        score_subject(encoders, [drawn, []], ["a dog", "a cat"], real)
    with pytest.raises(ValueError, match="images of 1 prompts, but 3 real images"):
        score_captioned(encoders, [drawn], ["a dog"], real)
    with pytest.raises(ValueError, match="numbers of images per prompt differ"):
        score_drift(encoders, [drawn[:2], drawn[2:]], [drawn[:3], drawn[3:]])
    with pytest.raises(ValueError, match="6 embeddings cannot be paired with 3"):
        score_prior(encoders, drawn, real, real)
    with pytest.raises(ValueError, match="nothing to embed"):
        score_subject(encoders, [drawn], ["a dog"], [])


def test_broken_images_are_named(encoders, drawn, real, tmp_path):
    broken = tmp_path / "broken.png"
    shutil.copy(drawn[0], broken)
    broken.write_bytes(broken.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"broken\.png"):
        score_subject(encoders, [[*drawn, broken]], ["a dog"], real)
    with pytest.raises(DataError, match=r"broken\.png"):
        score_subject(encoders, [drawn], ["a dog"], [*real, broken])
