"""Ways to generate with an exported artifact, by the same calls that a user would make.

A loader takes the base's pipeline and returns a context manager. Inside, the yielded pipeline
generates with the artifact. Afterwards, the base's pipeline is unchanged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gralora_diffusion.adapters.adapter_file import Adapter
from gralora_diffusion.adapters.compatibility import component_models
from gralora_diffusion.pipelines.placement import placed_beside

ArtifactLoader = Callable[[Any], AbstractContextManager[Any]]

_ADAPTER_NAME = "gralora_parity"


def attached_adapter(
    adapter: Adapter | str | os.PathLike[str], scale: float = 1.0
) -> ArtifactLoader:
    """Attach the adapter itself with ``load_gralora_weights``."""

    @contextmanager
    def loader(pipe: Any) -> Iterator[Any]:
        pipe.load_gralora_weights(adapter, _ADAPTER_NAME)
        try:
            pipe.set_adapters(_ADAPTER_NAME, scale)
            yield pipe
        finally:
            pipe.unload_gralora_weights()

    return loader


def lora_file(path: Path) -> ArtifactLoader:
    """Load a LoRA file of any name with diffusers' own ``load_lora_weights``."""

    @contextmanager
    def loader(pipe: Any) -> Iterator[Any]:
        # under another name as tensors, because diffusers checks the file's suffix
        file = path if path.suffix == ".safetensors" else load_file(path)
        pipe.load_lora_weights(file, adapter_name=_ADAPTER_NAME)
        try:
            yield pipe
        finally:
            pipe.unload_lora_weights()

    return loader


def fused_folder(path: Path) -> ArtifactLoader:
    """Load a fused pipeline in diffusers' layout; the base leaves the device if both do not fit."""

    @contextmanager
    def loader(pipe: Any) -> Iterator[Any]:
        fused = type(pipe).from_pretrained(path, dtype=computing_dtype(pipe))
        with placed_beside(fused, pipe):
            yield fused

    return loader


def fused_in_place(load: Callable[[Any], None], components: Sequence[str]) -> ArtifactLoader:
    """Set fused weights in the components of the pipeline with ``load``, and restore their own."""

    @contextmanager
    def loader(pipe: Any) -> Iterator[Any]:
        models = [getattr(pipe, name) for name in components]
        # on the CPU, because a device may not have room for both
        before = [
            {key: tensor.to("cpu", copy=True) for key, tensor in model.state_dict().items()}
            for model in models
        ]
        try:
            load(pipe)
            yield pipe
        finally:
            for model, state in zip(models, before, strict=True):
                model.load_state_dict(state)

    return loader


def computing_dtype(pipe: Any) -> torch.dtype:
    """Return the denoiser's dtype; other components, such as the VAE, may have another."""
    dtype: torch.dtype = next(iter(component_models(pipe).values())).dtype
    return dtype
