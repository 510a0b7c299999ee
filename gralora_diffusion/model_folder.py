"""Where the weights of a model lie in its folder, as diffusers and transformers write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .tensor_files import AdapterFileError

#: What diffusers calls the index of a pipeline and the config of a model.
PIPELINE_INDEX, MODEL_CONFIG = "model_index.json", "config.json"
#: What a model's file is called, and the index in its place if there are several: by diffusers and
#: by transformers (``SAFE_WEIGHTS_INDEX_NAME`` in the ``utils`` of either), which take seconds to
#: import.
WEIGHT_NAMES = (
    ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    ("model.safetensors", "model.safetensors.index.json"),
)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return a model's weight file, or its shards and then their index; nothing if there are none.

    Args:
        variant: of the files, such as fp16.

    Raises:
        AdapterFileError: a shard lacks, or the index cannot be read.
    """
    for names in WEIGHT_NAMES:
        if variant is not None:
            from diffusers.utils.hub_utils import _add_variant

            names = _add_variant(names[0], variant), _add_variant(names[1], variant)
        weights, index = folder / names[0], folder / names[1]
        if weights.is_file():
            return [weights]
        if index.is_file():
            return [*shards(index), index]
    return []


def shards(index: Path) -> list[Path]:
    """Return the files that an index names.

    Raises:
        AdapterFileError: one lacks, or the index cannot be read.
    """
    names = read_json(index).get("weight_map", {}).values()
    files = [index.parent / name for name in sorted(set(names))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise AdapterFileError(
            f"{index}: it names files that lack: {', '.join(missing)}. Fetch them"
        )
    return files


def read_json(path: Path) -> dict[str, Any]:
    """Read an object of JSON.

    Raises:
        AdapterFileError: it cannot be read as one.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise AdapterFileError(f"{path}: not readable as JSON: {error}.") from error
