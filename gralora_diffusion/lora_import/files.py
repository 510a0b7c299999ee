"""Read LoRA files, PEFT's folders and Hub repositories."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from gralora_diffusion.base_models.folder import read_json
from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.io.file_names import (
    PEFT_CONFIG_NAME,
    PEFT_PREFIX,
    PEFT_WEIGHTS_NAME,
    looks_like_hub_id,
    no_such,
)
from gralora_diffusion.io.hub import fetch
from gralora_diffusion.io.tensor_files import read_safetensors

_DENOISER_OF_COMFYUI = "diffusion_model."


@dataclass(frozen=True)
class LoraFile:
    """Tensors, the header's metadata, component -> PEFT's config beside the file, and a name."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    name: str = "state dict"


def read_file(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    family: ModelFamily,
    weight_name: str | None = None,
    hub_options: Mapping[str, Any] | None = None,
) -> LoraFile:
    """Read a file, PEFT's folder, a folder or a Hub repository with one file, or a state dict.

    Raises:
        AdapterFileError: nothing was found, there are several files, or the file is not a complete
            safetensors file.
    """
    if isinstance(source, Mapping):
        return LoraFile(dict(source))
    path = Path(source).expanduser()
    if not path.exists() and isinstance(source, str) and looks_like_hub_id(source):
        patterns = [weight_name or "*.safetensors", f"*{PEFT_CONFIG_NAME}"]
        try:
            path = fetch(source, patterns, **(hub_options or {}))
        except OSError as error:
            raise AdapterFileError(f"{source}: {error}") from error
    if path.name == PEFT_WEIGHTS_NAME and path.with_name(PEFT_CONFIG_NAME).is_file():
        path = path.parent
    if path.is_dir() and (configs := _peft_configs(path, family)):
        tensors: dict[str, Tensor] = {}
        for component, config in configs.items():
            part, _ = read_safetensors(config.with_name(PEFT_WEIGHTS_NAME))
            tensors |= {_named(component, key): tensor for key, tensor in part.items()}
        return LoraFile(tensors, {}, {c: read_json(f) for c, f in configs.items()}, str(source))
    if path.is_dir():
        path = _only_file(path, weight_name)
    if not path.is_file():
        raise AdapterFileError(f"{source}: {no_such(path)}")
    tensors, metadata = read_safetensors(path)
    return LoraFile(tensors, metadata, {}, str(path))


def _peft_configs(folder: Path, family: ModelFamily) -> dict[str, Path]:
    if (folder / PEFT_CONFIG_NAME).is_file():
        name = folder.name if folder.name in family.components else family.denoiser
        return {name: folder / PEFT_CONFIG_NAME}
    return {path.parent.name: path for path in sorted(folder.glob(f"*/{PEFT_CONFIG_NAME}"))}


def _named(component: str, key: str) -> str:
    """Return a key of PEFT's with its component in front; other names already start with it."""
    if key.startswith(_DENOISER_OF_COMFYUI):  # as diffusion-pipe writes it
        return key
    return f"{component}.{key.removeprefix(PEFT_PREFIX)}"


def _only_file(folder: Path, weight_name: str | None) -> Path:
    if weight_name:
        return folder / weight_name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        if not files:
            raise AdapterFileError(f"{folder}: this folder contains no .safetensors file.")
        names = ", ".join(file.name for file in files)
        raise AdapterFileError(
            f"{folder}: expected one .safetensors file, found {names}. Choose one with weight_name."
        )
    return files[0]
