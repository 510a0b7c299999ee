"""LoRA files of other programs, which are added to be compared."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

from gralora_diffusion.io.file_names import METADATA_KEY
from gralora_diffusion.io.regular_files import is_regular
from gralora_diffusion.io.tensor_files import read_header, replacing

from .workspace import file_name, free_path


def lora_problem(path: Path) -> str | None:
    """Return why an uploaded file is no LoRA, by its header; None if it may be one."""
    try:
        _, metadata = read_header(path)
    except (OSError, ValueError):
        return f"{path.name} is not a whole .safetensors file"
    if METADATA_KEY in metadata:
        return f"{path.name} is a GraLoRA adapter. Choose it among the adapters, not the LoRA files"
    return None


def keep_lora(path: Path, folder: Path) -> Path:
    """Copy an uploaded file to ``folder``, and return the copy: one with the same content is kept.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = file_name(path.stem, "lora") + ".safetensors"
    there = folder / name
    if is_regular(there) and filecmp.cmp(there, path, shallow=False):
        return there
    target = free_path(folder, name)
    with replacing(target) as temporary:
        shutil.copyfile(path, temporary)
    return target
