"""``python -m gralora_diffusion.benchmark``, for launchers of several processes."""

from .command import main

main()
