"""The base that an adapter is fused into: an original single file, or a diffusers folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils.hub_utils import _add_variant

from gralora_diffusion.base_models.folder import (
    MODEL_CONFIG,
    WEIGHT_NAMES,
    read_json,
    read_pipeline_index,
    weight_files,
)
from gralora_diffusion.base_models.single_file_header import OriginalFile
from gralora_diffusion.families import ModelFamily, PublishedNames, find_family, list_families
from gralora_diffusion.io.file_names import PIPELINE_INDEX, looks_like_hub_id, no_such
from gralora_diffusion.io.hub import fetch
from gralora_diffusion.io.tensor_files import StoredTensor, read_header
from gralora_diffusion.key_maps import KeyMap, OriginalTensor, Shape

from .tensor_bytes import count


class BaseError(ValueError):
    """An adapter cannot be fused into this base."""


@dataclass(frozen=True)
class FileBase:
    """An original single file.

    Attributes:
        tensors: the tensors in the file by key.
        key_maps: key maps of the components in the file.
        prefixes: prefixes of their keys.
    """

    path: Path
    family: ModelFamily
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    key_maps: dict[str, KeyMap] = field(default_factory=dict)
    prefixes: dict[str, str] = field(default_factory=dict)

    def shapes(self, component: str) -> dict[str, Shape]:
        """Shapes of a component's tensors, by key without the prefix."""
        prefix = self.prefixes[component]
        return {
            key.removeprefix(prefix): tensor.shape
            for key, tensor in self.tensors.items()
            if key.startswith(prefix)
        }

    def read(self, component: str) -> list[tuple[OriginalTensor, list[Shape]]]:
        """Return a component's tensors, each with the shapes of its parts' diffusers tensors."""
        tensors = []
        for tensor in self.key_maps[component].read(self.shapes(component)):
            rows: dict[str, int] = {}
            for part in tensor.parts:
                rows[part.key] = max(rows.get(part.key, 0), part.stop)
            rest = tensor.shape[1:]
            full = [
                (*rest, rows[part.key]) if part.transposed else (rows[part.key], *rest)
                for part in tensor.parts
            ]
            tensors.append((tensor, full))
        return tensors

    def canonical_shapes(self, component: str) -> dict[str, Shape]:
        """Shapes of a component's tensors by diffusers' canonical keys."""
        if component not in self.key_maps:
            return {}
        return {
            part.key: shape
            for tensor, full in self.read(component)
            for part, shape in zip(tensor.parts, full, strict=True)
        }

    @property
    def denoiser_dtype(self) -> torch.dtype:
        """The dtype of most of the denoiser's values."""
        prefix = self.prefixes[self.family.denoiser]
        return _most_common_dtype(t for key, t in self.tensors.items() if key.startswith(prefix))

    @property
    def misses(self) -> str:
        """Advice for a component that is not in the file."""
        if set(self.key_maps) == set(self.family.original_key_maps):
            return (
                f"Its place in a single file of {self.family.name} is not known. Export a "
                "diffusers folder, or a LoRA in style comfyui"
            )
        return (
            f"{self.path} only contains {', '.join(self.key_maps)}. Pass the full checkpoint, or "
            "the folder or Hub id of the pipeline"
        )


@dataclass(frozen=True)
class FolderBase:
    """A pipeline in diffusers' layout.

    Attributes:
        tensors: component -> the tensors of all its shards, by the keys of the files.
        files: component -> weight files, and the index of shards if there is one.
        index: content of ``model_index.json``.
    """

    path: Path
    family: ModelFamily
    index: dict[str, Any]
    tensors: dict[str, dict[str, StoredTensor]]
    files: dict[str, list[Path]]

    def published_names(self) -> PublishedNames:
        """Return the names of this base in other programs."""
        denoiser = _json(self.path / self.family.denoiser / MODEL_CONFIG)
        return self.family.published_names(denoiser, self.scheduler)

    @property
    def scheduler(self) -> dict[str, Any]:
        """The scheduler's config."""
        return _json(self.path / "scheduler" / "scheduler_config.json")

    def canonical_shapes(self, component: str) -> dict[str, Shape]:
        """Shapes of a component's tensors by diffusers' canonical keys."""
        held = self.tensors.get(component, {})
        return {self.family.canonical(component, key): t.shape for key, t in held.items()}

    @property
    def denoiser_dtype(self) -> torch.dtype:
        """The dtype of most of the denoiser's values."""
        return _most_common_dtype(self.tensors[self.family.denoiser].values())

    @property
    def misses(self) -> str:
        """Advice for a component that is not in the folder."""
        return f"{self.path} only contains {', '.join(self.tensors)}. Pass the whole pipeline"


