"""An adapter in the forms that others read: fused checkpoints, LoRA files."""

from .lora import LoraReport, export_lora

__all__ = ["LoraReport", "export_lora"]
