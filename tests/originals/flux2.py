"""FLUX.2 dev and klein: the transformer alone, under the prefix that ComfyUI gives it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.originals.flux import DOUBLE, DOUBLE_JOINED, named
from tests.originals.sd3 import block_tensors, blocks_of, swapped

ENDS = {
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
FEED_FORWARD = {
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}


def flux2(pipe: Any) -> dict[str, Tensor]:
    state = dict(pipe.transformer.state_dict())
    doubles = blocks_of(state, "transformer_blocks")
    singles = blocks_of(state, "single_transformer_blocks")
    state["norm_out.linear.weight"] = swapped(state["norm_out.linear.weight"])
    tensors = block_tensors(state, ENDS, {})
    for number, block in enumerate(doubles):
        for key, tensor in block_tensors(block, DOUBLE | FEED_FORWARD, DOUBLE_JOINED).items():
            tensors[f"double_blocks.{number}.{key}"] = tensor
    for number, block in enumerate(singles):
        for key, tensor in block_tensors(block, SINGLE, {}).items():
            tensors[f"single_blocks.{number}.{key}"] = tensor
    return named(tensors)
