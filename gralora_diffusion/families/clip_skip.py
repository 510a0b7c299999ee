"""A fix for ``clip_skip`` of diffusers' pipelines, which fails with recent transformers."""

from __future__ import annotations

from typing import Any


def mend_clip_skip(pipe: Any) -> None:
    """Let the pipelines of Stable Diffusion find the final norm that ``clip_skip`` needs.

    They look for it in ``text_model``, which transformers' CLIPTextModel does not have since 5.6
    (huggingface/diffusers, pull request 14043). If it exists, nothing is changed.
    """
    encoder = getattr(pipe, "text_encoder", None)
    if hasattr(encoder, "final_layer_norm") and not hasattr(encoder, "text_model"):
        vars(encoder)["text_model"] = encoder  # not a submodule, because it would contain itself
