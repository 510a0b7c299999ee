"""Images and captions: found, checked, cropped, ordered, encoded, in batches."""

from gralora_diffusion.io.deprecated_paths import names_of

__getattr__ = names_of(__name__)
