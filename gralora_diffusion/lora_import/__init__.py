"""Convert a LoRA to a GraLoRA adapter, to use it or to continue training."""

from typing import TYPE_CHECKING

from gralora_diffusion.io.lazy import lazy_names

if TYPE_CHECKING:
    from .conversion import ImportedLayer, gralora_from_lora, overall_error
else:
    __getattr__, __dir__ = lazy_names(
        __name__, {"conversion": ["ImportedLayer", "gralora_from_lora", "overall_error"]}
    )

__all__ = ["ImportedLayer", "gralora_from_lora", "overall_error"]
