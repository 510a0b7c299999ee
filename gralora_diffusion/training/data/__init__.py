"""Images and captions: finding, checking, cropping, ordering, encoding and batching them."""

from gralora_diffusion.io.deprecated_paths import names_of

__getattr__ = names_of(__name__)
