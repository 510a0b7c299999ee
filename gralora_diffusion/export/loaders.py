"""Ways to draw with a file that was exported: what a user of it would call.

A way is called with the base's pipeline and gives a context; the pipeline that it gives draws, and
the base's is as it was afterwards.
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

ArtifactLoader = Callable[[Any], AbstractContextManager[Any]]

_ADAPTER_NAME = "gralora_parity"


def attached_adapter(
    adapter: Adapter | str | os.PathLike[str], scale: float = 1.0
) -> ArtifactLoader:
    """The adapter itself, attached by ``load_gralora_weights``."""

    @contextmanager
    def way(pipe: Any) -> Iterator[Any]:
        pipe.load_gralora_weights(adapter, _ADAPTER_NAME)
        try:
            pipe.set_adapters(_ADAPTER_NAME, scale)
            yield pipe
        finally:
            pipe.unload_gralora_weights()

    return way


def lora_file(path: Path) -> ArtifactLoader:
    """A LoRA file, by diffusers' own ``load_lora_weights``; its name may be any."""

    @contextmanager
    def way(pipe: Any) -> Iterator[Any]:
        # by another name as tensors, for diffusers goes by the ending
        file = path if path.suffix == ".safetensors" else load_file(path)
        pipe.load_lora_weights(file, adapter_name=_ADAPTER_NAME)
        try:
            yield pipe
        finally:
            pipe.unload_lora_weights()

    return way


def fused_folder(path: Path) -> ArtifactLoader:
    """A fused pipeline in diffusers' layout, loaded beside the base."""

    @contextmanager
    def way(pipe: Any) -> Iterator[Any]:
        fused = type(pipe).from_pretrained(path, dtype=computing_dtype(pipe))
        yield fused.to(pipe.device)

    return way


def fused_in_place(load: Callable[[Any], None], components: Sequence[str]) -> ArtifactLoader:
    """Fused weights that ``load`` sets in the components of the pipeline, which get theirs back."""

    @contextmanager
    def way(pipe: Any) -> Iterator[Any]:
        models = [getattr(pipe, name) for name in components]
        kept = [{key: t.clone() for key, t in model.state_dict().items()} for model in models]
        try:
            load(pipe)
            yield pipe
        finally:
            for model, state in zip(models, kept, strict=True):
                model.load_state_dict(state)

    return way


def computing_dtype(pipe: Any) -> torch.dtype:
    """The denoiser's dtype; others, such as the VAE, may be of another."""
    dtype: torch.dtype = next(iter(component_models(pipe).values())).dtype
    return dtype
