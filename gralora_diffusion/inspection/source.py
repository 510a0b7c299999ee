"""What lies at a path: safetensors files with their headers, or why it cannot be looked at."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ..file_names import PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME, WEIGHTS_NAME
from ..tensor_files import AdapterFileError

if TYPE_CHECKING:
    from torch import Tensor

#: What diffusers calls the index of a pipeline and the config of a model.
PIPELINE_INDEX, MODEL_CONFIG = "model_index.json", "config.json"
#: How the index of a model in several files ends.
SHARD_INDEX = ".safetensors.index.json"
_CANONICAL = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_PICKLE = (
    "a pickle (.ckpt, .pt, .bin), which may run any program when it is read, so it was not read. "
    "Convert it to .safetensors in a place where that does no harm"
)
#: How files begin that are something else.
_OTHER_FILES = {
    b"PK\x03\x04": _PICKLE,
    b"\x80\x02": _PICKLE,
    b"\x80\x04": _PICKLE,
    b"GGUF": "a GGUF file, whose weights are quantized: they can be neither adapted nor fused. "
    "Give the .safetensors file that it was made of",
    b"<": "a web page in place of the file. Download it again, logged in if the site asks for it",
    b"version https://git-lfs": "a pointer of Git LFS in place of the file. Fetch it with "
    "`git lfs pull`",
}


class Header(NamedTuple):
    """What a file says of one tensor: where it is, its key there, its dtype and shape."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]


class Source:
    """A file, or the files of a folder. Tensors are only read by :meth:`read`.

    Attributes:
        path: as given.
        files: those that hold tensors.
        headers: key -> header. In a folder of several models, the name of a model's own folder
            stands in front of the key.
        metadata: what the headers of all files say besides, in one.
        configs: JSON of ``adapter_config.json``, ``model_index.json`` or ``config.json``, by the
            name of the model's own folder; empty for the folder itself.
        is_pipeline: a folder of models with their index.

    Raises:
        AdapterFileError: nothing there, no safetensors file, or not a whole one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self.headers: dict[str, Header] = {}
        self.metadata: dict[str, str] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.is_pipeline = False
        self.files: list[Path] = []
        self._opened: dict[Path, Any] = {}
        for file, prefix in self._find_files():
            self._open(file, prefix)
        if not self.headers:
            raise self.error("no tensors in it")

    def read(self, key: str) -> Tensor:
        """Read one tensor."""
        file, name = self.headers[key][:2]
        if file not in self._opened:
            self._opened[file] = safe_open(file, framework="pt")
        tensor: Tensor = self._opened[file].get_tensor(name)
        return tensor

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
        """Yield files and what goes in front of their keys."""
        path = self.path
        if path.is_file():
            files = self._shards(path) if path.name.endswith(SHARD_INDEX) else [path]
            if (config := path.parent / MODEL_CONFIG).is_file():
                self.configs[""] = self._json(config)
            yield from ((file, "") for file in files)
        elif not path.is_dir():
            raise self.error("no such file or folder")
        elif (path / WEIGHTS_NAME).is_file():
            yield path / WEIGHTS_NAME, ""
        elif (path / PEFT_CONFIG_NAME).is_file():
            yield self._peft(path, ""), ""
        elif parts := sorted(path.glob(f"*/{PEFT_CONFIG_NAME}")):
            for config in parts:
                name = config.parent.name
                yield self._peft(config.parent, name), f"{name}."
        elif (path / PIPELINE_INDEX).is_file():
            self.is_pipeline, self.configs[""] = True, self._json(path / PIPELINE_INDEX)
            for name, value in self.configs[""].items():
                if isinstance(value, list) and (path / name).is_dir():
                    yield from ((file, f"{name}.") for file in self._model(path / name))
        else:
            if (path / MODEL_CONFIG).is_file():
                self.configs[""] = self._json(path / MODEL_CONFIG)
            files = self._model(path)
            if not files:
                raise self.error("no .safetensors file in this folder")
            if len(files) > 1 and not list(path.glob(f"*{SHARD_INDEX}")):
                names = ", ".join(file.name for file in files)
                raise self.error(f"several files in this folder ({names}). Name one of them")
            yield from ((file, "") for file in files)

    def _peft(self, folder: Path, name: str) -> Path:
        self.configs[name] = self._json(folder / PEFT_CONFIG_NAME)
        file = folder / PEFT_WEIGHTS_NAME
        if not file.is_file():
            others = ", ".join(path.name for path in folder.glob("adapter_model.*")) or "nothing"
            raise self.error(f"{PEFT_CONFIG_NAME} without {file.name} beside it, but {others}")
        return file

    def _model(self, folder: Path) -> list[Path]:
        """The files of one model; of several variants of it the one without a name of its own."""
        for index in sorted(folder.glob(f"*{SHARD_INDEX}"), key=lambda path: len(path.name)):
            return self._shards(index)
        for name in _CANONICAL:
            if (folder / name).is_file():
                return [folder / name]
        return sorted(folder.glob("*.safetensors"))

    def _shards(self, index: Path) -> list[Path]:
        names = self._json(index).get("weight_map", {}).values()
        files = [index.parent / name for name in sorted(set(names))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise self.error(f"{index.name} names files that lack: {', '.join(missing)}")
        return files

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return dict(values)
        except (OSError, ValueError, TypeError) as error:
            raise AdapterFileError(f"{path}: not readable as JSON: {error}.") from error

    # -- headers -----------------------------------------------------------------------------------

    def _open(self, file: Path, prefix: str) -> None:
        try:
            opened = safe_open(file, framework="np")  # torch takes seconds to import
            metadata = opened.metadata()
            for key in opened.keys():  # noqa: SIM118
                tensor = opened.get_slice(key)
                header = Header(file, key, tensor.get_dtype(), tuple(tensor.get_shape()))
                self.headers[prefix + key] = header
        except (SafetensorError, OSError) as error:
            raise AdapterFileError(f"{file}: {self._why_unreadable(file, error)}.") from error
        self.files.append(file)
        self.metadata |= metadata or {}

    def _why_unreadable(self, file: Path, error: Exception) -> str:
        size = file.stat().st_size
        if not size:
            return "an empty file"
        with open(file, "rb") as opened:
            beginning = opened.read(64)
        for start, what in _OTHER_FILES.items():
            if beginning.startswith(start):
                return what
        declared = int.from_bytes(beginning[:8], "little")
        if beginning[8:9] == b"{" and declared < 1 << 30:
            return (
                f"a damaged or truncated .safetensors file of {size:,} bytes ({error}). Fetch or "
                "copy it again"
            )
        return f"not a .safetensors file ({size:,} bytes; {error})"
