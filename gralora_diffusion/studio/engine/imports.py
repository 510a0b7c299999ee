"""Imports of large libraries, when the studio's own process needs a function of theirs."""

from __future__ import annotations

from importlib import import_module

from gralora_diffusion.base_models.optional_libraries import left_out


def import_diffusers() -> None:
    """Import the part of diffusers with the rules of buckets, without libraries to quantize."""
    with left_out():
        import_module("diffusers.training_utils")
