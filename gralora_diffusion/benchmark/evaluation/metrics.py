"""The benchmark's scores: functions of embeddings, and of images through encoders.

Encoders have names: "dinov2", "dino", "clip". The similarity by an encoder has the encoder's name,
but "clip", which also reads text, gives "clip_i" and "clip_t". Other scores have the encoder as a
suffix: "drift_dinov2", "div_dino", "pres_clip_i".

A similarity is the cosine of two embeddings, from -1 to 1, and scores are means of similarities.
Nothing is clipped or multiplied by 2.5 or 100, unlike in CLIPScore.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .encoders import Encoder, ShownImage

Encoders = Mapping[str, Encoder]


# -- of embeddings ---------------------------------------------------------------------------------


def normalize(embeddings: Tensor) -> Tensor:
    """Return embeddings (n, width) at length 1, fp64.

    Raises:
        ValueError: there are none, or one is zero or not finite and so has no direction.
    """
    if embeddings.ndim != 2 or not len(embeddings):
        raise ValueError(
            f"embeddings have shape {tuple(embeddings.shape)}; it must be (n, width) with n >= 1"
        )
    embeddings = embeddings.double()
    lengths = embeddings.norm(dim=1, keepdim=True)
    if not bool((lengths.isfinite() & (lengths > 0)).all()):
        raise ValueError("an embedding is zero or not finite: the encoder does not work")
    return embeddings / lengths


def pairwise_similarity(a: Tensor, b: Tensor) -> float:
    """Return the mean similarity over all pairs of a row of ``a`` (n, width) and one of ``b``.

    For generated and real images, this is the subject fidelity of the DreamBooth paper, "the
    average pairwise cosine similarity" (section 4.1).
    """
    # the mean of all products is the product of the means
    return float(normalize(a).mean(dim=0) @ normalize(b).mean(dim=0))


def paired_similarity(a: Tensor, b: Tensor) -> float:
    """Return the mean similarity of each row of ``a`` (n, width) and the same row of ``b``.

    For images and prompts, this is prompt fidelity, CLIP-T (DreamBooth, section 4.1). For generated
    and real images with the same caption, it is the similarity of PEFT's comparison. For images
    with and without the adapter, 1 minus it is the drift of PEFT's comparison (``measure_drift`` in
    ``method_comparison/image-gen``).

    Raises:
        ValueError: as ``normalize``, or the numbers of rows differ.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} embeddings cannot be paired with {len(b)}")
    return float((normalize(a) * normalize(b)).sum(dim=1).mean())


def diversity(embeddings: Tensor) -> float:
    """Return the mean of 1 - similarity over all pairs of two different rows of (n, width).

    It corresponds to DIV in the DreamBooth paper (section 4.1), which measures the distance between
    two images of one prompt by LPIPS. The values here are distances in the encoder's space, and not
    comparable with the paper's.

    Raises:
        ValueError: as ``normalize``, or there are fewer than two rows.
    """
    count = len(embeddings)
    if count < 2:
        raise ValueError(f"diversity needs at least two images of a prompt, but got {count}")
    total = normalize(embeddings).sum(dim=0)
    return 1 - float((total @ total - count) / (count * (count - 1)))


# -- of images -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Scores by name, over all images and for each prompt's images alone."""

    overall: dict[str, float]
    by_prompt: list[dict[str, float]]


def score_subject(
    encoders: Encoders,
    generated: Sequence[Sequence[ShownImage]],
    prompts: Sequence[str],
    real: Sequence[ShownImage],
    *,
    with_diversity: bool = False,
) -> Scores:
    """Score images of a subject by their similarity to the subject and to their prompts.

    Args:
        generated: the images of each prompt.
        prompts: texts for CLIP, without the unique token (``dreambooth.Subject.prompts``).
        real: the subject's images; their embeddings are kept.
        with_diversity: add ``div_*``, 1 - similarity among the images of one prompt; the overall
            score is the mean over prompts.

    Raises:
        DataError: an image cannot be read; the message begins with its name.
        ValueError: the numbers of images and prompts do not match.
    """
    _check_groups(generated, {"prompts": len(prompts)})
    scores = _Table(generated)
    for name, encoder in encoders.items():
        drawn = encoder.embed_images(scores.flat)
        known = encoder.embed_images(real, keep=True)
        for place, rows in scores.groups(drawn):
            scores.put(place, _seen_by(name, encoder), pairwise_similarity(rows, known))
        _score_text(scores, name, encoder, drawn, prompts)
        if with_diversity:
            key = f"div_{_seen_by(name, encoder)}"
            divs = [diversity(rows) for place, rows in scores.groups(drawn) if place is not None]
            for number, value in enumerate(divs):
                scores.put(number, key, value)
            scores.put(None, key, sum(divs) / len(divs))
    return scores.done()


def score_captioned(
    encoders: Encoders,
    generated: Sequence[Sequence[ShownImage]],
    captions: Sequence[str],
    real: Sequence[ShownImage],
) -> Scores:
    """Score images generated for held-out captions by their similarity to the captions' images.

    Args:
        generated: the images of each caption.
        captions: texts for CLIP-T.
        real: the image of each caption; their embeddings are kept.

    Raises:
        DataError, ValueError: as ``score_subject``.
    """
    _check_groups(generated, {"captions": len(captions), "real images": len(real)})
    scores = _Table(generated)
    for name, encoder in encoders.items():
        drawn = encoder.embed_images(scores.flat)
        known = scores.repeated(encoder.embed_images(real, keep=True))
        scores.put_paired(_seen_by(name, encoder), drawn, known)
        _score_text(scores, name, encoder, drawn, captions)
    return scores.done()


