"""The safetensors files at a path, with their headers."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gralora_diffusion.base_models.folder import (
    MODEL_CONFIG,
    read_json,
    read_pipeline_index,
    shards,
    weight_files,
)
from gralora_diffusion.io.arrays import StoredArray, stored_array
from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.io.file_names import (
    PEFT_CONFIG_NAME,
    PEFT_WEIGHTS_NAME,
    PIPELINE_INDEX,
    WEIGHTS_NAME,
    no_such,
)
from gralora_diffusion.io.tensor_files import SUB_BYTE, StoredTensor, read_header

#: Ending of the index of a model that is split into several files.
SHARD_INDEX = ".safetensors.index.json"


class Source:
    """A file, or the files of a folder. Tensors are only read by :meth:`read`.

    Attributes:
        path: the path that was passed.
        files: the files with tensors.
        headers: key -> header. In a folder of several models, the key starts with the name of the
            model's own folder.
        metadata: the metadata of all headers in one mapping.
        configs: JSON of ``adapter_config.json``, ``model_index.json`` or ``config.json``, by the
            name of the model's own folder; the folder itself has the empty name.
        is_pipeline: whether it is a folder of models with their index.

    Raises:
        AdapterFileError: the path does not exist, or has no complete safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self.headers: dict[str, StoredTensor] = {}
        self.metadata: dict[str, str] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.is_pipeline = False
        self.files: list[Path] = []
        self._opened: dict[Path, Any] = {}
        for file, prefix in self._find_files():
            self._open(file, prefix)
        if not self.headers:
            raise self.error("it contains no tensors")

    def read(self, key: str) -> StoredArray:
        """Read one tensor.

        Raises:
            AdapterFileError: torch does not have the tensor's dtype.
        """
        header = self.headers[key]
        if header.dtype_name in SUB_BYTE:
            raise self.error(f"{key} is stored as {header.dtype_name}, which torch cannot read")
        if header.path not in self._opened:
            with open(header.path, "rb") as file:
                self._opened[header.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return stored_array(header, self._opened[header.path])

    def sha256(self) -> dict[str, str]:
        """Return file name -> hash of the whole file."""
        hashes = {}
        for file in self.files:
            digest = hashlib.sha256()
            with open(file, "rb") as opened:
                while block := opened.read(1 << 24):
                    digest.update(block)
            name = file.relative_to(self.path) if self.path.is_dir() else file.name
            hashes[str(name)] = digest.hexdigest()
        return hashes

    def error(self, problem: str) -> AdapterFileError:
        return AdapterFileError(f"{self.path}: {problem}.")

    # -- finding files -----------------------------------------------------------------------------

    def _find_files(self) -> Iterator[tuple[Path, str]]:
        """Yield files and the prefixes of their keys."""
        path = self.path
        if path.is_file():
            files = shards(path) if path.name.endswith(SHARD_INDEX) else [path]
            if path.name == PEFT_WEIGHTS_NAME and path.with_name(PEFT_CONFIG_NAME).is_file():
                self.configs[""] = read_json(path.with_name(PEFT_CONFIG_NAME))
            elif (config := path.parent / MODEL_CONFIG).is_file():
                self.configs[""] = read_json(config)
            yield from ((file, "") for file in files)
        elif not path.is_dir():
            raise AdapterFileError(f"{path}: {no_such(path)}")
        elif (path / WEIGHTS_NAME).is_file():
            yield path / WEIGHTS_NAME, ""
        elif (path / PEFT_CONFIG_NAME).is_file():
            yield self._peft(path, ""), ""
        elif parts := sorted(path.glob(f"*/{PEFT_CONFIG_NAME}")):
            for config in parts:
                name = config.parent.name
                yield self._peft(config.parent, name), f"{name}."
        elif (path / PIPELINE_INDEX).is_file():
            self.is_pipeline, self.configs[""] = True, read_pipeline_index(path)
            for name, value in self.configs[""].items():
                if isinstance(value, list) and (path / name).is_dir():
                    yield from ((file, f"{name}.") for file in self._model(path / name))
        else:
            if (path / MODEL_CONFIG).is_file():
                self.configs[""] = read_json(path / MODEL_CONFIG)
            files = self._model(path)
            if not files:
                raise self.error("this folder contains no .safetensors file")
            if len(files) > 1 and not list(path.glob(f"*{SHARD_INDEX}")):
                names = ", ".join(file.name for file in files)
                raise self.error(f"this folder contains several files ({names}). Pass one of them")
            yield from ((file, "") for file in files)

    def _peft(self, folder: Path, name: str) -> Path:
        self.configs[name] = read_json(folder / PEFT_CONFIG_NAME)
        file = folder / PEFT_WEIGHTS_NAME
        if not file.is_file():
            others = ", ".join(path.name for path in folder.glob("adapter_model.*")) or "nothing"
            raise self.error(
                f"{PEFT_CONFIG_NAME} needs {file.name} beside it; found {others} instead"
            )
        return file

    def _model(self, folder: Path) -> list[Path]:
        """Return the files of one model; of several variants, the one without a variant name."""
        files = [file for file in weight_files(folder) if file.suffix == ".safetensors"]
        return files or sorted(folder.glob("*.safetensors"))

    # -- headers -----------------------------------------------------------------------------------

    def _open(self, file: Path, prefix: str) -> None:
        tensors, metadata = read_header(file)
        self.headers |= {prefix + key: tensor for key, tensor in tensors.items()}
        self.metadata |= metadata
        self.files.append(file)
