"""Text encoders in single files: CLIP as written by transformers up to version 4, OpenCLIP, T5."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .key_map import KeyMap, Rule, Shape, join, rename

#: transformers 5 removed this level from CLIPTextModel; files have it.
_LEVEL = "text_model."
_POSITION_IDS = r"text_model\.embeddings\.position_ids"
_LAYER = "text_model.encoder.layers.*"
_BLOCK = "transformer.resblocks.*"
_OPEN_CLIP = (
    rename("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    rename("text_model.embeddings.token_embedding", "token_embedding"),
    rename("text_model.final_layer_norm", "ln_final"),
    Rule(("text_projection.weight",), "text_projection", transposed=True),
    *(
        join(
            [f"{_LAYER}.self_attn.{n}_proj.{kind}" for n in "qkv"], f"{_BLOCK}.attn.in_proj_{kind}"
        )
        for kind in ("weight", "bias")
    ),
    rename(f"{_LAYER}.self_attn.out_proj", f"{_BLOCK}.attn.out_proj"),
    rename(f"{_LAYER}.layer_norm1", f"{_BLOCK}.ln_1"),
    rename(f"{_LAYER}.layer_norm2", f"{_BLOCK}.ln_2"),
    rename(f"{_LAYER}.mlp.fc1", f"{_BLOCK}.mlp.c_fc"),
    rename(f"{_LAYER}.mlp.fc2", f"{_BLOCK}.mlp.c_proj"),
)
#: Weights that show the width -> the axis that has it.
_WIDTHS = {
    **{f"self_attn.{name}_proj.weight": 1 for name in ("q", "k", "v", "out")},
    "mlp.fc1.weight": 1,
    "mlp.fc2.weight": 0,
}


def with_level(key: str) -> str:
    """Add the level to a key or path of CLIP if it is missing."""
    return key if key.startswith((_LEVEL, "text_projection")) else _LEVEL + key


def clip(prefix: str, comfyui_name: str) -> KeyMap:
    """Return the key map of CLIP with transformers' names and ``prefix`` (including its dot)."""
    rules = (
        rename("text_model", "transformer.text_model"),
        rename("text_projection", "transformer.text_projection"),
    )
    return KeyMap((prefix,), rules, with_level, _POSITION_IDS, comfyui_name=comfyui_name)


def open_clip(prefix: str, comfyui_name: str, width: int | None = None) -> KeyMap:
    """Return the key map of CLIP with OpenCLIP's names, for encoders of ``width`` if given."""

    def fits(shapes: Mapping[str, Shape]) -> bool:
        return width is None or any(
            shape[axis] == width
            for key, shape in shapes.items()
            for ending, axis in _WIDTHS.items()
            if key.endswith(ending)
        )

    return KeyMap((prefix,), _OPEN_CLIP, with_level, _POSITION_IDS, fits, comfyui_name)


def t5(prefix: str, comfyui_name: str) -> KeyMap:
    """Return T5's key map. The embedding is written twice, as diffusers' reader does not tie it."""
    rules = (
        rename("encoder", "transformer.encoder"),
        rename("shared", "transformer.shared"),
    )
    copy = "encoder.embed_tokens.weight"
    return KeyMap(
        (prefix,),
        rules,
        ignored=re.escape(copy),
        comfyui_name=comfyui_name,
        copies=((f"transformer.{copy}", "shared.weight"),),
    )
