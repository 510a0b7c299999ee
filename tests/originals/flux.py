"""FLUX.1, and the file of all models that ComfyUI reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.originals.ldm import clip_tensors, vae_tensors
from tests.originals.sd3 import block_tensors, blocks_of, swapped, t5_tensors

ENDS = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
DOUBLE_JOINED = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): "img_attn.qkv",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "txt_attn.qkv",
}
SINGLE_JOINED = {("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"): "linear1"}


def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As in the file: the weight of a norm of queries or keys is called scale."""
    return {
        f"model.diffusion_model.{k.replace('_norm.weight', '_norm.scale')}": t
        for k, t in tensors.items()
    }


def transformer_tensors(transformer: Any) -> dict[str, Tensor]:
    state = dict(transformer.state_dict())
    doubles = blocks_of(state, "transformer_blocks")
    singles = blocks_of(state, "single_transformer_blocks")
    for kind in ("weight", "bias"):
        state[f"norm_out.linear.{kind}"] = swapped(state[f"norm_out.linear.{kind}"])
    tensors = block_tensors(state, ENDS, {})
    for number, block in enumerate(doubles):
        for key, tensor in block_tensors(block, DOUBLE, DOUBLE_JOINED).items():
            tensors[f"double_blocks.{number}.{key}"] = tensor
    for number, block in enumerate(singles):
        for key, tensor in block_tensors(block, SINGLE, SINGLE_JOINED).items():
            tensors[f"single_blocks.{number}.{key}"] = tensor
    return named(tensors)


def flux(pipe: Any) -> dict[str, Tensor]:
    return {
        **transformer_tensors(pipe.transformer),
        **vae_tensors(pipe.vae, "vae."),
        **clip_tensors(pipe.text_encoder, "text_encoders.clip_l."),
        **t5_tensors(pipe.text_encoder_2),
    }
