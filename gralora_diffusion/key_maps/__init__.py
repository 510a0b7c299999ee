"""The layouts of original single files, and how their tensors are built from diffusers' tensors."""

from .key_map import (
    KeyMap,
    KeyMapError,
    Location,
    OriginalTensor,
    Part,
    Rule,
    Shape,
    join,
    locate,
    rename,
    swap,
)
from .latent_diffusion import (
    DENOISER,
    UNET,
    USUAL_LAYERS_PER_BLOCK,
    autoencoder,
    layers_per_block,
)
from .text_encoders import clip, open_clip, t5

__all__ = [
    "DENOISER",
    "UNET",
    "USUAL_LAYERS_PER_BLOCK",
    "KeyMap",
    "KeyMapError",
    "Location",
    "OriginalTensor",
    "Part",
    "Rule",
    "Shape",
    "autoencoder",
    "clip",
    "join",
    "layers_per_block",
    "locate",
    "open_clip",
    "rename",
    "swap",
    "t5",
]
