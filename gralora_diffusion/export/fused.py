"""Export the base with the adapter added: an original single file, or a diffusers folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gralora_diffusion.adapters.adapter_file import Adapter, read_adapter
from gralora_diffusion.io.dtypes import short_name
from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.io.staging import check_output, staged
from gralora_diffusion.io.tensor_files import finish_header

from .adapter_layers import AdapterLayers, adapter_layers, find_adapter_family
from .bases import Base, BaseError, FileBase, FolderBase, open_base
from .choices import DTYPE_CHOICES, FORMATS
from .dtypes import converted
from .metadata import export_metadata
from .plan import Owned, Planner, plan_folder, plan_from_file, plan_original
from .rounding import Rounding, RoundingLoss
from .streaming import OutputTensor, sample_remedies, write_streamed

#: What ``RoundingLoss.error`` is, for every number of a report.
LOSS_HEADING = (
    "loss by rounding, |written - base - update| / |update|; strength is how much of the update is "
    "left:"
)
#: Part of an update that may be lost without a warning.
BOUND = 0.1
_SHOWN, _SAMPLED = 5, 3


@dataclass
class FusedReport:
    """The result of an export.

    Attributes:
        family: family of base and adapter.
        layers: component -> number of layers with an update.
        losses: tensor of the output -> the part of its update lost by rounding.
        remedies: alternative rounding -> its loss, measured if the actual loss is large.
    """

    path: Path
    family: str
    layers: dict[str, int] = field(default_factory=dict)
    losses: dict[str, RoundingLoss] = field(default_factory=dict)
    remedies: dict[str, RoundingLoss] = field(default_factory=dict)

    @property
    def loss(self) -> RoundingLoss:
        """The loss by rounding over all layers."""
        return sum(self.losses.values(), start=RoundingLoss())

    def note_costly(
        self,
        losses: Mapping[str, RoundingLoss],
        outputs: Sequence[OutputTensor],
        rounding: Rounding,
    ) -> None:
        """Measure the losses of other ways of rounding, if a loss exceeds the bound."""
        costly = {key: loss for key, loss in losses.items() if loss.error > BOUND}
        worst = sorted(costly, key=lambda key: -costly[key].difference)[:_SAMPLED]
        for output in outputs:
            if output.key in worst:
                for name, loss in sample_remedies(output, rounding).items():
                    self.remedies[name] = self.remedies.get(name, RoundingLoss()) + loss

    def __str__(self) -> str:
        total = ", ".join(f"{count} layers of {name}" for name, count in self.layers.items())
        lines = [f"{self.path}: {self.family}, update added to {total}"]
        if not self.losses:
            return lines[0]
        lines += [LOSS_HEADING, f"  {self.loss}  over all {len(self.losses)} layers"]
        costly = {key: loss for key, loss in self.losses.items() if loss.error > BOUND}
        worst = sorted(self.losses, key=lambda key: -self.losses[key].error)[:_SHOWN]
        lines += [f"  {self.losses[key]}  {key}" for key in worst]
        if len(self.losses) > _SHOWN:
            lines.append(f"  {len(self.losses) - _SHOWN} layers lose less")
        if costly:
            lines.append(
                f"WARNING: {len(costly)} of {len(self.losses)} layers lose more than {BOUND:.0%}. "
                "On a sample of the worst ones, the loss with this rounding and with others is:"
            )
            lines += [f"  {loss}  with {name}" for name, loss in self.remedies.items()]
        return "\n".join(lines)


def export_fused(
    adapter: Adapter | str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str = "checkpoint",
    dtype: str = "keep",
    scale: float = 1.0,
    stochastic: bool = False,
    seed: int = 0,
    fp8_scale: bool = True,
    denoiser_only: bool = False,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    metadata: Mapping[str, str] | None = None,
    hashes: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    verify: Callable[[Path], None] | None = None,
) -> FusedReport:
    """Write the base with the adapter added to it, tensor by tensor, each rounded once.

    Args:
        adapter: an adapter, or a source for :func:`read_adapter`.
        base: an original single file, a diffusers folder or a Hub id.
        output: the file, or the folder.
        format: checkpoint (one file in the original layout) or diffusers (a folder).
        dtype: keep (of each tensor), fp32, bf16, fp16, or fp8_e4m3 (matrices of the denoiser).
        scale: scale of the adapter.
        stochastic: round up or down at random, so that the mean is exact.
        seed: seed of stochastic rounding.
        fp8_scale: store fp8 with a scale per tensor.
        denoiser_only: write a checkpoint of the denoiser alone, for "Load Diffusion Model".
        variant: variant of the weight files of a folder, such as fp16.
        metadata: fields for the file's metadata, see ``choices.USER_FIELDS``.
        hashes: write ``modelspec.hash_sha256`` and similar fields; this reads the output once more.
        overwrite: replace an existing output.
        progress: show a progress bar.
        verify: called with the output before it appears under its name; may raise.

    Raises:
        AdapterFileError: the adapter is incomplete or does not fit the base. The message names all
            problems.
        BaseError, OriginalFileError: the adapter cannot be fused into this base.
        OutputError: the output exists already, or overlaps an input.
        RoundingError: the dtype cannot represent a value.
        ValueError: an option is invalid.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    if format == "diffusers" and denoiser_only:
        raise ValueError(
            "denoiser_only is only allowed with format='checkpoint', because a diffusers folder "
            "contains the whole pipeline"
        )
    if dtype not in DTYPE_CHOICES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPE_CHOICES)}")
    if format == "diffusers" and dtype == "fp8_e4m3":
        raise ValueError(
            "dtype fp8_e4m3 is only allowed with format='checkpoint', because diffusers does not "
            "read folders in fp8"
        )
    path, rounding = Path(output), Rounding(stochastic, seed)
    read = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    opened = open_base(
        base,
        variant=variant,
        revision=revision,
        cache_dir=cache_dir,
        denoiser_only=denoiser_only,
    )
    family = find_adapter_family(read, opened.family.name)
    layers = adapter_layers(read, family, scale)
    _check_scale(layers, scale)
    check_output(path, overwrite, [read.source, opened.path])
    report = FusedReport(path, family.name, {n: len(part.updates) for n, part in layers.items()})
    files = _plan(opened, Planner(layers), format, denoiser_only)
    if dtype == "keep":
        _check_kept(opened, files)
    denoiser = family.denoiser
    scale_prefix = _scale_prefix(opened, denoiser_only) if fp8_scale else None
    with staged(path) as target:
        if isinstance(opened, FolderBase) and format == "diffusers":
            _copy_rest(opened, target)
        for name, planned in files.items():
            outputs = converted(planned, dtype, denoiser, scale_prefix)
            metadata_fields = _metadata(
                read, opened, scale, format, dtype, stochastic, hashes, dict(metadata or {})
            )
            here = target / name if name else target
            losses = write_streamed(here, outputs, metadata_fields, rounding, progress=progress)
            component = f"{planned[0][0]}." if name else ""
            report.losses |= {component + key: loss for key, loss in losses.items()}
            report.note_costly(losses, outputs, rounding)
            if hashes and not name:
                finish_header(here)
        if verify:
            verify(target)
    return report


