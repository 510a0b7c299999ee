"""UNet and autoencoder with the names of latent-diffusion (CompVis, later Stability AI)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .key_map import KeyMap, Rule, rename

DENOISER = "model.diffusion_model."
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
#: The number in published bases, used if it does not follow from an adapter's layers.
USUAL_LAYERS_PER_BLOCK = 2


def unet_rules(keys: Iterable[str], original: bool) -> list[Rule]:
    """Return the rules for a UNet, whose blocks are numbered consecutively in the original.

    Args:
        keys: keys of the whole model or, in diffusers' names, of some of its layers. In the second
            case, the number of layers per block is that of published bases, unless a layer in
            ``up_blocks`` shows a larger one.
        original: whether the keys are the original's.
    """
    keys = list(keys)
    levels, layers = _original_shape(keys) if original else _shape(keys)
    rules = [rename(name, renamed) for name, renamed in _UNET_ENDS.items()]
    rules += _resnet("mid_block.resnets.0", "middle_block.0")
    rules.append(rename("mid_block.attentions.0", "middle_block.1"))
    rules += _resnet("mid_block.resnets.1", "middle_block.2")
    for level in range(levels):
        first = 1 + level * (layers + 1)
        for layer in range(layers):
            down, block = f"down_blocks.{level}", f"input_blocks.{first + layer}"
            rules += _resnet(f"{down}.resnets.{layer}", f"{block}.0")
            rules.append(rename(f"{down}.attentions.{layer}", f"{block}.1"))
        sampler = f"input_blocks.{first + layers}.0.op"
        rules.append(rename(f"down_blocks.{level}.downsamplers.0.conv", sampler))
        first = level * (layers + 1)
        for layer in range(layers + 1):
            up, block = f"up_blocks.{level}", f"output_blocks.{first + layer}"
            rules += _resnet(f"{up}.resnets.{layer}", f"{block}.0")
        sampler, last = f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{first + layers}"
        attends = any(
            key.startswith((f"{last}.1.transformer_blocks.", f"up_blocks.{level}.attentions."))
            for key in keys
        )
        rules.append(rename(sampler, f"{last}.{2 if attends else 1}.conv"))
        for layer in range(layers + 1):
            here = f"up_blocks.{level}.attentions.{layer}"
            rules.append(rename(here, f"output_blocks.{first + layer}.1"))
    return rules


def _resnet(name: str, original: str) -> list[Rule]:
    return [rename(f"{name}.{n}", f"{original}.{renamed}") for n, renamed in _RESNET.items()]


def layers_per_block(keys: Iterable[str]) -> int:
    """Return the number that :func:`unet_rules` counts with, for keys in diffusers' names."""
    return _shape(list(keys))[1]


def _shape(keys: list[str]) -> tuple[int, int]:
    """Return a UNet's number of levels and of layers per level, from keys in diffusers' names."""
    levels = {int(n) for key in keys for n in re.findall(r"^(?:down|up)_blocks\.(\d+)\.", key)}
    ups = {int(n) for key in keys for n in re.findall(r"^up_blocks\.\d+\.\w+\.(\d+)\.", key)}
    downs = {int(n) for key in keys for n in re.findall(r"^down_blocks\.\d+\.\w+\.(\d+)\.", key)}
    layers = max([*ups, *(n + 1 for n in downs)], default=0)
    whole = "conv_out.weight" in keys
    return max(levels, default=0) + 1, layers if whole else max(layers, USUAL_LAYERS_PER_BLOCK)


def _original_shape(keys: list[str]) -> tuple[int, int]:
    """Return the same from the original's keys: a level ends with its downsampling layer."""
    ends = {int(n) for key in keys for n in re.findall(r"^input_blocks\.(\d+)\.0\.op\.", key)}
    blocks = {int(n) for key in keys for n in re.findall(r"^input_blocks\.(\d+)\.", key)}
    return len(ends) + 1, (min(ends) if ends else max(blocks, default=0) + 1) - 1


UNET = KeyMap((DENOISER,), unet_rules)

_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    # diffusers' names until 2023, which many files still have
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
_VAE_BLOCK = ("norm1", "conv1", "norm2", "conv2")


def _vae_rules(keys: Iterable[str], original: bool) -> list[Rule]:
    pattern = r"^decoder\.up\.(\d+)\." if original else r"^decoder\.up_blocks\.(\d+)\."
    levels = max((int(n) for key in keys for n in re.findall(pattern, key)), default=0) + 1
    rules = []
    for side in ("encoder", "decoder"):
        rules.append(rename(f"{side}.conv_norm_out", f"{side}.norm_out"))
        for number in range(2):
            here = f"{side}.mid_block.resnets.{number}"
            rules.append(rename(here, f"{side}.mid.block_{number + 1}"))
        for name, renamed in _VAE_ATTENTION.items():
            here, there = f"{side}.mid_block.attentions.0.{name}", f"{side}.mid.attn_1.{renamed}"
            rules.append(Rule((here,), there, convolution=name != "group_norm"))
    for level in range(levels):
        sides = (
            ("encoder.down_blocks", "encoder.down", level, "down"),
            ("decoder.up_blocks", "decoder.up", levels - 1 - level, "up"),
        )
        for name, renamed, number, way in sides:
            here, there = f"{name}.{level}", f"{renamed}.{number}"
            for old, new in (("conv_shortcut", "nin_shortcut"), *((n, n) for n in _VAE_BLOCK)):
                rules.append(rename(f"{here}.resnets.*.{old}", f"{there}.block.*.{new}"))
            rules.append(rename(f"{here}.{way}samplers.0", f"{there}.{way}sample"))
    ends = [f"{side}.{name}" for side in ("encoder", "decoder") for name in ("conv_in", "conv_out")]
    return rules + [rename(name, name) for name in (*ends, "quant_conv", "post_quant_conv")]


def autoencoder(*prefixes: str) -> KeyMap:
    """Return the key map of an ``AutoencoderKL``; the first prefix is written."""
    return KeyMap(prefixes, _vae_rules)
