"""The adapter added to its base: an original single file, or a folder in diffusers' layout."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..state import Adapter, read_adapter
from ..tensor_files import AdapterFileError
from .adapter_layers import AdapterLayers, adapter_layers, find_adapter_family
from .bases import Base, BaseError, FileBase, FolderBase, open_base
from .plan import Planner, plan_folder, plan_from_file, plan_original
from .rounding import Rounding, RoundingLoss
from .staging import check_output, staged
from .streaming import OutputTensor, write_streamed
from .tensor_bytes import StoredTensor

FORMATS = ("checkpoint", "diffusers")


@dataclass
class FusedReport:
    """What was written.

    Attributes:
        family: of base and adapter.
        layers: component -> how many of its layers something was added to.
        losses: tensor of the output -> what rounding cost of the update.
    """

    path: Path
    family: str
    layers: dict[str, int] = field(default_factory=dict)
    losses: dict[str, RoundingLoss] = field(default_factory=dict)


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
    overwrite: bool = False,
    verify: Callable[[Path], None] | None = None,
) -> FusedReport:
    """Write the base with the adapter added to it, tensor by tensor, each rounded once.

    Args:
        adapter: or where :func:`read_adapter` finds it.
        base: an original single file, a diffusers folder or a Hub id.
        output: the file, or the folder.
        format: checkpoint, the original layout in one file; or diffusers, the folder's.
        dtype: keep (of each tensor), fp32, bf16, fp16, or fp8_e4m3 (matrices of the denoiser).
        scale: of the adapter.
        stochastic: round up or down by chance, so that the mean is right.
        seed: of that chance.
        fp8_scale: store fp8 with a scale per tensor.
        denoiser_only: a checkpoint of the denoiser alone, for "Load Diffusion Model".
        variant: of the weight files of a folder, such as fp16.
        overwrite: replace what exists.
        verify: called with what was written, before it appears under its name; may raise.

    Raises:
        AdapterFileError: the adapter is not whole or does not fit the base; all is named.
        BaseError, OriginalFileError: a base that nothing can be fused into.
        OutputError: the output is there already, or part of the base.
        RoundingError: a value that the dtype cannot hold.
        ValueError: an impossible option.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    if format == "diffusers" and denoiser_only:
        raise ValueError("a diffusers folder is of the whole pipeline; denoiser_only is for files")
    choose = _dtype_chooser(dtype)
    rounding = Rounding(stochastic=stochastic, seed=seed)
    read = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    opened = open_base(base, variant=variant, revision=revision, cache_dir=cache_dir)
    family = find_adapter_family(read, opened.family.name)
    layers = adapter_layers(read, family, scale)
    _check_scale(layers, scale)
    path = Path(output)
    check_output(path, overwrite, [opened.path])
    planner = Planner(layers, choose)
    report = FusedReport(
        path, family.name, {name: len(part.updates) for name, part in layers.items()}
    )
    if format == "diffusers":
        if not isinstance(opened, FolderBase):
            raise BaseError(
                f"{opened.path}: an original file, and a diffusers folder is wanted. Give the "
                "folder or Hub id of the pipeline as base, or export a checkpoint"
            )
        files = list(plan_folder(opened, planner))
        with staged(path) as target:
            _copy_rest(opened, target)
            for component, file, outputs in files:
                name = f"{component}/{file.name}"
                losses = write_streamed(target / name, outputs, {"format": "pt"}, rounding)
                report.losses |= {f"{component}.{key}": loss for key, loss in losses.items()}
            if verify:
                verify(target)
        return report
    outputs, kept = _plan(opened, planner, denoiser_only)
    with staged(path) as target:
        everything = {"format": "pt", **kept, **(metadata or {})}
        report.losses = write_streamed(target, outputs, everything, rounding)
        if verify:
            verify(target)
    return report


def _plan(
    base: Base, planner: Planner, denoiser_only: bool
) -> tuple[list[OutputTensor], dict[str, str]]:
    """The tensors of the original file, and what of the base's metadata holds for it."""
    if isinstance(base, FileBase):
        return plan_from_file(base, planner, denoiser_only), base.metadata
    return plan_original(base, planner, denoiser_only), {}


def _check_scale(layers: Mapping[str, AdapterLayers], scale: float) -> None:
    replaced = [f"{name}: {key}" for name, part in layers.items() for key in part.replaced]
    if replaced and scale != 1.0:
        raise AdapterFileError(
            f"scale is {scale}, but the adapter brings whole values that take the base's place "
            f"({', '.join(replaced[:3])}) and cannot be scaled. Export with scale 1"
        )


def _dtype_chooser(dtype: str) -> Callable[[str, str, StoredTensor], torch.dtype]:
    def choose(component: str, key: str, stored: StoredTensor) -> torch.dtype:
        return stored.dtype

    return choose


def _copy_rest(base: FolderBase, target: Path) -> None:
    """Copy all of a pipeline's folder but the weights that are written anew."""
    written = {file for files in base.files.values() for file in files}
    indexes = {file for file in written if file.suffix == ".json"}

    def passed_over(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if Path(folder) / name in written - indexes}

    shutil.copytree(base.path, target, ignore=passed_over)
