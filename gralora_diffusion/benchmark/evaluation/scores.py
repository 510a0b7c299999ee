"""The names of the scores, and which direction of each is better."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A score as the report shows it.

    Attributes:
        higher_is_better: None if the benchmark does not know; then no method wins or loses.
        kind: "similarity" (to the real images), "drift" (from the base's images), or "other".
    """

    name: str
    label: str
    higher_is_better: bool | None
    kind: str
    meaning: str


_TO_REAL = "similarity to the real images, by"
_KNOWN = (
    # the first of the similarities is the one in the plots of trade-offs
    Score("dinov2", "DINOv2 similarity", True, "similarity", f"{_TO_REAL} DINOv2"),
    Score("dino", "DINO similarity", True, "similarity", f"{_TO_REAL} DINO"),
    Score("clip_i", "CLIP-I", True, "similarity", f"{_TO_REAL} CLIP's image encoder"),
    Score("clip_t", "CLIP-T", True, "other", "similarity to the prompt, by CLIP"),
    Score("div", "DIV", True, "other", "how much images of one prompt differ from each other"),
    Score(
        "drift",
        "drift",
        False,
        "drift",
        "1 - similarity between images with and without the adapter, on other prompts",
    ),
    Score(
        "peft_drift",
        "PEFT's drift",
        False,
        "other",
        "half of the drift, as PEFT's comparison states it",
    ),
    Score("pres", "PRES", False, "other", "how similar images of the class are to the subject"),
    Score("prior", "prior drift", False, "other", "how far images of the class have moved"),
)

#: The encoders behind a score.
_ENCODERS = {"dinov2": "DINOv2", "dino": "DINO", "clip_i": "CLIP"}


def score_named(name: str) -> Score:
    """Return a score by its name; ``drift_dinov2`` is a ``drift``. Others have no direction."""
    for score in _KNOWN:
        if name == score.name:
            return score
        if name.startswith(f"{score.name}_"):
            encoder = name.removeprefix(f"{score.name}_")
            label = f"{score.label} ({_ENCODERS.get(encoder, encoder)})"
            return Score(name, label, score.higher_is_better, score.kind, score.meaning)
    return Score(name, name, None, "other", "")


def is_known(name: str) -> bool:
    """Return whether the direction of a score is known."""
    return score_order(name)[0] < len(_KNOWN)


def score_order(name: str) -> tuple[int, str]:
    """Return a key that sorts scores in the usual order; unknown ones come last."""
    for place, score in enumerate(_KNOWN):
        if name == score.name or name.startswith(f"{score.name}_"):
            return place, name
    return len(_KNOWN), name
