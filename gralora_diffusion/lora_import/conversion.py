"""Convert a LoRA's pairs to GraLoRA's factors layer by layer, and measure the loss."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gralora_diffusion.adapters.adapter_file import Adapter, ComponentAdapter
from gralora_diffusion.adapters.config import GraloraConfig
from gralora_diffusion.adapters.layers.functional import init_factors, init_plain_factors
from gralora_diffusion.adapters.placement.layer_config import check_numbers, exact_pattern
from gralora_diffusion.adapters.placement.targets import common_divisors
from gralora_diffusion.families import ModelFamily, get_family
from gralora_diffusion.lora_files.low_rank import Pair, gralora_factors, norm, split
from gralora_diffusion.lora_files.scaling import HeaderAlpha

from .base import LoraBase
from .reading import read_lora


@dataclass(frozen=True)
class ImportedLayer:
    """How a layer was converted.

    Attributes:
        rank: rank of the LoRA in this layer.
        k: k of the new layer; smaller than requested if the layer's widths require it.
        norm: Frobenius norm of the LoRA's update.
        error: Frobenius norm of the lost part of the update, relative to ``norm``; 0 if exact.
    """

    rank: int
    k: int
    norm: float
    error: float


def gralora_from_lora(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    family: str | ModelFamily,
    rank: int,
    k: int,
    hybrid_rank: int = 0,
    alpha: float | None = None,
    *,
    unet_config: Any = None,
    base: LoraBase | None = None,
    weight_name: str | None = None,
    seed: int = 0,
    header_alpha: HeaderAlpha | None = None,
    left_out: list[str] | None = None,
    **hub_options: Any,
) -> tuple[Adapter, dict[str, ImportedLayer]]:
    """Make a GraLoRA adapter with the update of a LoRA, or with the closest possible update.

    A layer is converted exactly if its LoRA has a rank of at most ``hybrid_rank + rank / k``: the
    general pair takes ``hybrid_rank`` of it, and every block has room for the rest. For a larger
    rank, the general pair takes the largest singular values, and each block is the best
    approximation of its part of the rest. The LoRA's scale is folded in. Unused room gets the usual
    random values in A and zeros in B: it does not change the update, and can be trained.

    Args:
        source: a LoRA file with names of diffusers, kohya's sd-scripts, ComfyUI or another program
            that diffusers reads for this family; PEFT's folder; a Hub repository; or a state dict.
        family: family of its base.
        rank, k, hybrid_rank, alpha: of the new adapter; alpha is rank + hybrid_rank by default. A
            layer whose widths k does not divide gets the largest smaller k that divides them.
        unet_config: config of the base's UNet if it is not the family's usual one, for LoRAs with
            names of original UNets.
        base: the base; the LoRA's layers must fit its layers.
        weight_name: which file in a folder or repository.
        seed: seed of the random values.
        header_alpha: "apply" or "ignore" an alpha that only a field of the file's header states,
            such as ``ss_network_alpha``. Programs disagree about it, so without a choice such a
            LoRA is refused if the alpha matters.
        left_out: If given, differences of norms and biases are left out, and their keys are
            appended to it. Otherwise such a LoRA is refused.
        hub_options: for a Hub repository: ``revision``, ``token``, ``cache_dir``,
            ``local_files_only``, ... of ``huggingface_hub.snapshot_download``.

    Returns:
        The adapter, and component.path -> how that layer was converted.

    Raises:
        AdapterFileError: the source is not a LoRA, cannot be converted completely or does not fit
            the base. The message names the keys at fault.
        ValueError: rank, k, hybrid_rank or alpha is invalid.
    """
    check_numbers(rank, k, hybrid_rank, alpha)
    family = get_family(family) if isinstance(family, str) else family
    alpha = rank + hybrid_rank if alpha is None else alpha
    pairs, metadata = read_lora(
        source, family, unet_config, weight_name, header_alpha, left_out, hub_options
    )
    where = "state dict" if isinstance(source, Mapping) else str(source)
    if base is not None:
        base.check(pairs, where)
    parts, layers = {}, {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for component in sorted(pairs, key=family.components.index):
            tensors: dict[str, Tensor] = {}
            ks = {}
            for path, (down, up) in sorted(pairs[component].items()):
                unscaled = (up.double() * (rank + hybrid_rank) / alpha).to(up)
                fits = common_divisors((down.shape[1], len(up), rank))
                ks[path] = fit = max(each for each in fits if each <= k)
                factors, error = _layer(down, unscaled, rank, fit, hybrid_rank)
                tensors |= {f"{path}.{name}": factor for name, factor in factors.items()}
                size = norm(down, up)
                layers[f"{component}.{path}"] = ImportedLayer(len(down), fit, size, error)
            lowered = {path: fit for path, fit in ks.items() if fit != k}
            config = GraloraConfig(
                r=rank,
                gralora_k=k,
                hybrid_r=hybrid_rank,
                alpha=alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
                target_modules=_targets(list(ks)),
                k_pattern=exact_pattern(lowered, list(ks)),
            )
            parts[component] = ComponentAdapter(config, tensors)
    return Adapter(parts, family.name, _kept(metadata), where), layers


def overall_error(layers: Mapping[str, ImportedLayer]) -> float:
    """Return the Frobenius norm of the lost part of the update, relative to the whole LoRA's."""
    whole = math.hypot(*(layer.norm for layer in layers.values()))
    return math.hypot(*(layer.error * layer.norm for layer in layers.values())) / (whole or 1.0)