Base = FileBase | FolderBase


def _most_common_dtype(tensors: Iterable[StoredTensor]) -> torch.dtype:
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += count(tensor.shape)
    return counts.most_common(1)[0][0]


def open_base(
    source: str | os.PathLike[str],
    *,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    denoiser_only: bool = False,
) -> Base:
    """Read the headers of a base: a single file, a diffusers folder or a Hub id.

    Args:
        variant: variant of the weight files in a folder, such as fp16.
        denoiser_only: only the denoiser is needed; the rest may be quantized or missing.

    Raises:
        BaseError: nothing was found, the family is not supported, the weights are not safetensors,
            or the base is quantized.
        OriginalFileError: the single file is not a base.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _open_file(path, denoiser_only)
    if not path.exists():
        if not looks_like_hub_id(str(source)):
            raise BaseError(f"{source}: {no_such(Path(source))}")
        path = _download(str(source), variant, revision, cache_dir)
    return _open_folder(path, variant, denoiser_only)


def _open_file(path: Path, denoiser_only: bool) -> FileBase:
    file = OriginalFile(path)
    family = file.find_family(any_task=True, denoiser_only=denoiser_only)
    base = FileBase(path, family, dict(file.tensors), dict(file.metadata))
    for component, key_maps in family.original_key_maps.items():
        for key_map in key_maps:
            is_denoiser = component == family.denoiser
            prefix = file.prefix if is_denoiser else key_map.begins(file.tensors)
            if prefix is not None:
                base.key_maps[component], base.prefixes[component] = key_map, prefix
                break
    return base


def _open_folder(path: Path, variant: str | None, denoiser_only: bool) -> FolderBase:
    if not (path / PIPELINE_INDEX).is_file():
        raise BaseError(
            f"{path} contains no {PIPELINE_INDEX}. Pass the folder of a whole pipeline as "
            "save_pretrained writes it, or an original .safetensors file"
        )
    index = read_pipeline_index(path)
    pipeline = getattr(diffusers, str(index.get("_class_name")), None)
    family = find_family(pipeline) if pipeline else None
    if family is None:
        raise BaseError(
            f"{path}: {index.get('_class_name')} does not belong to a supported family "
            f"({', '.join(list_families())})"
        )
    base = FolderBase(path, family, index, {}, {})
    wanted = (family.denoiser,) if denoiser_only else (*family.components, "vae")
    for name, value in index.items():
        existing_models = isinstance(value, list) and None not in value and (path / name).is_dir()
        if existing_models and name in wanted:
            files = _weight_files(path / name, variant)
            base.files[name] = files
            base.tensors[name] = {}
            for file in files:
                if file.suffix == ".safetensors":
                    base.tensors[name] |= read_header(file)[0]
    if family.denoiser not in base.tensors:
        raise BaseError(f"{path}: it has no {family.denoiser}")
    return base


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the weight files of a component with all its shards."""
    config = _json(folder / MODEL_CONFIG)
    if "quantization_config" in config:
        raise BaseError(
            f"{folder}: this is a quantized base, and rounding would lose the update that is added "
            "to it. Pass the base in 16 or 32 bits: the adapter fits it too. If the denoiser is "
            "not quantized, --denoiser_only exports it from this base"
        )
    if files := weight_files(folder, variant):
        return files
    found = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    names = " or ".join(_add_variant(names[0], variant) for names in WEIGHT_NAMES)
    raise BaseError(
        f"{folder} contains no {names}"
        + (f" (it contains {', '.join(found)}; is it another --variant?)" if found else "")
        + ". Weights must be safetensors: load the pipeline once and save it with save_pretrained"
    )


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _download(
    repository: str, variant: str | None, revision: str | None, cache_dir: str | None
) -> Path:
    """Fetch a pipeline's configs and tokenizers, then only the weights of this variant."""

    def fetched(patterns: Iterable[str]) -> Path:
        try:
            return fetch(repository, patterns, revision=revision, cache_dir=cache_dir)
        except OSError as error:
            raise BaseError(f"{repository}: {error}") from error

    fetched([PIPELINE_INDEX, "*/*.json", "*/*.txt", "*/*.model"])
    ending = f".{variant}" if variant else ""
    stems = [name.removesuffix(".safetensors") for name, _ in WEIGHT_NAMES]
    return fetched(
        pattern
        for stem in stems
        for pattern in (f"*/{stem}{ending}.safetensors", f"*/{stem}{ending}-*-of-*.safetensors")
    )
