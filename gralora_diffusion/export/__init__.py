"""An adapter in the forms that others read: fused checkpoints, LoRA files."""

from .fused import FusedReport, export_fused
from .lora import LoraReport, export_lora

__all__ = ["FusedReport", "LoraReport", "export_fused", "export_lora"]
