"""An adapter in the forms that others read: fused checkpoints, LoRA files, dense updates."""

from .diff import export_diff
from .fused import FusedReport, export_fused
from .lora import LoraReport, export_lora

__all__ = ["FusedReport", "LoraReport", "export_diff", "export_fused", "export_lora"]
