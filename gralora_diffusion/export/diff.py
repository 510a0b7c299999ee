"""Export the adapter as dense updates, ``.diff``, which ComfyUI adds to weights unchanged."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gralora_diffusion.adapters.adapter_file import Adapter, read_adapter
from gralora_diffusion.io.staging import check_output, staged
from gralora_diffusion.io.tensor_files import finish_header
from gralora_diffusion.key_maps import locate

from .adapter_layers import LayerUpdate, adapter_layers, adapts_denoiser_only, find_adapter_family
from .bases import open_base
from .lora import LoraReport, component_names, lora_dtype
from .metadata import export_metadata
from .names import Names
from .plan import UpdateRows
from .rounding import Rounding
from .streaming import OutputTensor, Piece, write_streamed


def export_diff(
    adapter: Adapter | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str = "keep",
    scale: float = 1.0,
    base: str | os.PathLike[str] | None = None,
    family: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> LoraReport:
    """Write an adapter as dense updates, for ComfyUI's LoRA loaders.

    The file is as large as the adapted weights of the base. Arguments and errors are those of
    :func:`export_lora`. ComfyUI ignores ``.diff_b`` of split layers, so trained biases are refused
    here as well.
    """
    path = Path(output)
    read = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    opened = open_base(base, denoiser_only=adapts_denoiser_only(read)) if base else None
    found = find_adapter_family(read, opened.family.name if opened else family)
    parts = adapter_layers(read, found, scale)
    names = component_names(found, parts, "comfyui", opened)
    check_output(path, overwrite, [read.source, opened.path if opened else None])
    target = lora_dtype(dtype, parts)
    outputs = [
        _output(names[component], layer, update, target)
        for component, layers in parts.items()
        for layer, update in layers.updates.items()
    ]
    fields = export_metadata(read, kind="diff", family=found, scale=scale, **dict(metadata or {}))
    with staged(path) as temporary:
        write_streamed(
            temporary, outputs, {"format": "pt", **fields}, Rounding(), progress=progress
        )
        finish_header(temporary)
    return LoraReport(path, "comfyui", {output.key: 0 for output in outputs})


def _output(names: Names, path: str, update: LayerUpdate, dtype: torch.dtype) -> OutputTensor:
    """Return the dense update, with the rows in the order of the layout of its name."""
    rows, nothing = update.shape[0], torch.zeros(1).expand(update.shape)
    location = locate(path, names.rules) if names.rules else None
    bounds = [(0, rows)]
    if location and location.rule.halves_swapped and rows == 2 * update.shape[1]:
        bounds = [(rows // 2, rows), (0, rows // 2)]
    pieces = tuple(
        Piece(nothing, start, stop, update=partial(UpdateRows, update, start, False))
        for start, stop in bounds
    )
    return OutputTensor(f"{names.name(path)}.diff", update.shape, dtype, pieces)
