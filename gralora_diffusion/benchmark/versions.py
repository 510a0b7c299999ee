"""The versions that determine a result."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from gralora_diffusion.io.version import __version__


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that determine a result.

    The packages are not imported. One that is not installed is "missing".
    """
    names = ("torch", "diffusers", "transformers", "peft", "accelerate")
    return {
        "python": platform.python_version(),
        "gralora-diffusion": __version__,
        **{name: _version(name) for name in names},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