def _plan(base: Base, planner: Planner, format: str, denoiser_only: bool) -> dict[str, list[Owned]]:
    """Return file within the output -> its tensors; "" if the output is the file."""
    if format == "checkpoint":
        if isinstance(base, FileBase):
            return {"": plan_from_file(base, planner, denoiser_only)}
        return {"": plan_original(base, planner, denoiser_only)}
    if isinstance(base, FileBase):
        raise BaseError(
            f"{base.path}: a diffusers folder cannot be exported from an original file. Pass the "
            "folder or Hub id of the pipeline as base, or export a checkpoint"
        )
    planned = plan_folder(base, planner)
    return {f"{file.parent.name}/{file.name}": outputs for file, outputs in planned.items()}


def _scale_prefix(base: Base, denoiser_only: bool) -> str:
    """Return the prefix of the denoiser's keys in the output."""
    if denoiser_only:
        return ""
    if isinstance(base, FileBase):
        return base.prefixes[base.family.denoiser]
    return base.family.original_key_maps[base.family.denoiser][0].prefixes[0]


def _metadata(
    adapter: Adapter,
    base: Base,
    scale: float,
    format: str,
    dtype: str,
    stochastic: bool,
    hashes: bool,
    metadata_fields: dict[str, Any],
) -> dict[str, str]:
    """Return the header's metadata; files of a diffusers folder get diffusers' own."""
    if format == "diffusers":
        return {"format": "pt"}
    made = {"dtype": dtype, "rounding": "stochastic" if stochastic else "nearest"}
    single = isinstance(base, FileBase)
    fields = export_metadata(
        adapter,
        kind="checkpoint",
        family=base.family,
        scale=scale,
        names=None if isinstance(base, FileBase) else base.published_names(),
        base_metadata=base.metadata if isinstance(base, FileBase) else None,
        base_name=base.path.stem if single else base.path.name,
        made=made,
        hashes=hashes,
        **metadata_fields,
    )
    return {"format": "pt", **fields}


def _check_scale(layers: Mapping[str, AdapterLayers], scale: float) -> None:
    replaced = [f"{name}: {key}" for name, part in layers.items() for key in part.replaced]
    if replaced and scale != 1.0:
        raise AdapterFileError(
            f"scale is {scale}, but the adapter contains values that replace the base's "
            f"({', '.join(replaced[:3])}), and they cannot be scaled. Export with scale 1"
        )


def _check_kept(base: Base, files: Mapping[str, list[Owned]]) -> None:
    """Refuse to add an update to 8-bit weights and to round the sum to 8 bits by default."""
    outputs = [output for planned in files.values() for _, output in planned]
    for output in outputs:
        if output.dtype.itemsize == 1 and any(piece.update for piece in output.pieces):
            stored = short_name(output.dtype)
            raise BaseError(
                f"{base.path}: {output.key} is stored in {stored}, and rounding to it would lose "
                "most of the update. Pass the base in 16 or 32 bits, or write 16 bits with --dtype "
                "bf16. To write 8 bits all the same, export a checkpoint with --dtype fp8_e4m3"
            )


def _copy_rest(base: FolderBase, target: Path) -> None:
    """Copy the pipeline's files except the weights, which are written anew."""
    for entry in sorted(base.path.iterdir()):
        if entry.is_file() and entry.suffix in (".json", ".md", ".txt"):
            target.mkdir(exist_ok=True)
            shutil.copy(entry, target / entry.name)
        elif entry.is_dir() and entry.name in base.index:
            files = base.files.get(entry.name)
            shutil.copytree(entry, target / entry.name, ignore=_weights if files else None)
            for index in files or ():
                if index.suffix == ".json":
                    shutil.copy(index, target / entry.name / index.name)


def _weights(folder: str, names: list[str]) -> set[str]:
    """Return the weight files and their indexes, of any variant and library."""
    endings = (".safetensors", ".bin", ".msgpack", ".h5", ".onnx", ".pb")
    return {name for name in names if name.endswith(endings) or ".index." in name}
