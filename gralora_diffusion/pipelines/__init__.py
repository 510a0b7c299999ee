"""Adapters in diffusers' pipelines: loaded, saved, fused, unloaded, and images generated."""

from typing import TYPE_CHECKING

from gralora_diffusion.io.lazy import lazy_names

if TYPE_CHECKING:
    from .loading import (
        LoadReport,
        fuse_gralora,
        load_gralora_weights,
        save_gralora_weights,
        unfuse_gralora,
        unload_gralora_weights,
    )
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "loading": [
                "LoadReport",
                "fuse_gralora",
                "load_gralora_weights",
                "save_gralora_weights",
                "unfuse_gralora",
                "unload_gralora_weights",
            ]
        },
    )

__all__ = [
    "LoadReport",
    "fuse_gralora",
    "load_gralora_weights",
    "save_gralora_weights",
    "unfuse_gralora",
    "unload_gralora_weights",
]
