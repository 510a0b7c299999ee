"""Plan the tensors of a fused file and their sources, from headers alone.

Everything that does not fit is reported here, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.io.tensor_files import StoredTensor
from gralora_diffusion.key_maps import KeyMapError, Part, Shape

from .adapter_layers import AdapterLayers, LayerUpdate
from .bases import BaseError, FileBase, FolderBase
from .streaming import OutputTensor, Piece, RowUpdate

_SHOWN = 8
#: A tensor of the output and the component that it belongs to; "" if to none.
Owned = tuple[str, OutputTensor]


@dataclass(frozen=True)
class UpdateRows:
    """A layer's update, or its transpose, from row ``first`` on. Each use creates a new one."""

    update: LayerUpdate
    first: int
    transposed: bool

    def add_to(self, target: Tensor, start: int) -> None:
        if not self.transposed:
            self.update.add_to(target, self.first + start)
            return
        whole = torch.zeros(self.update.shape)
        self.update.add_to(whole, 0)
        first = self.first + start
        target += whole.mT[first : first + len(target)]


@dataclass
class Planner:
    """Assigns an adapter's values to pieces of the output, and records which ones are used.

    Attributes:
        layers: component -> the adapter's part for it.
        used: component -> names that were assigned.
        problems: descriptions of everything that does not fit.
    """

    layers: Mapping[str, AdapterLayers]
    used: dict[str, set[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def piece(
        self,
        component: str,
        name: str,
        part: Part,
        full: Shape,
        source: StoredTensor,
        start: int | None = None,
    ) -> Piece:
        """Return the piece for a part of an original tensor.

        Args:
            name: canonical key of the diffusers tensor.
            part: the rows of the diffusers tensor.
            full: shape of the diffusers tensor.
            source: the tensor with these rows: the diffusers tensor, or the original one.
            start: the first of these rows in the original tensor. None means that the source is
                the diffusers tensor.
        """
        layers = self.layers.get(component, AdapterLayers())
        turned = part.transposed and start is None
        start = part.start if start is None else start
        stop = start + part.stop - part.start
        if name in layers.replaced:
            self.used.setdefault(component, set()).add(name)
            value = layers.replaced[name]
            if tuple(value.shape) != full:
                self.problems.append(
                    f"{component}: {name} has shape {tuple(value.shape)}, but the base has {full}"
                )
            value = value.mT if part.transposed else value
            return Piece(value, part.start, part.stop)
        path = name.removesuffix(".weight")
        update = layers.updates.get(path) if path != name else None
        if update is None:
            return Piece(source, start, stop, turned)
        self.used.setdefault(component, set()).add(path)
        if update.shape != full:
            self.problems.append(
                f"{component}: the update of {path} has shape {update.shape}, but its weight in "
                f"the base has {full}"
            )

        def make() -> RowUpdate:
            # a copy, so that its cached rows are freed with it
            return UpdateRows(replace(update), part.start, part.transposed)

        return Piece(source, start, stop, turned, make)

    def check(self, where: str, misses: Mapping[str, str]) -> None:
        """Raise AdapterFileError unless all of the adapter was used and fits.

        Args:
            misses: component that is not in the base or output -> advice for it.
        """
        for component, layers in self.layers.items():
            if component in misses:
                self.problems.append(
                    f"the adapter has weights for {component}. {misses[component]}"
                )
                continue
            unused = {*layers.updates, *layers.replaced} - self.used.get(component, set())
            if unused:
                self.problems.append(f"{component}: the base has no {first_few(sorted(unused))}")
        if self.problems:
            lines = "\n".join(f"  {problem}" for problem in self.problems[:_SHOWN])
            if len(self.problems) > _SHOWN:
                lines += (
                    f"\n  and {len(self.problems) - _SHOWN} more. The base may have other widths"
                )
            raise AdapterFileError(f"the adapter does not fit {where}:\n{lines}")


def plan_from_file(base: FileBase, planner: Planner, denoiser_only: bool) -> list[Owned]:
    """Return the tensors of a file of the same kind as the base."""
    outputs: list[Owned] = []
    places = {
        base.prefixes[component] + tensor.key: (component, tensor.parts, full)
        for component in base.key_maps
        for tensor, full in base.read(component)
    }
    denoiser = base.family.denoiser
    for key, stored in base.tensors.items():
        component, parts, shapes = places.get(key, (_owner(base, key), (), []))
        if denoiser_only and component != denoiser:
            continue
        pieces, first = [], 0
        for part, full in zip(parts, shapes, strict=True):
            pieces.append(planner.piece(component, part.key, part, full, stored, first))
            first += part.stop - part.start
        if not pieces:
            pieces = [Piece(stored, 0, stored.shape[0] if stored.shape else 1)]
        name = key.removeprefix(base.prefixes[denoiser]) if denoiser_only else key
        outputs.append((component, OutputTensor(name, stored.shape, stored.dtype, tuple(pieces))))
    misses = dict.fromkeys(set(base.family.components) - set(base.key_maps), base.misses)
    if denoiser_only:
        misses = dict.fromkeys(set(base.family.components) - {denoiser}, _NOT_HELD)
    planner.check(str(base.path), misses)
    return outputs


def _owner(base: FileBase, key: str) -> str:
    """Return the component with the longest prefix that a key starts with; "" if there is none."""
    owners = [(len(p), name) for name, p in base.prefixes.items() if key.startswith(p)]
    return max(owners)[1] if owners else ""


def plan_original(base: FolderBase, planner: Planner, denoiser_only: bool) -> list[Owned]:
    """Return the tensors of an original file for a pipeline in diffusers' layout.

    Raises:
        BaseError: the original layout cannot represent a tensor, or a component is missing.
    """
    family, outputs = base.family, list[Owned]()
    components = [family.denoiser] if denoiser_only else list(family.original_key_maps)
    missing = [name for name in components if name not in base.tensors]
    if needed := [name for name in missing if name not in family.optional_text_encoders]:
        raise BaseError(
            f"{base.path} does not contain {', '.join(needed)}, which a full file needs. Pass the "
            "whole pipeline, or export the denoiser alone"
        )
    for component in components:
        stored = base.tensors.get(component)
        if stored is None:
            continue
        shapes = {key: tensor.shape for key, tensor in stored.items()}
        key_map = family.find_key_map(component, shapes)
        if key_map is None:
            raise BaseError(f"{base.path}: no original layout is known for this {component}")
        try:
            tensors = key_map.lay_out(shapes)
        except KeyMapError as error:
            raise BaseError(
                f"{base.path}: this {component} cannot be written in the original layout: {error}"
            ) from error
        prefix = "" if denoiser_only else key_map.prefixes[0]
        for tensor in tensors:
            pieces = tuple(
                planner.piece(
                    component,
                    key_map.canonical(part.key),
                    part,
                    shapes[part.key],
                    stored[part.key],
                )
                for part in tensor.parts
            )
            dtype = stored[tensor.parts[0].key].dtype
            output = OutputTensor(prefix + tensor.key, tensor.shape, dtype, pieces)
            outputs.append((component, output))
    empty = Piece(torch.empty(0), 0, 0)
    for key in family.original_marks(base.scheduler):
        outputs.append(("", OutputTensor(key, (0,), torch.float32, (empty,))))
    misses = dict.fromkeys(set(family.components) - set(components), _NOT_HELD)
    misses |= dict.fromkeys(missing, base.misses)
    planner.check(str(base.path), misses)
    return outputs


_NOT_HELD = (
    "This file would not contain it: export a diffusers folder, a LoRA, or an adapter without it"
)


def plan_folder(base: FolderBase, planner: Planner) -> dict[Path, list[Owned]]:
    """Return weight file -> its tensors, for every shard of a folder in diffusers' layout."""
    planned: dict[Path, list[Owned]] = {}
    for component, tensors in base.tensors.items():
        for key, stored in tensors.items():
            part = Part(key, 0, stored.shape[0] if stored.shape else 1)
            name = base.family.canonical(component, key)
            piece = planner.piece(component, name, part, stored.shape, stored)
            output = OutputTensor(key, stored.shape, stored.dtype, (piece,))
            planned.setdefault(stored.path, []).append((component, output))
    absent = set(base.family.components) - set(base.files)
    planner.check(str(base.path), dict.fromkeys(absent, base.misses))
    return planned
