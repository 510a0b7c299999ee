"""The version of the package, with or without an installation. ``pyproject.toml`` reads it."""

__version__ = "0.1.0"
