"""``python -m gralora_diffusion.benchmark``, for launchers of several processes."""

from .main import main

main()
