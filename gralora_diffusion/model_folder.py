"""Where the weights of a model lie in its folder, as diffusers and transformers write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from diffusers.utils.hub_utils import _add_variant
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as TRANSFORMERS_INDEX_NAME
from transformers.utils import SAFE_WEIGHTS_NAME as TRANSFORMERS_WEIGHTS_NAME

from .tensor_files import AdapterFileError

#: What diffusers calls the index of a pipeline and the config of a model.
PIPELINE_INDEX, MODEL_CONFIG = "model_index.json", "config.json"
#: What a model's file is called, and the index in its place if there are several.
WEIGHT_NAMES = (
    (SAFETENSORS_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
    (TRANSFORMERS_WEIGHTS_NAME, TRANSFORMERS_INDEX_NAME),
)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return a model's weight file, or its shards and then their index; nothing if there are none.

    Args:
        variant: of the files, such as fp16.

    Raises:
        AdapterFileError: a shard lacks, or the index cannot be read.
    """
    for weights, index in WEIGHT_NAMES:
        if (file := folder / _add_variant(weights, variant)).is_file():
            return [file]
        if (file := folder / _add_variant(index, variant)).is_file():
            return [*shards(file), file]
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
