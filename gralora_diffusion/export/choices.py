"""The names of export formats, styles and dtypes, and the path of an export's report."""

from __future__ import annotations

from pathlib import Path

#: Formats of a base with the adapter added to it.
FORMATS = ("checkpoint", "diffusers")
#: Style of the names in a LoRA file -> the programs that read all of it.
READERS = {
    "comfyui": "ComfyUI",
    "kohya": "AUTOMATIC1111, Forge, sd-scripts and ComfyUI",
    "diffusers": "load_lora_weights of diffusers 0.36 and later",
}
STYLES = tuple(READERS)
#: Dtypes of the output; keep: the dtype of the input.
LORA_DTYPE_CHOICES = ("keep", "fp32", "bf16", "fp16")
DTYPE_CHOICES = (*LORA_DTYPE_CHOICES, "fp8_e4m3")
#: Fields of the metadata that users may set, each as ``modelspec.<name>``.
USER_FIELDS = (
    *("title", "author", "description", "license", "usage_hint", "tags", "trigger_phrase"),
    *("resolution", "date"),
)


def parity_path(output: Path) -> Path:
    """Return the path of the report on an output."""
    return output.with_name(f"{output.name}.parity.json")
