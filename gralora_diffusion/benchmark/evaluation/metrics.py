"""The benchmark's scores: functions of embeddings, and of images through encoders.

Encoders have names: "dinov2", "dino", "clip". The similarity that one sees goes by its name, but
those of an encoder that also reads text, "clip", are "clip_i" and "clip_t". Other scores say by
whose eyes: "drift_dinov2", "div_dino", "pres_clip_i".

A similarity is the cosine of two embeddings, from -1 to 1, and scores are means of it: nothing is
clipped or multiplied by 2.5 or 100, as in CLIPScore.
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
        ValueError: there are none; one is zero or not finite, so that it has no direction.
    """
    if embeddings.ndim != 2 or not len(embeddings):
        raise ValueError(
            f"embeddings have shape {tuple(embeddings.shape)}; it must be (n, width), n at least 1"
        )
    embeddings = embeddings.double()
    lengths = embeddings.norm(dim=1, keepdim=True)
    if not bool((lengths.isfinite() & (lengths > 0)).all()):
        raise ValueError("an embedding is zero or not finite: the encoder does not work")
    return embeddings / lengths


def pairwise_similarity(a: Tensor, b: Tensor) -> float:
    """Return the mean similarity over all pairs of a row of ``a`` (n, width) and one of ``b``.

    Of generated and real images that is the subject fidelity of the DreamBooth paper, "the
    average pairwise cosine similarity" (section 4.1).
    """
    # the mean of all products is the product of the means
    return float(normalize(a).mean(dim=0) @ normalize(b).mean(dim=0))


def paired_similarity(a: Tensor, b: Tensor) -> float:
    """Return the mean similarity of each row of ``a`` (n, width) and the same row of ``b``.

    Of images and prompts that is prompt fidelity, CLIP-T (DreamBooth, section 4.1); of images
    and those with their captions, the similarity of PEFT's comparison; 1 minus it, of images with
    and without the adapter, is its drift (``measure_drift`` in ``method_comparison/image-gen``).

    Raises:
        ValueError: as ``trial``; unequal numbers of rows.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} embeddings cannot be paired with {len(b)}")
    return float((normalize(a) * normalize(b)).sum(dim=1).mean())


def diversity(embeddings: Tensor) -> float:
    """Return the mean of 1 - similarity over all pairs of two different rows of (n, width).

    The place of DIV in the DreamBooth paper (section 4.1), which takes LPIPS for the distance of
    two images of one prompt: these numbers are of the encoder's space, and not comparable.

    Raises:
        ValueError: as ``trial``; fewer than two rows.
    """
    count = len(embeddings)
    if count < 2:
        raise ValueError("diversity is one of at least two images of a prompt")
    total = normalize(embeddings).sum(dim=0)
    return 1 - float((total @ total - count) / (count * (count - 1)))


# -- of images -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Scores by name: over all images, and of each prompt's images alone."""

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
    """Score images of a subject: how like it they are, and how like their prompts.

    Args:
        generated: the images of each prompt.
        prompts: what CLIP reads, without the unique token (``dreambooth.Subject.prompts``).
        real: the subject's images; their embeddings are kept.
        with_diversity: also 1 - similarity among the images of one prompt, ``div_*``; over all,
            the mean of the prompts'.

    Raises:
        DataError: an image cannot be read; its name comes first.
        ValueError: numbers of images and prompts that do not go together.
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
    """Score images drawn for held-out captions: how like the image that has the caption.

    Args:
        generated: the images of each caption.
        captions: what CLIP reads for CLIP-T.
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
) -> Scores:
    """Score how far an adapter moves images it should leave alone: 1 - similarity, ``drift_*``.

    Args:
        adapted: the images of each prompt, which has nothing to do with what was learned, drawn
            with the adapter.
        base: the same without it, from the same noise; their embeddings are kept.

    Raises:
        DataError, ValueError: as ``score_subject``.
    """
    _check_groups(adapted, {"prompts of the base": len(base)})
    if [len(group) for group in adapted] != [len(group) for group in base]:
        raise ValueError("with and without the adapter, prompts have unequal numbers of images")
    scores = _Table(adapted)
    unmoved = [image for group in base for image in group]
    for name, encoder in encoders.items():
        drawn, before = encoder.embed_images(scores.flat), encoder.embed_images(unmoved, keep=True)
        scores.put_paired(f"drift_{_seen_by(name, encoder)}", drawn, before, distance=True)
    return scores.done()


def score_prior(
    encoders: Encoders,
    adapted: Sequence[ShownImage],
    base: Sequence[ShownImage],
    real: Sequence[ShownImage],
) -> dict[str, float]:
    """Score what an adapter did to the subject's class.

    ``pres_*``: the mean similarity over all pairs of class images and real images of the
    subject, PRES in the DreamBooth paper (its ablation of prior preservation, with DINO): the more,
    the more has the class become the subject. ``prior_*``: 1 - similarity of each class image and
    the one that the base draws from the same noise, the language drift.

    Args:
        adapted: images of the class ("a dog") drawn with the adapter.
        base: the same without it, from the same noise; their embeddings are kept.
        real: the subject's images; their embeddings are kept.

    Raises:
        DataError: an image cannot be read; its name comes first.
        ValueError: unequal numbers of images with and without the adapter, or none.
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
    """Images in groups, one for each prompt, and the scores of all of them and of each group."""

    def __init__(self, generated: Sequence[Sequence[ShownImage]]) -> None:
        self.flat = [image for group in generated for image in group]
        self._sizes = [len(group) for group in generated]
        self._overall: dict[str, float] = {}
        self._by_prompt: list[dict[str, float]] = [{} for _ in generated]

    def groups(self, rows: Tensor) -> Iterator[tuple[int | None, Tensor]]:
        """All rows, under None, and those of each prompt, under its number."""
        yield None, rows
        yield from enumerate(rows.split(self._sizes))

    def repeated(self, rows: Tensor) -> Tensor:
        """A row for each prompt as one for each image."""
        return rows.repeat_interleave(torch.tensor(self._sizes), dim=0)

    def put(self, place: int | None, name: str, value: float) -> None:
        scores = self._overall if place is None else self._by_prompt[place]
        scores[name] = value

    def put_paired(self, name: str, a: Tensor, b: Tensor, distance: bool = False) -> None:
        for (place, left), (_, right) in zip(self.groups(a), self.groups(b), strict=True):
            similarity = paired_similarity(left, right)
            self.put(place, name, 1 - similarity if distance else similarity)

    def done(self) -> Scores:
        return Scores(self._overall, self._by_prompt)


def _score_text(
    scores: _Table, name: str, encoder: Encoder, drawn: Tensor, texts: Sequence[str]
) -> None:
    if encoder.reads_text:
        scores.put_paired(f"{name}_t", drawn, scores.repeated(encoder.embed_texts(texts)))


def _seen_by(name: str, encoder: Encoder) -> str:
    """What images seen by an encoder are called in the names of scores."""
    return f"{name}_i" if encoder.reads_text else name


def _check_groups(groups: Sequence[Sequence[ShownImage]], others: Mapping[str, int]) -> None:
    for what, count in others.items():
        if count != len(groups):
            raise ValueError(f"there are images of {len(groups)} prompts, but {count} {what}")
    if not groups or not all(groups):
        raise ValueError("there are no images, or a prompt has none")
