"""Stable Diffusion 1.x and XL: a UNet in the names of latent-diffusion."""

from __future__ import annotations

from typing import Any

import torch
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
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
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


def unet_tensors(unet: Any) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    prefixes = unet_prefixes(unet.config)
    for key, tensor in unet.state_dict().items():
        prefix = next(p for p in prefixes if key.startswith(p + "."))
        rest = key[len(prefix) + 1 :]
        if ".resnets." in key:
            part, kind = rest.split(".")
            rest = f"{RESNET[part]}.{kind}"
        tensors[f"model.diffusion_model.{prefixes[prefix]}.{rest}"] = tensor
    return tensors


def vae_tensors(vae: Any, start: str = "first_stage_model.") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    prefixes = vae_prefixes(vae.config)
    for key, value in vae.state_dict().items():
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
        tensors[f"{start}{name}"] = tensor
    return tensors


def clip_tensors(model: Any, start: str) -> dict[str, Tensor]:
    """A text encoder in transformers' names as they were up to version 4."""
    tensors = {}
    for key, tensor in model.state_dict().items():
        plain = key.startswith(("text_model.", "text_projection."))
        tensors[f"{start}transformer.{key if plain else f'text_model.{key}'}"] = tensor
    return tensors


def open_clip_tensors(model: Any, start: str) -> dict[str, Tensor]:
    """A text encoder in OpenCLIP's names: q, k and v in one, the projection from the right."""
    old = {key.removeprefix("text_model."): t for key, t in model.state_dict().items()}
    tensors = {
        "positional_embedding": old["embeddings.position_embedding.weight"],
        "token_embedding.weight": old["embeddings.token_embedding.weight"],
        "ln_final.weight": old["final_layer_norm.weight"],
        "ln_final.bias": old["final_layer_norm.bias"],
        "text_projection": old["text_projection.weight"].T.contiguous(),
        "logit_scale": torch.tensor(4.6),
    }
    for layer in range(model.config.num_hidden_layers):
        theirs, block = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            qkv = [old[f"{theirs}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            tensors[f"{block}attn.in_proj_{kind}"] = torch.cat(qkv)
            for name, original in {
                "self_attn.out_proj": "attn.out_proj",
                "layer_norm1": "ln_1",
                "layer_norm2": "ln_2",
                "mlp.fc1": "mlp.c_fc",
                "mlp.fc2": "mlp.c_proj",
            }.items():
                tensors[f"{block}{original}.{kind}"] = old[f"{theirs}{name}.{kind}"]
    return {start + key: tensor for key, tensor in tensors.items()}


def stable_diffusion(pipe: Any) -> dict[str, Tensor]:
    start = "cond_stage_model."
    return {
        **unet_tensors(pipe.unet),
        **vae_tensors(pipe.vae),
        **clip_tensors(pipe.text_encoder, start),
        # what the files have besides
        f"{start}transformer.text_model.embeddings.position_ids": torch.arange(16)[None],
        "betas": torch.linspace(0.00085, 0.012, 1000),
        "model_ema.decay": torch.tensor(0.9999),
    }


def stable_diffusion_xl(pipe: Any) -> dict[str, Tensor]:
    start = "conditioner.embedders."
    return {
        **unet_tensors(pipe.unet),
        **vae_tensors(pipe.vae),
        **clip_tensors(pipe.text_encoder, f"{start}0."),
        **open_clip_tensors(pipe.text_encoder_2, f"{start}1.model."),
        f"{start}0.transformer.text_model.embeddings.position_ids": torch.arange(16)[None],
    }
