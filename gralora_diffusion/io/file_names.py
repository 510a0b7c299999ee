"""Names of adapter files, prefixes of their keys, the form of Hub ids, and paths near others."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

#: The native file, and the field of its metadata that describes the adapter.
WEIGHTS_NAME = "pytorch_gralora_weights.safetensors"
METADATA_KEY = "gralora_adapter_metadata"
#: Metadata of an exported file: JSON on the adapter and the export.
SOURCE_KEY = "gralora_source"
#: Its field for the number by which the blocks of a UNet are counted in the file's names.
LAYERS_PER_BLOCK_KEY = "layers_per_block"
#: Field in an adapter's header: what its control images were reduced to, in pixels per side.
CONTROL_RESOLUTION = "gralora_control_resolution"
#: The folder in a run's output folder with the adapter of its best measurement.
BEST_NAME = "best"
#: The files of PEFT's folder (``peft.utils.constants``), and the prefix of their keys.
PEFT_CONFIG_NAME = "adapter_config.json"
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
#: The file that every folder of a pipeline in diffusers' layout contains.
PIPELINE_INDEX = "model_index.json"
#: What to do with an address in place of a path.
ADDRESS = "this is an address. Give the Hub id (owner/name), or download the file and give its path"
#: An address, also as ``Path`` writes it; not the drive of a Windows path.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
#: A variable of a shell: $HOME, ${HOME}, %USERPROFILE%.
_VARIABLE = re.compile(r"\$\w+|\$\{\w+\}|%\w+%")


def looks_like_hub_id(text: str, bare: bool = False) -> bool:
    """Whether a string that is not a local path has the form ``owner/name``.

    Args:
        bare: a ``name`` alone counts, too, as of old models of transformers and data sets.
    """
    return (
        text.count("/") in ((0, 1) if bare else (1,))
        and not text.startswith((".", "/", "~"))
        and "\\" not in text
        and not text.endswith((".safetensors", ".bin", ".pt", ".ckpt", "/"))
    )


def nearby(path: Path) -> str:
    """Say what there is in place of a missing path: a similar name, or which part is missing."""
    if hint := _misread(str(path)):
        return f". {hint}"
    parent = path.parent
    if not parent.is_dir():
        return f", not even the folder {str(parent)!r}"
    try:
        names = [entry.name for entry in parent.iterdir()]
    except OSError:
        return ""
    nearest = difflib.get_close_matches(path.name, names, n=1)
    return f". Did you mean {str(parent / nearest[0])!r}?" if nearest else f" in {str(parent)!r}"


def _misread(text: str) -> str | None:
    """Say why a missing path cannot be what its user meant by it."""
    if _ADDRESS.match(text):
        return "This is an address. Download it, and give the path of the file or folder"
    if variable := _VARIABLE.search(text):
        return (
            f"The variable {variable[0]} was not replaced. A shell only does so outside of single "
            "quotes, and nothing does so in a file. Write out the path"
        )
    if text[0] in "\"'" or text[-1] in "\"'":
        return "Its quotes are part of the name. Leave them out"
    if os.sep == "/" and "\\" in text:
        return "Write / between folders. A path on Windows does not exist here"
    return None


def no_such(path: Path) -> str:
    """Say that a path is missing, and what there is in its place."""
    text = f"no such file or folder{nearby(path)}"
    return text if text.endswith("?") else f"{text}."


def missing_problem(source: str | os.PathLike[str], bare: bool = False) -> str | None:
    """Return why a source is neither a local path nor may be a Hub id; None if it is or may be."""
    path = Path(source).expanduser()
    if path.exists() or looks_like_hub_id(str(source), bare):
        return None
    return f"{ADDRESS}." if "://" in str(source) else no_such(path)


def missing_base_problem(source: str | os.PathLike[str]) -> str | None:
    """Return why a source cannot be a base: it is missing, or a folder without a pipeline."""
    path = Path(source).expanduser()
    if os.path.isdir(path) and not (path / PIPELINE_INDEX).is_file():
        return (
            f"this folder contains no {PIPELINE_INDEX}, which the folder of a whole pipeline has. "
            "Give such a folder, or a Hub id"
        )
    return missing_problem(source)


def public_name(source: str) -> str:
    """Return the last part of a local path, and a Hub id unchanged."""
    path = Path(source)
    local = path.exists() or path.is_absolute() or len(path.parts) != 2
    return real_path(path).name if local else source


def real_path(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path without links; a link that leads to itself stays.

    ``Path.resolve`` raises a RuntimeError for such a link before Python 3.13, and an OSError since.
    """
    return Path(os.path.realpath(path))
