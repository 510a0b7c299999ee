"""Read a LoRA of any program as scaled pairs by component and layer; no key is ignored."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gralora_diffusion.adapters.placement.layer_config import is_integer
from gralora_diffusion.families import ModelFamily, families_of_layers, family_of_metadata
from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.io.file_names import LAYERS_PER_BLOCK_KEY, SOURCE_KEY
from gralora_diffusion.io.json_files import parse_object
from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.key_maps import USUAL_LAYERS_PER_BLOCK
from gralora_diffusion.lora_files.keys import Layer, group_layers
from gralora_diffusion.lora_files.low_rank import Pair
from gralora_diffusion.lora_files.scaling import HeaderAlpha, LoraScalings

from .files import LoraFile, read_file
from .names import OriginalNames
from .through_diffusers import through_diffusers

#: Component -> path of a layer -> its pair, whose update is the LoRA's update at scale 1.
Pairs = dict[str, dict[str, Pair]]
_REMEDIES = {
    "DoRA": "DoRA rescales the columns of the whole weight, so the result is not a sum of a weight "
    "and an update. Load it into its base, fuse it there and train on the fused base",
    "GraLoRA": "this is a GraLoRA adapter already. Load it with `pipe.load_gralora_weights(...)`",
    "difference": "it holds differences of whole weights. Extract a LoRA from it first, with the "
    "tools of the program that wrote it",
}
#: Layers of a UNet's block at most.
_MOST_LAYERS = 100
#: Parts that may belong to a norm or a bias.
_OF_NORMS_AND_BIASES = {"diff", "diff_b", "w_norm", "b_norm", "up_bias"}
_OTHER_REMEDY = (
    "its update is not a product of two matrices. Extract a LoRA from it first, with LyCORIS's "
    "tools or ComfyUI's node for extracting LoRA"
)


def read_lora(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    family: ModelFamily,
    unet_config: Any = None,
    weight_name: str | None = None,
    header_alpha: HeaderAlpha | None = None,
    left_out: list[str] | None = None,
    hub_options: Mapping[str, Any] | None = None,
) -> tuple[Pairs, dict[str, str]]:
    """Return the pairs of a LoRA, (R, in, ...) and (out, R) in float32 at least, and its metadata.

    Args:
        source: a file, PEFT's folder, a folder or a Hub repository with one file, or a state dict.
        unet_config: config of the base's UNet, for names of original UNets; the family's usual one
            if None.
        weight_name: which file in a folder or repository.
        header_alpha: see :class:`~gralora_diffusion.lora_files.scaling.LoraScalings`.
        left_out: If given, differences of norms and biases are left out, and their keys are
            appended to it; otherwise they are refused.
        hub_options: see :func:`gralora_diffusion.io.hub.fetch`.

    Raises:
        AdapterFileError: the source is not a LoRA or belongs to another family, keys cannot be
            used, or the scaling of factors is not known. The message names all of them.
    """
    file = read_file(source, family, weight_name, hub_options)
    layers, others = group_layers(file.tensors)
    small = _of_norms_and_biases(file, layers, others)
    if left_out is not None:
        left_out += small
        layers, others = group_layers(key for key in file.tensors if key not in small)
        small.clear()
    _refuse_other_kinds(file.name, layers, others, can_be_left_out=bool(small))
    scaled = _scaled_pairs(file, layers, header_alpha, without_biases=left_out is not None)
    _refuse_other_families(file, layers, family)

    options = dict(family.lora_options)
    if "unet_config" in options:
        counted = _stated_layers_per_block(file)
        stated = None if counted is None else SimpleNamespace(layers_per_block=counted)
        options["unet_config"] = stated or unet_config or options["unet_config"]
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
    if missing := [name for name in left if original.misses(name)]:
        raise AdapterFileError(
            f"{file.name}: {len(missing)} of {len(layers)} layers do not exist in the "
            f"{family.denoiser} of {family.name}: {first_few(missing)}. Check that the file is "
            "for this family. If it is, pass the state dict without these layers."
        )
    keys = {name: (layers[name].parts["down"], layers[name].parts["up"]) for name in left}
    for other, pair in through_diffusers(left, keys, family, options, file.name).items():
        _add(found, other, pair, file.name)
    if strange := [".".join(place) for place in found if not original.knows(*place)]:
        raise AdapterFileError(
            f"{file.name}: these layers do not exist in {family.name}: {first_few(strange)}. Check "
            "that the file is for this family. If it is, pass the state dict without these layers."
        )

    pairs: Pairs = {}
    for (component, path), pair in found.items():
        pairs.setdefault(component, {})[path] = pair
    return pairs, file.metadata


def _stated_layers_per_block(file: LoraFile) -> int | None:
    """Return the number by which ``gralora export`` counted the blocks of a UNet, if it says so.

    Without the base, it may have counted other than the base does.

    Raises:
        AdapterFileError: what the header says is damaged.
    """
    try:
        stated = parse_object(file.metadata.get(SOURCE_KEY, "{}")).get(LAYERS_PER_BLOCK_KEY)
        if stated is not None and not (is_integer(stated) and 0 < stated <= _MOST_LAYERS):
            raise ValueError(f"{LAYERS_PER_BLOCK_KEY} is {stated!r:.80}")
    except ValueError as error:
        raise AdapterFileError(
            f"{file.name}: metadata {SOURCE_KEY} is damaged: {error}. Export the file again"
        ) from error
    return stated


def _add(
    found: dict[tuple[str, str], Pair], place: tuple[str, str], pair: Pair, where: str
) -> None:
    if place in found:
        raise AdapterFileError(
            f"{where}: two layers of the file stand for {'.'.join(place)}. Leave out one of them."
        )
    found[place] = pair


def _scaled_pairs(
    file: LoraFile,
    layers: Mapping[str, Layer],
    header_alpha: HeaderAlpha | None,
    without_biases: bool,
) -> dict[str, Pair]:
    """Return the layers' pairs with their scales in ``up``.

    Raises:
        AdapterFileError: tensors do not form a pair, or their scaling is not known. The message
            names all of them.
    """
    scalings = LoraScalings(layers, file.metadata, file.configs, header_alpha, without_biases)
    scaled: dict[str, Pair] = {}
    by_problem: dict[str, list[str]] = {}
    for name, layer in layers.items():
        try:
            scaled[name] = _scaled(
                {p: file.tensors[k] for p, k in layer.parts.items()}, layer, scalings
            )
        except ValueError as error:
            by_problem.setdefault(str(error), []).append(name)
    problems = scalings.problems + [f"{first_few(n, 3)}: {p}" for p, n in by_problem.items()]
    if problems:
        raise AdapterFileError(f"{file.name}: " + ". ".join(problems) + ".")
    return scaled


def _scaled(parts: Mapping[str, Tensor], layer: Layer, scalings: LoraScalings) -> Pair:
    """Return the layer's pair with its scale in ``up``.

    Raises:
        ValueError: the tensors do not form a pair; the message says why.
    """
    if problem := layer.problem(parts):
        raise ValueError(problem)
    numbers = {part: t if t.dtype == torch.float64 else t.float() for part, t in parts.items()}
    for part, tensor in numbers.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{part} has NaN or infinite values")
    down, up = numbers["down"], numbers["up"].flatten(1)
    rank = up.shape[1]
    own = float(numbers["alpha"].reshape(())) if "alpha" in numbers else None
    alpha = scalings.alpha(layer, rank, own)
    if "mid" in numbers:  # Tucker's form of a convolution
        down = torch.einsum("srhw,ri->sihw", numbers["mid"], down.flatten(1))
    if not rank:  # an update of zeros
        return down.new_zeros(1, *down.shape[1:]), up.new_zeros(len(up), 1)
    if alpha is not None and alpha != rank:
        up = (up.double() * alpha / rank).to(up)
        if not torch.isfinite(up).all():
            raise ValueError(f"scaled by {alpha:g} / {rank}, it has infinite values")
    return down, up


def _of_norms_and_biases(
    file: LoraFile, layers: Mapping[str, Layer], others: list[str]
) -> list[str]:
    """Return the keys that only change norms and biases, which may be left out on request."""
    parts = [
        key
        for layer in layers.values()
        for part, key in layer.parts.items()
        if part in _OF_NORMS_AND_BIASES
    ]
    biases = [key for key in others if key.endswith(".bias")]
    return [key for key in parts + biases if file.tensors[key].dim() <= 1]


def _refuse_other_kinds(
    where: str, layers: Mapping[str, Layer], others: list[str], can_be_left_out: bool
) -> None:
    hint = ""
    if can_be_left_out:
        hint = (
            " The differences of norms and biases, which ComfyUI's Train LoRA also trains, can be "
            "left out with --leave_out_norms_and_biases; this does not change the other layers."
        )
    for kind in dict.fromkeys(layer.kind for layer in layers.values()):
        if kind != "LoRA":
            names = [name for name, layer in layers.items() if layer.kind == kind]
            remedy = _REMEDIES.get(kind, _OTHER_REMEDY)
            raise AdapterFileError(
                f"{where}: {len(names)} of {len(layers)} layers are {kind}, not LoRA "
                f"({first_few(names)}): {remedy}.{hint}"
            )
    known = {"down", "up", "alpha", "mid"}
    others = others + [
        key for layer in layers.values() for part, key in layer.parts.items() if part not in known
    ]
    if not layers:
        raise AdapterFileError(f"{where} is not a LoRA; its keys are {first_few(others)}.")
    if others:
        raise AdapterFileError(
            f"{where}: {len(others)} keys do not belong to the LoRA's pairs and cannot be "
            f"converted: {first_few(others)}. The result would differ without them; if you accept "
            f"that, pass the state dict without these keys.{hint}"
        )


def _refuse_other_families(
    file: LoraFile, layers: Mapping[str, Layer], family: ModelFamily
) -> None:
    if named := family_of_metadata(file.metadata):
        families, evidence = [named[0]], f"its {named[1]}"
    else:
        evidence = "the names and shapes of its layers"
        families = families_of_layers(
            {
                layer.plain_name: (file.tensors[layer.parts["down"]].shape[1], len(up))
                for layer in layers.values()
                if not layer.text_encoder
                for up in [file.tensors[layer.parts["up"]]]
            }
        )
    if families and family not in families:
        names = " or ".join(other.name for other in families)
        raise AdapterFileError(
            f"{file.name} is a LoRA for {names} according to {evidence}, not for {family.name}. "
            "Pass the family of its base."
        )
