"""The original single-file layout of a Stable Diffusion 1.x pipeline, made from diffusers' names.

Written from the layout of the original checkpoints, for the other direction is diffusers' own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def unet_prefixes(config: Any) -> dict[str, str]:
    """diffusers' prefix of each block of the UNet -> the original one."""
    names = dict(UNET_ENDS)
    per_block, blocks = config.layers_per_block, len(config.block_out_channels)
    number = 1
    for block in range(blocks):
        for layer in range(per_block):
            names[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{number}.0"
            names[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if block < blocks - 1:
            names[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for block in range(blocks):
        attends = "CrossAttn" in config.up_block_types[block]
        for layer in range(per_block + 1):
            names[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{number}.0"
            names[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        last = f"output_blocks.{number - 1}.{2 if attends else 1}.conv"
        names[f"up_blocks.{block}.upsamplers.0.conv"] = last
    return names


def vae_prefixes(config: Any) -> dict[str, str]:
    names = {"conv_norm_out": "norm_out"}
    blocks = len(config.block_out_channels)
    for block in range(blocks):
        mirrored = blocks - 1 - block
        for layer in range(config.layers_per_block + 1):
            here = f"resnets.{layer}"
            names[f"encoder.down_blocks.{block}.{here}"] = f"encoder.down.{block}.block.{layer}"
            names[f"decoder.up_blocks.{block}.{here}"] = f"decoder.up.{mirrored}.block.{layer}"
        sampler = "samplers.0"
        names[f"encoder.down_blocks.{block}.down{sampler}"] = f"encoder.down.{block}.downsample"
        names[f"decoder.up_blocks.{block}.up{sampler}"] = f"decoder.up.{mirrored}.upsample"
    return names


def original_tensors(pipe: Any) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    prefixes = unet_prefixes(pipe.unet.config)
    for key, tensor in pipe.unet.state_dict().items():
        prefix = next(p for p in prefixes if key.startswith(p + "."))
        rest = key[len(prefix) + 1 :]
        if ".resnets." in key:
            part, kind = rest.split(".")
            rest = f"{RESNET[part]}.{kind}"
        tensors[f"model.diffusion_model.{prefixes[prefix]}.{rest}"] = tensor
    prefixes = vae_prefixes(pipe.vae.config)
    for key, value in pipe.vae.state_dict().items():
        name, tensor = key, value
        for theirs, original in prefixes.items():
            name = name.replace(f"{theirs}.", f"{original}.")
        name = name.replace("mid_block.resnets.0", "mid.block_1")
        name = name.replace("mid_block.resnets.1", "mid.block_2")
        name = name.replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1")
            for theirs, original in VAE_ATTENTION.items():
                name = name.replace(f".{theirs}.", f".{original}.")
            if name.endswith("weight") and ".norm." not in name:
                tensor = value[:, :, None, None].contiguous()
        tensors[f"first_stage_model.{name}"] = tensor
    for key, tensor in pipe.text_encoder.state_dict().items():
        name = key if key.startswith("text_model.") else f"text_model.{key}"
        tensors[f"cond_stage_model.transformer.{name}"] = tensor
    return tensors


def save_single_file(pipe: Any, path: Path) -> Path:
    save_file({key: tensor.clone() for key, tensor in original_tensors(pipe).items()}, path)
    return path
