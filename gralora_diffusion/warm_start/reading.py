"""A LoRA of any program as pairs by component and layer, scaled; nothing is passed over."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..families import ModelFamily, families_of_layers, family_of_metadata
from ..layouts import USUAL_LAYERS_PER_BLOCK
from ..lora_keys import Layer, group_layers
from ..low_rank import Pair
from ..tensor_files import AdapterFileError, some
from .files import LoraFile, read_file
from .names import OriginalNames
from .through_diffusers import through_diffusers

#: Component -> path of a layer -> its pair, whose update is that of the LoRA at scale 1.
Pairs = dict[str, dict[str, Pair]]
_REMEDIES = {
    "DoRA": "it scales the columns of the whole weight anew, which is no sum of a weight and an "
    "update. Load it into its base, fuse it there and train on the fused base",
    "GraLoRA": "this is a GraLoRA adapter already. Load it with `pipe.load_gralora_weights(...)`",
    "difference": "it holds differences of whole weights. Extract a LoRA from it first, with the "
    "tools of the program that it came from",
}
_OTHER_REMEDY = (
    "its update is no product of two matrices. Extract a LoRA from it first, with LyCORIS's tools "
    "or ComfyUI's node for extracting LoRA"
)


def read_lora(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    family: ModelFamily,
    unet_config: Any = None,
    weight_name: str | None = None,
) -> tuple[Pairs, dict[str, str]]:
    """Return the pairs of a LoRA, (R, in, ...) and (out, R) in float32 at least, and its metadata.

    Args:
        source: a file, PEFT's folder, a folder or a Hub repository with one file, or a state dict.
        unet_config: the base's, for names of original UNets; the family's usual one if not given.
        weight_name: which file in a folder or repository.

    Raises:
        AdapterFileError: not a LoRA, or one of another family; keys that cannot be used. All are
            named.
    """
    file = read_file(source, family, weight_name)
    layers, others = group_layers(file.tensors)
    _refuse_other_kinds(file.name, layers, others)
    _refuse_other_families(file, layers, family)
    scaled = {name: _scaled(file, layer) for name, layer in layers.items()}

    options = dict(family.lora_options)
    if unet_config is not None and "unet_config" in options:
        options["unet_config"] = unet_config
    per_block = getattr(options.get("unet_config"), "layers_per_block", USUAL_LAYERS_PER_BLOCK)
    original = OriginalNames(family, layers, per_block)
    found: dict[tuple[str, str], Pair] = {}
    left: dict[str, Pair] = {}
    for name, (down, up) in scaled.items():
        places = original.places(name, (len(up), *down.shape[1:]))
        for place in places:
            _add(found, (place.component, place.path), place.pair_of(down, up), file.name)
        if not places:
            left[name] = down, up.reshape(*up.shape, *[1] * (down.dim() - 2))
    keys = {name: (layers[name].parts["down"], layers[name].parts["up"]) for name in left}
    for other, pair in through_diffusers(left, keys, family, options, file.name).items():
        _add(found, other, pair, file.name)
    if strange := [".".join(place) for place in found if not original.knows(*place)]:
        raise AdapterFileError(
            f"{file.name}: no such layers in {family.name}: {some(strange)}. Check that the file "
            "is for this family; else pass the state dict without these layers."
        )

    pairs: Pairs = {}
    for (component, path), pair in found.items():
        pairs.setdefault(component, {})[path] = pair
    return pairs, file.metadata


def _add(
    found: dict[tuple[str, str], Pair], place: tuple[str, str], pair: Pair, where: str
) -> None:
    if place in found:
        raise AdapterFileError(
            f"{where}: two layers of the file are {'.'.join(place)}. Leave out one of them."
        )
    found[place] = pair


def _scaled(file: LoraFile, layer: Layer) -> Pair:
    """The layer's pair with its scale in ``up``."""
    parts = {part: _finite(file, key) for part, key in layer.parts.items()}
    down, up = parts["down"], parts["up"].flatten(1)
    rank = len(down)
    if up.shape[1] != rank:
        raise AdapterFileError(
            f"{file.name}: {layer.name} has {rank} rows in its down matrix and {up.shape[1]} "
            "columns in its up matrix."
        )
    if "mid" in parts:  # Tucker's form of a convolution
        down = torch.einsum("srhw,ri->sihw", parts["mid"], down.flatten(1))
    component, _, path = layer.name.partition(".")
    alpha = float(rank)
    if "alpha" in parts:
        alpha = float(parts["alpha"].reshape(-1)[0])
    elif component in file.scalings:
        alpha = file.scalings[component].alpha(path, rank)
    if not math.isfinite(alpha):
        raise AdapterFileError(f"{file.name}: {layer.name} has alpha {alpha}.")
    return down, up if alpha == rank else (up.double() * alpha / rank).to(up)


def _finite(file: LoraFile, key: str) -> Tensor:
    tensor = file.tensors[key]
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    if not torch.isfinite(tensor).all():
        raise AdapterFileError(f"{file.name}: {key} holds NaN or infinite values.")
    return tensor


def _refuse_other_kinds(where: str, layers: Mapping[str, Layer], others: list[str]) -> None:
    for kind in dict.fromkeys(layer.kind for layer in layers.values()):
        if kind != "LoRA":
            names = [name for name, layer in layers.items() if layer.kind == kind]
            remedy = _REMEDIES.get(kind, _OTHER_REMEDY)
            raise AdapterFileError(
                f"{where}: {len(names)} of {len(layers)} layers are {kind} and no LoRA "
                f"({some(names)}): {remedy}."
            )
    known = {"down", "up", "alpha", "mid"}
    others = others + [
        key for layer in layers.values() for part, key in layer.parts.items() if part not in known
    ]
    if not layers:
        raise AdapterFileError(f"{where}: no LoRA; its keys are {some(others)}.")
    if others:
        raise AdapterFileError(
            f"{where}: {len(others)} keys besides the pairs of the LoRA, which cannot be taken "
            f"over: {some(others)}. Without them it is another adapter; if that is what you want, "
            "pass the state dict without these keys."
        )


def _refuse_other_families(
    file: LoraFile, layers: Mapping[str, Layer], family: ModelFamily
) -> None:
    if named := family_of_metadata(file.metadata):
        families, told_by = [named[0]], f"its {named[1]}"
    else:
        told_by = "names and shapes of its layers"
        families = families_of_layers(
            {
                layer.plain_name: (file.tensors[layer.parts["down"]].shape[1], len(up))
                for layer in layers.values()
                if not layer.text_encoder
                for up in [file.tensors[layer.parts["up"]]]
            }
        )
    if families and family not in families:
        told = " or ".join(other.name for other in families)
        raise AdapterFileError(
            f"{file.name}: a LoRA for {told}, as {told_by} tell; not for {family.name}."
        )
