"""Tiny encoders of the real classes in folders, and images for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from tests.tiny import parts

WIDTH = 16
_LAYERS = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def save_dinov2(folder: Path) -> Path:
    """As ``facebook/dinov2-base``: shorter edge to 32 for the central 28 (256 and 224 there)."""
    config = Dinov2Config(**_LAYERS, mlp_ratio=2, image_size=28, patch_size=7)
    _varied(Dinov2Model(config)).save_pretrained(folder)
    processor = BitImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        image_mean=MEAN,
        image_std=STD,
    )
    processor.save_pretrained(folder)
    return folder


def save_vit(folder: Path, side: int = 224) -> Path:
    """As ``facebook/dino-vits16``: no pooler, and a processor that squeezes into a square."""
    config = ViTConfig(**_LAYERS, intermediate_size=32, image_size=side, patch_size=side // 4)
    _varied(ViTModel(config, add_pooling_layer=False)).save_pretrained(folder)
    size = {"height": side, "width": side}
    ViTImageProcessorPil(size=size, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    """As ``openai/clip-vit-base-patch32``; its texts are of 16 tokens, a token a character."""
    tokenizer = parts.tokenizer()
    text = {
        **_LAYERS,
        "intermediate_size": 32,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**_LAYERS, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    _varied(CLIPModel(config)).save_pretrained(folder)
    side = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _varied(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that embeddings of different images differ."""
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3, generator=random)
    return model.eval()


def draw(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Write RGB images of several sizes, blocks of colour with noise, and return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        height, width = random.integers(30, 90, 2)
        blocks = random.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        image = Image.fromarray(blocks).resize((int(width), int(height)))
        noisy = np.asarray(image) // 2 + random.integers(0, 128, (height, width, 3))
        paths.append(folder / f"{number}.png")
        Image.fromarray(noisy.astype(np.uint8)).save(paths[-1])
    return paths
