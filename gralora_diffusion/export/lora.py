"""Export the adapter as an ordinary LoRA file, exact or truncated, with names of each reader."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import reduce
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from gralora_diffusion.adapters.adapter_file import Adapter, read_adapter
from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.dtypes import short_name, torch_dtype
from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.io.file_names import LAYERS_PER_BLOCK_KEY
from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.io.staging import check_output, staged
from gralora_diffusion.io.tensor_files import write_safetensors
from gralora_diffusion.key_maps import Shape
from gralora_diffusion.lora_files.low_rank import truncate

from .adapter_layers import (
    AdapterLayers,
    adapter_layers,
    adapts_denoiser_only,
    find_adapter_family,
)
from .bases import Base, FileBase, FolderBase, open_base
from .choices import LORA_DTYPE_CHOICES, READERS, STYLES
from .metadata import export_metadata
from .names import Names, Pair, StyleError, find_names

_SHOWN = 20
LORA_DTYPES = {name: torch_dtype(name) for name in LORA_DTYPE_CHOICES if name != "keep"}


@dataclass
class LoraReport:
    """The content of an exported LoRA file.

    Attributes:
        ranks: name in the file -> rank.
        errors: component and path -> the part of the update lost by truncation, relative to the
            layer's update (Frobenius norms). It is zero if the layer is exact.
        dtype: dtype of the factors.
        unread: names that ComfyUI would ignore, in a file with diffusers' names.
    """

    path: Path
    style: str
    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    unread: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        size = self.path.stat().st_size / 2**20
        lines = [f"{self.path}: {len(self.ranks)} layers in {self.style} names, {size:.1f} MiB"]
        different = sorted({rank for rank in self.ranks.values() if rank})
        if different:
            text = f"{different[0]}" + (f" to {different[-1]}" if len(different) > 1 else "")
            lines[0] += f", rank {text}"
        if worst := max(self.errors.values(), default=0.0):
            worst_first = sorted(self.errors.items(), key=lambda item: -item[1])
            mean = sum(self.errors.values()) / len(self.errors)
            lines.append(
                f"lost by truncation, relative to each layer's update: {worst:.2%} at most, "
                f"{mean:.2%} on average over {len(self.errors)} layers"
            )
            lines += [f"  {error:8.2%}  {layer}" for layer, error in worst_first[:_SHOWN]]
            if len(worst_first) > _SHOWN:
                lines.append(f"  {len(worst_first) - _SHOWN} layers lose less")
        elif self.errors:
            lines.append("exact: the same update")
        if self.dtype != torch.float32 and self.errors:
            rounded = torch.finfo(self.dtype).eps / 2
            lines[-1] += (
                f", except that factors are rounded to {short_name(self.dtype)} (relative error up "
                f"to {rounded:.1g})"
            )
        return "\n".join([*lines, *self._readers()])

    def _readers(self) -> list[str]:
        """Return who reads the file, and who reads only a part of it."""
        if not self.errors:  # dense updates
            return [f"for {READERS['comfyui']}"]
        others = ""
        if self.style == "kohya":
            others = ". diffusers reads only a part of it, or nothing: use --style diffusers for it"
        elif self.unread:
            others = (
                f". ComfyUI would silently ignore {len(self.unread)} of these {len(self.ranks)} "
                f"layers ({first_few(self.unread, 3)}): use --style comfyui for it"
            )
        return [f"for {READERS[self.style]}{others}"]


def export_lora(
    adapter: Adapter | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    style: str = "comfyui",
    dtype: str = "keep",
    scale: float = 1.0,
    rank: int | None = None,
    energy: float | None = None,
    base: str | os.PathLike[str] | None = None,
    family: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    verify: Callable[[Path], None] | None = None,
) -> LoraReport:
    """Write an adapter as a LoRA file with exactly the same update, or the closest of lower rank.

    The exact LoRA has rank k * r + hybrid_r in every layer. The factors include the scaling and
    ``scale``, and alpha is the rank, so a reader that ignores alpha gets the right update, too. If
    layers have different ranks, alpha is the most common one in all layers, and the factors of the
    other layers compensate for it, because diffusers assigns differing alphas to the wrong layers.
    With diffusers' own names there is no alpha. The header states what diffusers before 0.42 does
    not infer.

    Args:
        adapter: an adapter, or a source for :func:`read_adapter`.
        output: the file.
        style: style of the layers' names: comfyui, kohya or diffusers.
        dtype: dtype of the factors: keep (the adapter's; fp32 for fp8), fp32, bf16 or fp16.
        rank: truncate each layer to this rank.
        energy: truncate to the smallest rank that keeps this part of the squared norm.
        base: a base that supplies what the adapter may not contain: the family, the number of
            layers per block of a UNet, the kind of text encoder.
        family: the family, if neither adapter nor base names it.
        metadata: fields for the file's metadata, see ``choices.USER_FIELDS``.
        overwrite: replace an existing output.
        verify: called with the file before it appears under its name; may raise.

    Raises:
        AdapterFileError: the adapter is incomplete, or a LoRA cannot represent it.
        StyleError: the style has no names for a component. Nothing is written.
        OutputError: the output exists already, or overlaps an input.
        ValueError: an option is invalid.
    """
    if style not in STYLES:
        raise ValueError(f"style is {style!r}; it must be one of {', '.join(STYLES)}")
    read = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    opened = open_base(base, denoiser_only=adapts_denoiser_only(read)) if base else None
    found = find_adapter_family(read, opened.family.name if opened else family)
    parts = adapter_layers(read, found, scale)
    names = component_names(found, parts, style, opened)
    check_output(Path(output), overwrite, [read.source, opened.path if opened else None])
    report = LoraReport(Path(output), style)
    target = report.dtype = lora_dtype(dtype, parts)
    named: dict[str, Pair] = {}
    for component, layers in parts.items():
        pairs: dict[str, Pair] = {}
        for path, update in layers.updates.items():
            pair, error = update.lora_pair(), 0.0
            if rank or energy:
                *pair, error = truncate(*pair, rank=rank, energy=energy)  # type: ignore[assignment]
            report.errors[f"{component}.{path}"] = error
            pairs[path] = (pair[0], pair[1])
        named |= names[component].pairs(pairs)
    report.ranks = {name: len(down) for name, (down, _) in named.items()}
    if style == "diffusers":
        unread = found.unread_by_comfyui
        report.unread = [n for n in named if any(fnmatchcase(n, pattern) for pattern in unread)]
    alpha = Counter(report.ranks.values()).most_common(1)[0][0]
    tensors: dict[str, Tensor] = {}
    for name, pair in named.items():
        tensors |= _tensors(name, *pair, style, target, alpha)
    made: dict[str, Any] = {"rank": rank, "energy": energy} if rank or energy else {}
    if counted := next((n.layers_per_block for n in names.values() if n.layers_per_block), None):
        made[LAYERS_PER_BLOCK_KEY] = counted
    fields = export_metadata(
        read,
        kind="lora",
        family=found,
        original_names=style != "diffusers",
        ranks=report.ranks,
        alpha=alpha,
        scale=scale,
        names=opened.published_names() if isinstance(opened, FolderBase) else None,
        made=made,
        **dict(metadata or {}),
    )
    with staged(Path(output)) as temporary:
        write_safetensors(tensors, temporary, {"format": "pt", **fields})
        if verify:
            verify(temporary)
    return report


def component_names(
    family: ModelFamily, parts: Mapping[str, AdapterLayers], style: str, base: Base | None
) -> dict[str, Names]:
    """Return component -> names of its layers.

    Raises:
        StyleError: a file in this style cannot represent all of the adapter, or the base does not
            have one of its layers. The message names all problems.
    """
    names, problems = {}, []
    for component, layers in parts.items():
        if layers.replaced:
            problems.append(
                f"{component}: {len(layers.replaced)} trained biases or whole modules "
                f"({first_few(list(layers.replaced), 3)}), "
                "which a LoRA cannot represent. Export a checkpoint or a diffusers folder"
            )
        if style == "diffusers" and component not in read_by_diffusers(family):
            problems.append(
                f"{component}: diffusers' load_lora_weights does not read this component of "
                f"{family.name}. {_alternatives(family, component, layers)}"
            )
            continue
        own = _shapes(layers)
        # the place in a single file is not known for every component; those are not compared
        is_reported = not isinstance(base, FileBase) or component in family.original_key_maps
        known = base.canonical_shapes(component) if base and is_reported else own
        for key, shape in own.items():
            if known.get(key) != shape:
                problems.append(
                    f"{component}: the update of {key} has shape {shape}, but the base has "
                    f"{known.get(key, 'no such layer')}"
                )
        try:
            names[component] = find_names(family, component, style, known)
            for path in layers.updates:
                names[component].name(path)
        except StyleError as error:
            problems.append(f"{component}: {error}. {_alternatives(family, component, layers)}")
    if problems:
        raise StyleError(
            "\n".join([f"this adapter cannot be written in style {style}:", *problems])
        )
    return names


def _shapes(layers: AdapterLayers) -> dict[str, Shape]:
    """Shapes of the adapted weights by canonical key."""
    return {f"{path}.weight": update.shape for path, update in layers.updates.items()}


def _has_names(family: ModelFamily, component: str, layers: AdapterLayers, style: str) -> bool:
    """Whether a style has names for a component's layers."""
    if style == "diffusers":
        return component in read_by_diffusers(family)
    try:
        names = find_names(family, component, style, _shapes(layers))
        return all(names.name(path) for path in layers.updates)
    except StyleError:
        return False


def _alternatives(family: ModelFamily, component: str, layers: AdapterLayers) -> str:
    """Name the other exports for a component that a style has no names for."""
    others = [f"style {name}" for name in STYLES if _has_names(family, component, layers, name)]
    others += ["a checkpoint"] if component in family.original_key_maps else []
    return f"Export it as {' or '.join([*others, 'a diffusers folder'])}"


def read_by_diffusers(family: ModelFamily) -> tuple[str, ...]:
    """Return the components that diffusers' ``load_lora_weights`` reads."""
    pipeline = getattr(diffusers, family.pipeline_classes[0])
    return tuple(getattr(pipeline, "_lora_loadable_modules", ()))


def lora_dtype(dtype: str, parts: Mapping[str, AdapterLayers]) -> torch.dtype:
    """Return the dtype of an option's value.

    keep is the adapter's own: the dtype that can represent all of its factors. For fp8 it is fp32,
    because factors that include the scaling would be rounded once more.
    """
    if dtype == "keep":
        held = {
            factor.dtype
            for part in parts.values()
            for update in part.updates.values()
            for factor in (update.A, update.B, *(update.general or ()))
        }
        if held - set(LORA_DTYPES.values()):
            return torch.float32
        return reduce(torch.promote_types, held)
    if dtype not in LORA_DTYPES:
        raise ValueError(
            f"dtype is {dtype!r}; for a LoRA it must be keep or one of {', '.join(LORA_DTYPES)}"
        )
    return LORA_DTYPES[dtype]


def _tensors(
    name: str, down: Tensor, up: Tensor, style: str, dtype: torch.dtype, alpha: int
) -> dict[str, Tensor]:
    up = up.reshape(*up.shape, *[1] * (down.dim() - 2))
    if style != "diffusers":  # readers multiply by alpha / rank
        up = up * (len(down) / alpha)
    rounded = {"down": down.to(dtype).contiguous(), "up": up.to(dtype).contiguous()}
    for factor in rounded.values():
        if not torch.isfinite(factor).all():
            raise AdapterFileError(
                f"{name}: its factors are too large for {dtype}. Use bf16 or fp32"
            )
    if style == "diffusers":
        return {
            f"{name}.lora_A.weight": rounded["down"],
            f"{name}.lora_B.weight": rounded["up"],
        }
    return {
        f"{name}.lora_down.weight": rounded["down"],
        f"{name}.lora_up.weight": rounded["up"],
        # fp32 represents every rank; in bf16, 515 would become 516
        f"{name}.alpha": torch.tensor(float(alpha)),
    }