def _layer(
    down: Tensor, up: Tensor, rank: int, k: int, hybrid_rank: int
) -> tuple[dict[str, Tensor], float]:
    """Return the tensors of one layer by PEFT's names, and the relative error."""
    outputs, inputs, kernel = len(up), down.shape[1], down.shape[2:]
    A, B = init_factors(inputs, outputs, rank, k, kernel)
    tensors, rest, part = {}, (down, up), 1.0
    if hybrid_rank:
        first, rest = _split(down, up, hybrid_rank, rank // k)
        general_down, general_up = init_plain_factors(inputs, outputs, hybrid_rank, kernel)
        general_down[: len(first[0])] = first[0]
        general_up[:, : len(first[0])] = first[1].reshape(outputs, -1, *[1] * len(kernel))
        tensors["gralora_A_general.weight"] = general_down
        tensors["gralora_B_general.weight"] = general_up
    error = 0.0
    if len(rest[0]):
        new_A, new_B, error = gralora_factors(*rest, rank, k)
        A, B = _with_spare_room(new_A, new_B, A)
        if error:
            whole = norm(down, up)
            part = norm(*rest) / whole if whole else 0.0
    return {"gralora_A": A, "gralora_B": B, **tensors}, error * part


def _split(down: Tensor, up: Tensor, general: int, block: int) -> tuple[Pair, Pair]:
    """Return the general pair's part and the blocks' part, without a decomposition if both fit."""
    if len(down) <= general + block:
        return (down[:general], up[:, :general]), (down[general:], up[:, general:])
    return split(down, up, general)


def _with_spare_room(A: Tensor, B: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """Return A with random values where A and B are zero, because those could not be trained."""
    k, _, r = A.shape[:3]
    s = r // k
    # column (n, j, q) of A meets row (j, n, q) of B
    columns = A.transpose(1, 2).flatten(2).any(dim=2).view(k, k, s)
    rows = B.any(dim=2).view(k, k, s).transpose(0, 1)
    unused = ~(columns | rows).view(k, r)
    shape = (k, 1, r, *[1] * (A.dim() - 3))
    return torch.where(unused.view(shape), random.to(A), A), B


def _targets(paths: list[str]) -> list[str] | str:
    """Return paths as targets; a regular expression if a path without a dot could match others."""
    if all("." in path for path in paths):
        return sorted(paths)
    return "|".join(re.escape(path) for path in sorted(paths))


def _kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the part of a LoRA's metadata that remains true: the part about its subject."""
    names = ("modelspec.title", "modelspec.author", "modelspec.trigger_phrase", "ss_tag_frequency")
    return {name: metadata[name] for name in names if name in metadata}
