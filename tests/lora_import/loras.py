"""LoRAs for the tiny pipelines in the styles of several programs, made without the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

#: kohya's sd-scripts: what stands in front of a path with ``_`` for dots.
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


def pairs(
    model: nn.Module, endings: tuple[str, ...], rank: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Path -> down and up of every layer that ends so; ranks alternate between two."""
    found = {}
    for path, layer in model.named_modules():
        if path.endswith(endings) and isinstance(layer, (nn.Linear, nn.Conv2d)):
            (out, width, *kernel), r = layer.weight.shape, rank - len(found) % 2
            down = torch.randn(r, width, *kernel) / width**0.5
            up = torch.randn(out, r, *[1] * len(kernel)) / r**0.5
            found[path] = down, up
    assert found
    return found


def dense(down: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    return torch.einsum("or,ri...->oi...", up.double().flatten(1), down.double()) * scale


def of_peft(model: Any, endings: list[str], **options: Any) -> LoraConfig:
    """Put a LoRA on a model with PEFT; returns its config."""
    config = LoraConfig(target_modules=endings, init_lora_weights=False, **options)
    model.add_adapter(config)
    return config


def peft_deltas(model: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
    """Path -> dense update as PEFT's LoRA layers in the model have it."""
    return {
        path: layer.get_delta_weight(layer.active_adapters[0]).detach().double() * scale
        for path, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }


def save(tensors: dict[str, Tensor], path: Path, **metadata: Any) -> Path:
    texts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in metadata.items()}
    save_file({key: t.contiguous() for key, t in tensors.items()}, path, metadata=texts)
    return path
