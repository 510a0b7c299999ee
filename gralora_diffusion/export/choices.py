"""What there is to choose from for an export, by name, and what its report is called."""

from __future__ import annotations

from pathlib import Path

#: Forms of the adapter added to its base.
FORMATS = ("checkpoint", "diffusers")
#: Whose names a LoRA file has -> who reads all of it.
READERS = {
    "comfyui": "ComfyUI",
    "kohya": "AUTOMATIC1111, Forge, sd-scripts and ComfyUI",
    "diffusers": "load_lora_weights of diffusers 0.36 and later",
}
STYLES = tuple(READERS)
#: Dtypes of what is written; keep: that of what is read.
DTYPE_CHOICES = ("keep", "fp32", "bf16", "fp16", "fp8_e4m3")
#: What people may say of a file, each a field ``modelspec.<name>``.
SAID = (
    *("title", "author", "description", "license", "usage_hint", "tags", "trigger_phrase"),
    *("resolution", "date"),
)


def parity_path(output: Path) -> Path:
    """Return where the report on an output lies."""
    return output.with_name(f"{output.name}.parity.json")