def score_drift(
    encoders: Encoders,
    adapted: Sequence[Sequence[ShownImage]],
    base: Sequence[Sequence[ShownImage]],
    *,
    with_half: bool = False,
) -> Scores:
    """Score how much an adapter changes unrelated images: 1 - similarity, ``drift_*``.

    Args:
        adapted: the images of each prompt, generated with the adapter. The prompts are unrelated to
            the training.
        base: the same without the adapter, from the same noise; their embeddings are kept.
        with_half: add ``peft_drift_*``, (1 - similarity) / 2 as in PEFT's comparison.

    Raises:
        DataError, ValueError: as ``score_subject``.
    """
    _check_groups(adapted, {"prompts of the base": len(base)})
    if [len(group) for group in adapted] != [len(group) for group in base]:
        raise ValueError("the numbers of images per prompt differ with and without the adapter")
    scores = _Table(adapted)
    unmoved = [image for group in base for image in group]
    for name, encoder in encoders.items():
        drawn, before = encoder.embed_images(scores.flat), encoder.embed_images(unmoved, keep=True)
        seen = _seen_by(name, encoder)
        scores.put_paired(f"drift_{seen}", drawn, before, distance=True)
        if with_half:
            scores.put_paired(f"peft_drift_{seen}", drawn, before, distance=True, scale=0.5)
    return scores.done()


def score_prior(
    encoders: Encoders,
    adapted: Sequence[ShownImage],
    base: Sequence[ShownImage],
    real: Sequence[ShownImage],
) -> dict[str, float]:
    """Score how an adapter changed the subject's class.

    ``pres_*`` is the mean similarity over all pairs of class images and real images of the subject,
    PRES in the DreamBooth paper (in its ablation of prior preservation, with DINO). The higher it
    is, the more the class has turned into the subject. ``prior_*`` is 1 - similarity of each class
    image and the one that the base generates from the same noise, the language drift.

    Args:
        adapted: images of the class ("a dog") generated with the adapter.
        base: the same without the adapter, from the same noise; their embeddings are kept.
        real: the subject's images; their embeddings are kept.

    Raises:
        DataError: an image cannot be read; the message begins with its name.
        ValueError: the numbers of images with and without the adapter differ, or are zero.
    """
    scores = {}
    for name, encoder in encoders.items():
        seen = _seen_by(name, encoder)
        drawn = encoder.embed_images(adapted)
        before = encoder.embed_images(base, keep=True)
        known = encoder.embed_images(real, keep=True)
        scores[f"pres_{seen}"] = pairwise_similarity(drawn, known)
        scores[f"prior_{seen}"] = 1 - paired_similarity(drawn, before)
    return scores


class _Table:
    """Images in groups, one for each prompt, and the scores of all images and of each group."""

    def __init__(self, generated: Sequence[Sequence[ShownImage]]) -> None:
        self.flat = [image for group in generated for image in group]
        self._sizes = [len(group) for group in generated]
        self._overall: dict[str, float] = {}
        self._by_prompt: list[dict[str, float]] = [{} for _ in generated]

    def groups(self, rows: Tensor) -> Iterator[tuple[int | None, Tensor]]:
        """Yield all rows with None, and those of each prompt with its number."""
        yield None, rows
        yield from enumerate(rows.split(self._sizes))

    def repeated(self, rows: Tensor) -> Tensor:
        """Repeat each prompt's row for all of its images."""
        return rows.repeat_interleave(torch.tensor(self._sizes), dim=0)

    def put(self, place: int | None, name: str, value: float) -> None:
        scores = self._overall if place is None else self._by_prompt[place]
        scores[name] = value

    def put_paired(
        self, name: str, a: Tensor, b: Tensor, distance: bool = False, scale: float = 1.0
    ) -> None:
        for (place, left), (_, right) in zip(self.groups(a), self.groups(b), strict=True):
            similarity = paired_similarity(left, right)
            self.put(place, name, scale * (1 - similarity if distance else similarity))

    def done(self) -> Scores:
        return Scores(self._overall, self._by_prompt)


def _score_text(
    scores: _Table, name: str, encoder: Encoder, drawn: Tensor, texts: Sequence[str]
) -> None:
    if encoder.reads_text:
        scores.put_paired(f"{name}_t", drawn, scores.repeated(encoder.embed_texts(texts)))


def _seen_by(name: str, encoder: Encoder) -> str:
    """Return the name that stands for an encoder's view of images in the names of scores."""
    return f"{name}_i" if encoder.reads_text else name


def _check_groups(groups: Sequence[Sequence[ShownImage]], others: Mapping[str, int]) -> None:
    for what, count in others.items():
        if count != len(groups):
            raise ValueError(f"there are images of {len(groups)} prompts, but {count} {what}")
    if not groups or not all(groups):
        raise ValueError("there are no images, or a prompt has none")
