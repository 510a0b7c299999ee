"""Names of scores: which way is better, and in which order they are shown."""

import pytest

from gralora_diffusion.benchmark.evaluation.scores import score_named, score_order


@pytest.mark.parametrize(
    ("name", "label", "higher", "kind"),
    [
        ("dinov2", "DINOv2 similarity", True, "similarity"),
        ("dino", "DINO similarity", True, "similarity"),
        ("clip_i", "CLIP-I", True, "similarity"),
        ("clip_t", "CLIP-T", True, "other"),
        ("div_dino", "DIV (DINO)", True, "other"),
        ("drift", "drift", False, "drift"),
        ("drift_clip_i", "drift (CLIP)", False, "drift"),
        ("drift_mine", "drift (mine)", False, "drift"),
        ("pres_dinov2", "PRES (DINOv2)", False, "other"),
        ("prior_dino", "prior drift (DINO)", False, "other"),
        ("divers", "divers", None, "other"),
    ],
)
def test_what_is_known_of_a_score(name, label, higher, kind):
    score = score_named(name)
    assert (score.name, score.label, score.higher_is_better, score.kind) == (
        *(name, label),
        *(higher, kind),
    )


def test_similarity_comes_first_and_the_unknown_last():
    names = ["aa", "prior_dino", "drift_dinov2", "drift_dino", "clip_t", "dino", "dinov2"]
    wanted = ["dinov2", "dino", "clip_t", "drift_dino", "drift_dinov2", "prior_dino", "aa"]
    assert sorted(names, key=score_order) == wanted
