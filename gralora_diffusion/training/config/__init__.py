"""The options of a training run: what there is, as one object, from a command line and YAML."""

from gralora_diffusion.io.deprecated_paths import names_of

__getattr__ = names_of(__name__)
