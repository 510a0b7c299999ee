"""A LoRA's pairs as GraLoRA's factors, layer by layer, and what could not come over."""

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
    """How a layer came over.

    Attributes:
        rank: of the LoRA there.
        k: of the new layer; below what was asked for where the layer's widths ask for it.
        norm: Frobenius norm of the LoRA's update.
        error: Frobenius norm of what is left out over that norm; 0 if nothing is.
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
    """Make a GraLoRA adapter with the update of a LoRA, or what is nearest to it.

    A layer whose LoRA has a rank of at most ``hybrid_rank + rank / k`` comes over exactly: the
    general pair takes ``hybrid_rank`` of it, every block has room for the rest. Of a larger one the
    general pair takes the largest singular values, and each block is the best approximation of its
    part of what is left. The LoRA's scale is folded in. Room that is left gets the usual random
    values in A and zeros in B: it changes nothing, and can be trained.

    Args:
        source: a LoRA file in the names of diffusers, kohya's sd-scripts, ComfyUI or whatever else
            diffusers reads for this family; PEFT's folder; a Hub repository; or a state dict.
        family: of its base.
        rank, k, hybrid_rank, alpha: of the new adapter; alpha is rank + hybrid_rank by default. On
            layers whose widths k does not divide, it is the largest smaller one that does.
        unet_config: config of the base's UNet, for LoRAs in the names of original UNets, where it
            is not the family's usual one.
        base: the base itself, whose layers the LoRA's must fit.
        weight_name: which file in a folder or repository.
        seed: of the random values.
        header_alpha: "apply" or "ignore" an alpha that only a field of the file's header tells,
            such as ``ss_network_alpha``. Programs disagree on it, so one that matters is refused
            without a choice.
        left_out: If given, differences of norms and biases are left out, and their keys are
            appended to it. Without it such a LoRA is refused.
        hub_options: for a Hub repository: ``revision``, ``token``, ``cache_dir``,
            ``local_files_only``, ... of ``huggingface_hub.snapshot_download``.

    Returns:
        The adapter, and component.path -> how that layer came over.

    Raises:
        AdapterFileError: no LoRA, one that cannot be taken over whole or does not fit the base;
            names the keys at fault.
        ValueError: rank, k, hybrid_rank or alpha that cannot be.
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
    """Return the Frobenius norm of all that is left out over that of the whole LoRA."""
    whole = math.hypot(*(layer.norm for layer in layers.values()))
    return math.hypot(*(layer.error * layer.norm for layer in layers.values())) / (whole or 1.0)


def _layer(
    down: Tensor, up: Tensor, rank: int, k: int, hybrid_rank: int
) -> tuple[dict[str, Tensor], float]:
    """The tensors of one layer by PEFT's names, and the relative error."""
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
    """What the general pair takes and what is left for the blocks: as it is if both have room."""
    if len(down) <= general + block:
        return (down[:general], up[:, :general]), (down[general:], up[:, general:])
    return split(down, up, general)


def _with_spare_room(A: Tensor, B: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """A with random values where it and B hold zeros, which could not be trained."""
    k, _, r = A.shape[:3]
    s = r // k
    # column (n, j, q) of A meets row (j, n, q) of B
    columns = A.transpose(1, 2).flatten(2).any(dim=2).view(k, k, s)
    rows = B.any(dim=2).view(k, k, s).transpose(0, 1)
    unused = ~(columns | rows).view(k, r)
    shape = (k, 1, r, *[1] * (A.dim() - 3))
    return torch.where(unused.view(shape), random.to(A), A), B


def _targets(paths: list[str]) -> list[str] | str:
    """Paths as targets. One without a dot would also be the end of others, as a list has it."""
    if all("." in path for path in paths):
        return sorted(paths)
    return "|".join(re.escape(path) for path in sorted(paths))


def _kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a LoRA's metadata says of its subject, which is still true."""
    names = ("modelspec.title", "modelspec.author", "modelspec.trigger_phrase", "ss_tag_frequency")
    return {name: metadata[name] for name in names if name in metadata}
