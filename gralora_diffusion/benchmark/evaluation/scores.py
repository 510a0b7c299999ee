"""What the scores are called, and which way each is better."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A score as a reader meets it.

    Attributes:
        higher_is_better: None where the benchmark does not know: then nothing wins or loses.
        kind: "similarity" (to the real pictures), "drift" (from what the base draws), or "other".
    """

    name: str
    label: str
    higher_is_better: bool | None
    kind: str
    meaning: str


_KNOWN = (
    # the one that stands for similarity in plots comes first
    Score("dinov2", "DINOv2 similarity", True, "similarity", "to the real pictures, DINOv2"),
    Score("dino", "DINO similarity", True, "similarity", "to the real pictures, DINO"),
    Score("clip_i", "CLIP-I", True, "similarity", "to the real pictures, CLIP's image encoder"),
    Score("clip_t", "CLIP-T", True, "other", "of the pictures to their prompts, CLIP"),
    Score("div", "DIV", True, "other", "how much pictures of one prompt differ from each other"),
    Score(
        "drift", "drift", False, "drift", "1 - similarity with and without adapter, other prompts"
    ),
    Score("pres", "PRES", False, "other", "how much class pictures look like the subject"),
    Score("prior", "prior drift", False, "other", "how far pictures of the class have moved"),
)

#: By whose eyes a score was seen.
_EYES = {"dinov2": "DINOv2", "dino": "DINO", "clip_i": "CLIP"}


def score_named(name: str) -> Score:
    """Return what is known of a score; ``drift_dinov2`` is a ``drift``, of others nothing is."""
    for score in _KNOWN:
        if name == score.name:
            return score
        if name.startswith(f"{score.name}_"):
            eyes = name.removeprefix(f"{score.name}_")
            label = f"{score.label} ({_EYES.get(eyes, eyes)})"
            return Score(name, label, score.higher_is_better, score.kind, score.meaning)
    return Score(name, name, None, "other", "")


def score_order(name: str) -> tuple[int, str]:
    """A key that sorts scores as the reader expects them; unknown ones come last."""
    for place, score in enumerate(_KNOWN):
        if name == score.name or name.startswith(f"{score.name}_"):
            return place, name
    return len(_KNOWN), name
