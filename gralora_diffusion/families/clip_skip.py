"""``clip_skip`` of diffusers' pipelines, where it would fail."""

from __future__ import annotations

from typing import Any


def mend_clip_skip(pipe: Any) -> None:
    """Let the pipelines of Stable Diffusion find the norm that they want for ``clip_skip``.

    They look for it in a ``text_model`` that transformers' CLIPTextModel lacks since 5.6
    (huggingface/diffusers, pull request 14043). Where nothing lacks, nothing is done.
    """
    encoder = getattr(pipe, "text_encoder", None)
    if hasattr(encoder, "final_layer_norm") and not hasattr(encoder, "text_model"):
        vars(encoder)["text_model"] = encoder  # no submodule, or it would hold itself
