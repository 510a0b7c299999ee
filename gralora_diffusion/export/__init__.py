"""Export an adapter to formats that other programs read: checkpoints, LoRA files, dense updates."""

from typing import TYPE_CHECKING

from gralora_diffusion.io.lazy import lazy_names

if TYPE_CHECKING:
    from .diff import export_diff
    from .fused import FusedReport, export_fused
    from .lora import LoraReport, export_lora
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "diff": ["export_diff"],
            "fused": ["FusedReport", "export_fused"],
            "lora": ["LoraReport", "export_lora"],
        },
    )

__all__ = ["FusedReport", "LoraReport", "export_diff", "export_fused", "export_lora"]
