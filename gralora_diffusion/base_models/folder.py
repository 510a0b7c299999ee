"""Find the weights of a model in its folder, as diffusers and transformers write it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.io.file_names import PIPELINE_INDEX, real_path
from gralora_diffusion.io.json_files import read_object
from gralora_diffusion.io.regular_files import is_regular
from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.io.tensor_files import read_header

#: diffusers' name of the config of a model.
MODEL_CONFIG = "config.json"
#: Names of a model's file, and of the index that replaces it if there are several files, for
#: diffusers and transformers (``SAFE_WEIGHTS_INDEX_NAME`` in the ``utils`` of either). They are
#: repeated here because both libraries take seconds to import.
WEIGHT_NAMES = (
    ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    ("model.safetensors", "model.safetensors.index.json"),
)

#: More layers of a kind than any model has.
MOST_LAYERS = 1000
#: Bytes that files beside the weights have at most, by their endings. The vocabulary of 262,000
#: tokens has 33 MB.
_MOST_BYTES = {".json": 64 << 20, ".txt": 64 << 20, ".model": 64 << 20, ".jinja": 1 << 20}
#: Numbers of tokens that T5's and Pegasus's tokenizers make, about a hundred.
_COUNTS_TOKENS, _MOST_MADE_TOKENS = ("extra_ids", "offset"), 10_000
_TOKENIZER_CONFIG = "tokenizer_config.json"
_COUNTS_LAYERS = re.compile(r"layers|blocks|depth")


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return a model's weight file, or its shards followed by their index; empty without weights.

    Args:
        variant: variant of the files, such as fp16.

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
    """Return the files that an index names. All of them must be in its folder.

    A link is accepted if its target is in the folder of the index's own target, as in the Hub's
    cache.

    Raises:
        AdapterFileError: the index cannot be read or names no files, or a file is missing, is not a
            safetensors file, lies in another folder, or does not have a tensor of the index.
    """
    weight_map = read_json(index).get("weight_map")
    weight_map = weight_map if isinstance(weight_map, dict) else {}
    names = list(weight_map.values())
    if not names or not all(isinstance(name, str) for name in names):
        raise AdapterFileError(
            f"{index}: its weight_map must map the names of tensors to the names of files, and "
            "must not be empty. The index is damaged: download it again."
        )
    names = sorted(set(names))
    files = [index.parent / name for name in names if _is_shard_name(name)]
    folders = {real_path(index.parent), real_path(index).parent}
    elsewhere = [repr(name) for name in names if not _is_shard_name(name)]
    elsewhere += [
        repr(file.name)
        for file in files
        if is_regular(file) and real_path(file).parent not in folders
    ]
    if elsewhere:
        raise AdapterFileError(
            f"{index}: it names {first_few(elsewhere)}. Only .safetensors files in the folder of "
            "the index are read."
        )
    if missing := [file.name for file in files if not is_regular(file)]:
        raise AdapterFileError(
            f"{index}: it names files that are missing: {first_few(missing)}. Download them."
        )
    held = {file.name: read_header(file)[0] for file in files}
    if absent := [key for key, name in weight_map.items() if key not in held[name]]:
        raise AdapterFileError(
            f"{index}: the files that it names do not contain {first_few(absent)}. They are "
            "damaged or belong to another model: download all of them again."
        )
    return files


def check_sizes(folder: Path, left_out: Collection[str] = ()) -> None:
    """Check the sizes of a pipeline's configs, vocabularies and templates.

    Libraries read them whole, and make as many tokens as a tokenizer's config says.

    Args:
        left_out: components that are not read.

    Raises:
        AdapterFileError: a file is larger than any such file, or a tokenizer's config is damaged.
    """
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        for path in part.rglob("*") if part.name not in left_out else ():
            most = _MOST_BYTES.get(path.suffix)
            if most is not None and path.is_file() and path.stat().st_size > most:
                raise AdapterFileError(
                    f"{path} has more than {most:,} bytes. It is damaged: download it again."
                )
            if path.name == _TOKENIZER_CONFIG and path.is_file():
                _check_token_counts(path)


def _check_token_counts(path: Path) -> None:
    config = read_json(path)
    for key in _COUNTS_TOKENS:
        count = config.get(key)
        if isinstance(count, int) and not 0 <= count <= _MOST_MADE_TOKENS:
            raise AdapterFileError(
                f"{path}: its {key} is {count}; it must be from 0 to {_MOST_MADE_TOKENS}. It is "
                "damaged: download it again."
            )


def check_weight_files(
    folder: Path, variant: str | None = None, left_out: Collection[str] = ()
) -> None:
    """Check a pipeline's text files and the headers of its weights, before a library opens them.

    Args:
        left_out: components that are not read.

    Raises:
        AdapterFileError: a file cannot be read or is too large, the files do not match the index of
            a model, or a config asks for an impossible number of layers.
    """
    check_sizes(folder, left_out)
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        if part.name in left_out:
            continue
        if (config := part / MODEL_CONFIG).exists():
            check_depth(read_json(config), str(config))
        files = weight_files(part, variant)
        if len(files) == 1:  # the headers of several were compared with their index
            read_header(files[0])


def check_depth(config: object, where: str) -> None:
    """Check the numbers of layers in a model's config: building a billion layers never ends.

    Args:
        where: the config's name, for errors.

    Raises:
        AdapterFileError: a number is not from 0 to ``MOST_LAYERS``.
    """
    entries = list(config.items()) if isinstance(config, Mapping) else []
    while entries:
        key, value = entries.pop()
        if isinstance(value, Mapping):
            entries += value.items()
        elif isinstance(value, (list, tuple)):
            entries += [(key, item) for item in value]
        elif not (isinstance(value, int) and _COUNTS_LAYERS.search(str(key))):
            continue
        elif not 0 <= value <= MOST_LAYERS:
            raise AdapterFileError(
                f"{where}: its {key} is {value}; it must be from 0 to {MOST_LAYERS}. The config is "
                "damaged: download it again."
            )


def _is_shard_name(name: str) -> bool:
    """Whether it is the name of a safetensors file without a folder, on any system."""
    return name.endswith(".safetensors") and name.isprintable() and not set(name) & set("/\\:")


def read_pipeline_index(folder: Path) -> dict[str, Any]:
    """Read the index of a pipeline in its folder.

    Raises:
        AdapterFileError: it cannot be read, or the name of a component cannot be an attribute, such
            as a path.
    """
    index = read_json(folder / PIPELINE_INDEX)
    if wrong := [repr(name) for name in index if not name.isidentifier()]:
        raise AdapterFileError(
            f"{folder / PIPELINE_INDEX}: {first_few(wrong)} cannot be the name of a component. "
            "Names may only contain letters, digits and underscores."
        )
    return index


def native_side(folder: Path, family: ModelFamily) -> int | None:
    """Return pixels per side of a base's images, as ``ModelFamily.native_resolution`` does.

    None if the configs in its folder do not tell.
    """
    try:
        size = read_json(folder / family.denoiser / MODEL_CONFIG).get("sample_size")
        if not isinstance(size, int):
            return family.default_resolution
        blocks = read_json(folder / "vae" / MODEL_CONFIG).get("block_out_channels")
    except AdapterFileError:
        return None
    return size * 2 ** (len(blocks) - 1) if isinstance(blocks, list) and blocks else None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        AdapterFileError: the file cannot be read as one.
    """
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path} cannot be read as JSON: {error}.") from error
