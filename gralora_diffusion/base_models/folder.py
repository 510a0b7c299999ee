"""Where the weights of a model lie in its folder, as diffusers and transformers write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.io.json_files import read_object
from gralora_diffusion.io.regular_files import is_regular
from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.io.tensor_files import read_header

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
        AdapterFileError: as :func:`shards`.
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
    """Return the files that an index names, all of them beside it.

    A link counts as beside it if it leads to where the index itself leads, as in the Hub's cache.

    Raises:
        AdapterFileError: the index cannot be read or names no files, or one of them is missing, is
            no safetensors file, lies in another folder, or lacks a tensor of the index.
    """
    weight_map = read_json(index).get("weight_map")
    weight_map = weight_map if isinstance(weight_map, dict) else {}
    names = list(weight_map.values())
    if not names or not all(isinstance(name, str) for name in names):
        raise AdapterFileError(
            f"{index}: its weight_map should map the names of tensors to the names of files, at "
            "least one. The index is damaged: fetch it again."
        )
    names = sorted(set(names))
    files = [index.parent / name for name in names if _is_shard_name(name)]
    folders = {index.parent.resolve(), index.resolve().parent}
    elsewhere = [repr(name) for name in names if not _is_shard_name(name)]
    elsewhere += [
        repr(file.name)
        for file in files
        if is_regular(file) and file.resolve().parent not in folders
    ]
    if elsewhere:
        raise AdapterFileError(
            f"{index}: it names {first_few(elsewhere)}. Only .safetensors files in the folder "
            "of the index are read."
        )
    if missing := [file.name for file in files if not is_regular(file)]:
        raise AdapterFileError(
            f"{index}: it names files that lack: {first_few(missing)}. Fetch them."
        )
    held = {file.name: read_header(file)[0] for file in files}
    if lacking := [key for key, name in weight_map.items() if key not in held[name]]:
        raise AdapterFileError(
            f"{index}: the files that it names do not hold {first_few(lacking)}. They are damaged, "
            "or of another model: fetch all of them again."
        )
    return files


def check_weight_files(folder: Path, variant: str | None = None) -> None:
    """Check the weight files of a pipeline by their headers, before a library opens them.

    Raises:
        AdapterFileError: one cannot be read, or they are not what the index of a model names.
    """
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        for file in weight_files(part, variant):
            if file.suffix == ".safetensors":
                read_header(file)


def _is_shard_name(name: str) -> bool:
    """Whether it names a safetensors file and no folder, on any system."""
    return name.endswith(".safetensors") and name.isprintable() and not set(name) & set("/\\:")


def read_pipeline_index(folder: Path) -> dict[str, Any]:
    """Read the index of a pipeline in its folder.

    Raises:
        AdapterFileError: it cannot be read, or a component has a name that no attribute has, such
            as a path.
    """
    index = read_json(folder / PIPELINE_INDEX)
    if wrong := [repr(name) for name in index if not name.isidentifier()]:
        raise AdapterFileError(
            f"{folder / PIPELINE_INDEX}: {first_few(wrong)} cannot be the name of a component. "
            "Names have letters, digits and underscores alone."
        )
    return index


def read_json(path: Path) -> dict[str, Any]:
    """Read an object of JSON.

    Raises:
        AdapterFileError: it cannot be read as one.
    """
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path}: not readable as JSON: {error}.") from error
