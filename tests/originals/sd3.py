"""Stable Diffusion 3 and 3.5: MMDiT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.originals.ldm import clip_tensors, vae_tensors

ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
#: Queries, keys and values that are one layer in the original.
JOINED = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): "x_block.attn.qkv",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "context_block.attn.qkv",
    ("attn2.to_q", "attn2.to_k", "attn2.to_v"): "x_block.attn2.qkv",
}


def swapped(tensor: Tensor) -> Tensor:
    """diffusers' scale and shift are shift and scale in the original."""
    scale, shift = tensor.chunk(2)
    return torch.cat([shift, scale])


def block_tensors(
    old: dict[str, Tensor], names: dict[str, str], joined: dict[tuple[str, ...], str]
) -> dict[str, Tensor]:
    """One block: ``names`` are renamed, and those that belong together joined. All must be used."""
    new = {}
    for kind in ("weight", "bias"):
        for theirs, original in names.items():
            if (key := f"{theirs}.{kind}") in old:
                new[f"{original}.{kind}"] = old.pop(key)
        for parts, original in joined.items():
            if f"{parts[0]}.{kind}" in old:
                new[f"{original}.{kind}"] = torch.cat([old.pop(f"{p}.{kind}") for p in parts])
    assert not old, old.keys()
    return new


def blocks_of(state: dict[str, Tensor], start: str) -> list[dict[str, Tensor]]:
    """Take the tensors of each block out of ``state``."""
    blocks: list[dict[str, Tensor]] = []
    while keys := [key for key in state if key.startswith(f"{start}.{len(blocks)}.")]:
        blocks.append({key.split(".", 2)[2]: state.pop(key) for key in keys})
    return blocks


def mmdit_tensors(transformer: Any) -> dict[str, Tensor]:
    state = dict(transformer.state_dict())
    blocks = blocks_of(state, "transformer_blocks")
    # the last block does not go on with the text, so its modulation is that of an output
    for kind in ("weight", "bias"):
        for part, name in ((blocks[-1], "norm1_context"), (state, "norm_out")):
            part[f"{name}.linear.{kind}"] = swapped(part[f"{name}.linear.{kind}"])
    tensors = {"pos_embed": state.pop("pos_embed.pos_embed"), **block_tensors(state, ENDS, {})}
    for number, block in enumerate(blocks):
        for key, tensor in block_tensors(block, BLOCK, JOINED).items():
            tensors[f"joint_blocks.{number}.{key}"] = tensor
    return {f"model.diffusion_model.{key}": tensor for key, tensor in tensors.items()}


def t5_tensors(model: Any) -> dict[str, Tensor]:
    start = "text_encoders.t5xxl."
    state = {k: t for k, t in model.state_dict().items() if k != "encoder.embed_tokens.weight"}
    tensors = {f"{start}transformer.{key}": tensor for key, tensor in state.items()}
    return {**tensors, f"{start}logit_scale": torch.tensor(4.6)}


def stable_diffusion_3(pipe: Any) -> dict[str, Tensor]:
    tensors = {
        **mmdit_tensors(pipe.transformer),
        **vae_tensors(pipe.vae),
        **clip_tensors(pipe.text_encoder, "text_encoders.clip_l."),
        **clip_tensors(pipe.text_encoder_2, "text_encoders.clip_g."),
        **(t5_tensors(pipe.text_encoder_3) if pipe.text_encoder_3 else {}),
    }
    # the projection of CLIP-L is the identity, and not written
    projection = tensors.pop("text_encoders.clip_l.transformer.text_projection.weight")
    assert torch.equal(projection, torch.eye(len(projection)))
    return tensors
