"""Tests of ``gralora_diffusion.export``."""
