"""A LoRA file of any program as pairs by component and layer, scaled; nothing is passed over.

Names are translated by ``lora_state_dict`` of the family's pipeline class in diffusers, which knows
those of kohya's sd-scripts, ComfyUI, XLabs and others. It reads some scales wrongly and passes over
what it does not know. So scales are folded into the factors before, and numbers in the factors'
place show afterwards which of them have come through.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils.state_dict_utils import (
    DIFFUSERS_OLD_TO_PEFT,
    DIFFUSERS_TO_PEFT,
    convert_state_dict,
    convert_unet_state_dict_to_peft,
)
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor

from ..families import ModelFamily, families_of_layers, family_of_metadata
from ..lora_keys import Layer, LoraScaling, group_layers, lora_scalings
from ..low_rank import Pair
from ..state import PEFT_CONFIG_NAME, PEFT_PREFIX, PEFT_WEIGHTS_NAME, looks_like_hub_id
from ..tensor_files import AdapterFileError, read_safetensors

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
#: Styles of names that diffusers' own models do not have: what is still called so was not read.
_FOREIGN = ("kohya", "OneTrainer", "LyCORIS", "ComfyUI")


def read_lora(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    family: ModelFamily,
    unet_config: Any = None,
    weight_name: str | None = None,
) -> tuple[Pairs, dict[str, str]]:
    """Return the pairs of a LoRA, in float32 at least, and the metadata of its file.

    Args:
        source: a file, PEFT's folder, a folder or a Hub repository with one file, or a state dict.
        unet_config: the base's, for names of original UNets; the family's usual one if not given.
        weight_name: which file in a folder or repository.

    Raises:
        AdapterFileError: not a LoRA, or one of another family; keys that cannot be used. All are
            named.
    """
    tensors, metadata, scalings, where = _read(source, family, weight_name)
    layers, others = group_layers(tensors)
    _refuse_other_kinds(where, layers, others)
    _refuse_other_families(where, tensors, layers, metadata, family)
    folded = _fold_scales(where, tensors, layers, scalings)
    options = dict(family.lora_options)
    if unet_config is not None and "unet_config" in options:
        options["unet_config"] = unet_config
    pairs = _convert(where, folded, family, options)
    _refuse_lost(where, layers, folded, family, options)
    return pairs, metadata


# -- files -----------------------------------------------------------------------------------------


def _read(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    family: ModelFamily,
    weight_name: str | None,
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, LoraScaling], str]:
    if isinstance(source, Mapping):
        return dict(source), {}, {}, "state dict"
    path = Path(source).expanduser()
    if not path.exists() and isinstance(source, str) and looks_like_hub_id(source):
        path = _download(source, weight_name)
    if path.is_dir() and (configs := _peft_configs(path, family)):
        tensors: dict[str, Tensor] = {}
        scalings = {}
        for component, config in configs.items():
            part, _ = read_safetensors(config.with_name(PEFT_WEIGHTS_NAME))
            tensors |= {f"{component}.{k.removeprefix(PEFT_PREFIX)}": t for k, t in part.items()}
            scalings[component] = LoraScaling(_lora_config(config))
        return tensors, {}, scalings, str(source)
    if path.is_dir():
        path = _only_file(path, weight_name)
    if not path.is_file():
        raise AdapterFileError(f"{source}: no such file or folder.")
    tensors, metadata = read_safetensors(path)
    try:
        return tensors, metadata, lora_scalings(metadata), str(path)
    except (ValueError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{path}: its metadata is damaged: {error}") from error


def _peft_configs(folder: Path, family: ModelFamily) -> dict[str, Path]:
    if (folder / PEFT_CONFIG_NAME).is_file():
        name = folder.name if folder.name in family.components else family.denoiser
        return {name: folder / PEFT_CONFIG_NAME}
    return {path.parent.name: path for path in sorted(folder.glob(f"*/{PEFT_CONFIG_NAME}"))}


def _lora_config(path: Path) -> dict[str, Any]:
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise AdapterFileError(f"{path}: not readable as JSON: {error}.") from error
    if (kind := config.get("peft_type")) != "LORA":
        raise AdapterFileError(f"{path}: a {kind} adapter, not a LoRA.")
    return config


def _only_file(folder: Path, weight_name: str | None) -> Path:
    if weight_name:
        return folder / weight_name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise AdapterFileError(
            f"{folder}: expected one .safetensors file, found {names}. Name it with weight_name."
        )
    return files[0]


def _download(repository: str, weight_name: str | None) -> Path:
    patterns = [weight_name or "*.safetensors", f"*{PEFT_CONFIG_NAME}"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise AdapterFileError(
            f"{repository}: neither a local path nor a repository on the Hub that could be "
            f"fetched: {error}"
        ) from error


# -- what cannot be read ---------------------------------------------------------------------------


def _refuse_other_kinds(where: str, layers: Mapping[str, Layer], others: list[str]) -> None:
    for kind in dict.fromkeys(layer.kind for layer in layers.values()):
        if kind != "LoRA":
            names = [name for name, layer in layers.items() if layer.kind == kind]
            remedy = _REMEDIES.get(kind, _OTHER_REMEDY)
            raise AdapterFileError(
                f"{where}: {len(names)} of {len(layers)} layers are {kind} and no LoRA "
                f"({_some(names)}): {remedy}."
            )
    known = {"down", "up", "alpha", "mid"}
    others = others + [
        key for layer in layers.values() for part, key in layer.parts.items() if part not in known
    ]
    if not layers:
        raise AdapterFileError(f"{where}: no LoRA; its keys are {_some(others)}.")
    if others:
        raise AdapterFileError(
            f"{where}: {len(others)} keys besides the pairs of the LoRA, which cannot be taken "
            f"over: {_some(others)}. Without them it is another adapter; if that is what you want, "
            "pass the state dict without these keys."
        )


def _refuse_other_families(
    where: str,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Layer],
    metadata: Mapping[str, str],
    family: ModelFamily,
) -> None:
    if named := family_of_metadata(metadata):
        families, told_by = [named[0]], f"its {named[1]}"
    else:
        told_by = "names and shapes of its layers"
        families = families_of_layers(
            {
                layer.plain_name: (tensors[layer.parts["down"]].shape[1], len(up))
                for layer in layers.values()
                if not layer.text_encoder
                for up in [tensors[layer.parts["up"]]]
            }
        )
    if families and family not in families:
        told = " or ".join(other.name for other in families)
        raise AdapterFileError(
            f"{where}: a LoRA for {told}, as {told_by} tell; not for {family.name}."
        )


def _refuse_lost(
    where: str,
    layers: Mapping[str, Layer],
    folded: Mapping[str, Tensor],
    family: ModelFamily,
    options: Mapping[str, Any],
) -> None:
    """Convert with a number in place of every pair, and name those that do not come out."""
    numbers = {name: float(number) for number, name in enumerate(layers, 1)}
    marked = dict(folded)
    for name, layer in layers.items():
        for part, value in (("down", 1.0), ("up", numbers[name])):
            marked[layer.parts[part]] = torch.full_like(folded[layer.parts[part]], value)
    converted = _convert(where, marked, family, options)
    found = {float(up.flatten()[0]) for part in converted.values() for _, up in part.values()}
    if lost := [name for name, number in numbers.items() if number not in found]:
        raise AdapterFileError(
            f"{where}: diffusers passes over {len(lost)} of {len(layers)} layers when it reads "
            f"this file for {family.name}: {_some(lost)}. They have no place in its pipelines; "
            "convert the file to diffusers' names, or pass the state dict without these layers."
        )


# -- scales and names ------------------------------------------------------------------------------


def _fold_scales(
    where: str,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Layer],
    scalings: Mapping[str, LoraScaling],
) -> dict[str, Tensor]:
    """The same tensors with every scale in ``up``: alpha is the rank, or is gone."""
    folded: dict[str, Tensor] = {}
    for name, layer in layers.items():
        down, up = (_finite(where, layer.parts[part], tensors) for part in ("down", "up"))
        rank = down.shape[0]
        if up.shape[1] != rank:
            raise AdapterFileError(
                f"{where}: {name} has {rank} rows in its down matrix and {up.shape[1]} columns in "
                "its up matrix."
            )
        if "mid" in layer.parts:  # Tucker's form of a convolution
            mid = _finite(where, layer.parts["mid"], tensors)
            down = torch.einsum("srhw,ri->sihw", mid, down.flatten(1))
        component, _, path = name.partition(".")
        if "alpha" in layer.parts:
            alpha = float(_finite(where, layer.parts["alpha"], tensors).reshape(-1)[0])
        else:
            scaling = scalings.get(component)
            alpha = scaling.alpha(path, rank) if scaling else float(rank)
        if not math.isfinite(alpha):
            raise AdapterFileError(f"{where}: {name} has alpha {alpha}.")
        folded[layer.parts["down"]] = down
        folded[layer.parts["up"]] = up if alpha == rank else (up.double() * alpha / rank).to(up)
        if name.startswith("lora_"):  # some of these converters insist on one
            folded[f"{name}.alpha"] = torch.tensor(float(rank))
    return folded


def _finite(where: str, key: str, tensors: Mapping[str, Tensor]) -> Tensor:
    tensor = tensors[key]
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    if not torch.isfinite(tensor).all():
        raise AdapterFileError(f"{where}: {key} holds NaN or infinite values.")
    return tensor


def _convert(
    where: str, tensors: Mapping[str, Tensor], family: ModelFamily, options: Mapping[str, Any]
) -> Pairs:
    pipeline_class = getattr(diffusers, family.pipeline_classes[0])
    try:
        result = pipeline_class.lora_state_dict(dict(tensors), **options)
    except (ValueError, KeyError, IndexError, AssertionError, NotImplementedError) as error:
        raise AdapterFileError(
            f"{where}: not read as a LoRA for {family.name} by diffusers: {error}"
        ) from error
    converted: dict[str, Tensor] = result[0] if isinstance(result, tuple) else result
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in converted.items():
        component, _, rest = key.partition(".")
        if component not in family.components:
            component, rest = family.denoiser, key
        if not key.endswith("alpha"):
            parts.setdefault(component, {})[rest] = tensor
    return {component: _pairs(where, part, component, family) for component, part in parts.items()}


def _pairs(
    where: str, tensors: dict[str, Tensor], component: str, family: ModelFamily
) -> dict[str, Pair]:
    to_peft: Callable[[dict[str, Tensor]], dict[str, Tensor]] = convert_unet_state_dict_to_peft
    if component != family.denoiser:
        mapping = {**DIFFUSERS_TO_PEFT, **DIFFUSERS_OLD_TO_PEFT}
        tensors = convert_state_dict(tensors, mapping)
    else:
        tensors = to_peft(tensors)
    layers, _ = group_layers(tensors)
    originals = {key.partition(".")[0] for key in family.single_file_keys}
    foreign = [
        name
        for name, layer in layers.items()
        if layer.style in _FOREIGN or name.partition(".")[0] in originals
    ]
    if foreign:
        raise AdapterFileError(
            f"{where}: diffusers does not read names such as {_some(foreign)} for {family.name}. "
            "Convert the file to diffusers' names, or check that it is for this family."
        )
    return {
        name: (tensors[layer.parts["down"]], tensors[layer.parts["up"]].flatten(1))
        for name, layer in layers.items()
    }


def _some(items: list[str], most: int = 5) -> str:
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest
