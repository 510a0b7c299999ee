"""``clip_skip`` of diffusers' pipelines: how much is possible, and a fix for transformers."""

from __future__ import annotations

from typing import Any

from .base import ModelFamily


def mend_clip_skip(pipe: Any) -> None:
    """Let the pipelines of Stable Diffusion find the final norm that ``clip_skip`` needs.

    They look for it in ``text_model``, which transformers' CLIPTextModel does not have since 5.6
    (huggingface/diffusers, pull request 14043). If it exists, nothing is changed.
    """
    encoder = getattr(pipe, "text_encoder", None)
    if hasattr(encoder, "final_layer_norm") and not hasattr(encoder, "text_model"):
        vars(encoder)["text_model"] = encoder  # not a submodule, because it would contain itself


def too_much_clip_skip(pipe: Any, family: ModelFamily, clip_skip: int | None) -> str | None:
    """Return why a base's text encoders do not have so many layers to skip, or None."""
    if clip_skip is None or family.skipped_layers is None:
        return None
    for name in family.usual_text_encoders or family.text_encoders:
        layers = getattr(pipe, name).config.num_hidden_layers
        most = layers - family.skipped_layers
        if clip_skip > most:
            return (
                f"--clip_skip is {clip_skip}, but at most {most} of the {layers} layers of this "
                f"base's {name} can be skipped; 1 is usual"
            )
    return None
