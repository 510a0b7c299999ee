"""Frozen layers and blocks with the widths of published models, and inputs for them.

A shape is written ``name@tokens``: ``sdxl-640@4096`` is a block of SDXL 640 wide with 4096 tokens
of the image, and ``1280x768@77`` a linear layer from 768 to 1280 with 77 tokens. Of
``tiny-unet@8``, the whole UNet of samples/tiny-base, the number is that of the images.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.transformers.transformer_flux import (
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from gralora_diffusion import get_family
from tests import ROOT

#: The projections of the attentions in the presets of the families, there or not in one block.
TARGETS = [
    *get_family("flux").target_presets["transformer"]["attention"],
    "layer",  # of a layer alone
]

BLOCKS = (
    *("sd15-320@4096", "sd15-640@1024", "sd15-1280@256", "sdxl-640@4096", "sdxl-1280@1024"),
    *("sd35-medium@1024", "sd35-large@1024", "flux-double@1024", "flux-single@1024"),
    "tiny-unet@8",
)
#: (out, in): projections of the above, of images and of texts, and layers of feed-forwards.
LAYERS = (
    *("320x320@4096", "640x640@1024", "640x640@4096", "1280x1280@256", "1280x1280@1024"),
    *("640x768@77", "1280x2048@77", "1536x1536@1024", "2432x2432@1024", "3072x3072@1024"),
    *("3072x3072@512", "10240x1280@1024", "12288x3072@1024", "3072x12288@1024"),
)


@dataclass(frozen=True)
class Shape:
    """A frozen module and how to call it.

    Attributes:
        module: on the device, in its dtype, without anything to train.
        inputs: its arguments; the first is what a gradient is asked of.
    """

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]


class Layer(nn.Module):
    """A linear layer as part of something, so that an adapter can take its place."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.layer = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def make_shape(name: str, device: torch.device, dtype: torch.dtype) -> Shape:
    """Make a layer or a block by its name.

    Raises:
        ValueError: there is none of that name.
    """
    kind, _, tokens = name.partition("@")
    if layer := re.fullmatch(r"(\d+)x(\d+)", kind):
        out_features, in_features = map(int, layer.groups())
        make: Any = partial(_layer, out_features, in_features)
    elif kind in _BLOCKS:
        make = _BLOCKS[kind]
    else:
        raise ValueError(f"no shape {name!r}; give one of {', '.join(_BLOCKS)} or OUTxIN, @TOKENS")
    if not tokens.isdigit():
        raise ValueError(f"shape {name!r} lacks its number of tokens: {kind}@1024")
    with torch.device(device):
        module, inputs = make(int(tokens))
    inputs = tuple(_cast(value, dtype) for value in inputs)
    return Shape(name, module.to(dtype).requires_grad_(False).train(), inputs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _layer(out_features: int, in_features: int, tokens: int) -> tuple[nn.Module, tuple[Any, ...]]:
    return Layer(in_features, out_features), (torch.randn(1, tokens, in_features),)


def _unet(width: int, heads: int, context: int) -> Callable[[int], tuple[nn.Module, Any]]:
    def make(tokens: int) -> tuple[nn.Module, Any]:
        block = BasicTransformerBlock(
            width, heads, width // heads, cross_attention_dim=context, activation_fn="geglu"
        )
        return block, (torch.randn(1, tokens, width), None, torch.randn(1, 77, context))

    return make


def _joint(width: int, two_attentions: bool) -> Callable[[int], tuple[nn.Module, Any]]:
    def make(tokens: int) -> tuple[nn.Module, Any]:
        block = JointTransformerBlock(
            width, width // 64, 64, qk_norm="rms_norm", use_dual_attention=two_attentions
        )
        text = torch.randn(1, 77 + 256, width)
        return block, (torch.randn(1, tokens, width), text, torch.randn(1, width))

    return make


def _flux(block_class: Any) -> Callable[[int], tuple[nn.Module, Any]]:
    def make(tokens: int) -> tuple[nn.Module, Any]:
        block, text = block_class(3072, 24, 128), torch.randn(1, 512, 3072)
        ids = torch.zeros(512 + tokens, 3)
        ids[512:, 1] = torch.arange(tokens)
        positions = FluxPosEmbed(10000, [16, 56, 56])(ids)
        return block, (torch.randn(1, tokens, 3072), text, torch.randn(1, 3072), positions)

    return make


class _TinyUnet(nn.Module):
    """The UNet of samples/tiny-base, which returns a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel.from_pretrained(
            ROOT / "samples" / "tiny-base", subfolder="unet"
        )

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return self.unet(latents, timesteps, text, return_dict=False)[0]


def _tiny_unet(pictures: int) -> tuple[nn.Module, tuple[Any, ...]]:
    with torch.device("cpu"):
        module = _TinyUnet()
    config: Any = module.unet.config
    side = config.sample_size
    latents = torch.randn(pictures, config.in_channels, side, side)
    text = torch.randn(pictures, 77, config.cross_attention_dim)
    module.to(latents.device)
    return module, (latents, torch.full((pictures,), 500), text)


_BLOCKS = {
    "tiny-unet": _tiny_unet,
    "sd15-320": _unet(320, 8, 768),
    "sd15-640": _unet(640, 8, 768),
    "sd15-1280": _unet(1280, 8, 768),
    "sdxl-640": _unet(640, 10, 2048),
    "sdxl-1280": _unet(1280, 20, 2048),
    "sd35-medium": _joint(1536, True),
    "sd35-large": _joint(2432, False),
    "flux-double": _flux(FluxTransformerBlock),
    "flux-single": _flux(FluxSingleTransformerBlock),
}
