"""Single files in the layouts that the families were published in, made from diffusers' pipelines.

Written from those layouts; the other direction is diffusers' own, and what is to be tested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tests.originals import flux, flux2, ldm, sd3

#: family name -> all tensors of its fullest single file
ORIGINALS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "stable-diffusion": ldm.stable_diffusion,
    "stable-diffusion-xl": ldm.stable_diffusion_xl,
    "stable-diffusion-3": sd3.stable_diffusion_3,
    "flux": flux.flux,
    "flux2": flux2.flux2,
    "flux2-klein": flux2.flux2,
}


def write(tensors: Mapping[str, Tensor], path: Path) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def without(tensors: Mapping[str, Tensor], *starts: str) -> dict[str, Tensor]:
    """What is left when keys that begin so are gone; they must have been there."""
    left = {key: tensor for key, tensor in tensors.items() if not key.startswith(starts)}
    assert all(any(key.startswith(start) for key in tensors) for start in starts)
    return left


def transformer_alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's tensors under bare keys."""
    start = "model.diffusion_model."
    return {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}
