"""Names of adapter files, prefixes of their keys, and the form of Hub ids."""

from __future__ import annotations

#: The native file, and the field of its metadata that describes the adapter.
WEIGHTS_NAME = "pytorch_gralora_weights.safetensors"
METADATA_KEY = "gralora_adapter_metadata"
#: The files of PEFT's folder (``peft.utils.constants``), and the prefix of their keys.
PEFT_CONFIG_NAME = "adapter_config.json"
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


def looks_like_hub_id(text: str) -> bool:
    """Whether a string that is not a local path has the form ``name`` or ``owner/name``."""
    return (
        text.count("/") <= 1
        and not text.startswith((".", "/", "~"))
        and "\\" not in text
        and not text.endswith((".safetensors", ".bin", ".pt", ".ckpt", "/"))
    )
