"""The options of a training run, read from a command line and YAML into one object."""

from gralora_diffusion.io.deprecated_paths import names_of

__getattr__ = names_of(__name__)
