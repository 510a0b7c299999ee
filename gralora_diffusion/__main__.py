"""``python -m gralora_diffusion``, the same as ``gralora``."""

from .cli import main

if __name__ == "__main__":
    main()
