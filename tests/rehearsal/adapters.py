"""Adapters in pipelines on the pretended GPU: loaded, offloaded, fused, saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

from gralora_diffusion.io.precision import exact_fp32
from gralora_diffusion.pipelines.generation import generation_mode
from tests.models import PIPELINES, adapt_everywhere
from tests.rehearsal.device import CPU, DEVICE

#: Placement -> how a pipeline is placed.
PLACEMENTS = ("whole", "model", "sequential", "leaf", "leaf-stream", "block-stream")


def place(pipe: Any, placement: str) -> None:
    if placement == "whole":
        pipe.to("cuda")
    elif placement == "model":
        pipe.enable_model_cpu_offload(device="cuda")
    elif placement == "sequential":
        pipe.enable_sequential_cpu_offload(device="cuda")
    else:
        kind, _, stream = placement.partition("-")
        for name, model in pipe.components.items():
            if not isinstance(model, nn.Module):
                continue
            if kind == "block" and name not in ("unet", "transformer"):
                model.to(DEVICE)
                continue
            apply_group_offloading(
                model,
                onload_device=DEVICE,
                offload_device=CPU,
                offload_type=f"{kind}_level",
                num_blocks_per_group=1 if kind == "block" else None,
                use_stream=bool(stream),
            )


def latents(pipe: Any) -> Tensor:
    with generation_mode(pipe), exact_fp32():
        found: Tensor = pipe(
            prompt="a dog",
            num_inference_steps=1,
            height=32,
            width=32,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
    return found.float().cpu()


def rehearse(family: str, placement: str, folder: Path) -> Iterator[str]:
    """Load an adapter into a placed pipeline, fuse it, save it; yield what differs from the CPU."""
    saved = folder / "adapters" / family
    expected = _on_the_cpu(family, saved)
    pipe = PIPELINES[family]()
    place(pipe, placement)
    got = {}
    pipe.load_gralora_weights(saved)
    got["loaded"] = latents(pipe)
    pipe.fuse_gralora()
    got["fused"] = latents(pipe)
    pipe.unfuse_gralora()
    pipe.save_gralora_weights(folder / "again" / family)
    pipe.unload_gralora_weights()
    got["unloaded"] = latents(pipe)
    wanted = {**dict.fromkeys(("loaded", "fused"), expected[1]), "unloaded": expected[0]}
    effect = float((expected[1] - expected[0]).abs().max())
    for name, value in got.items():
        far = float((value - wanted[name]).abs().max())
        if not far < 1e-3 * effect:
            yield f"{name}: latents differ by {far:.3g}, the adapter's effect is {effect:.3g}"
    for path in sorted(saved.rglob("*.safetensors")):
        if path.read_bytes() != (folder / "again" / family / path.relative_to(saved)).read_bytes():
            yield f"{path.name} was saved with other content"


def _on_the_cpu(family: str, saved: Path) -> tuple[Tensor, Tensor]:
    """Return latents without and with an adapter, which is saved."""
    adapt_everywhere(PIPELINES[family]()).save_gralora_weights(saved)
    pipe = PIPELINES[family]()
    base = latents(pipe)
    pipe.load_gralora_weights(saved)
    return base, latents(pipe)
