"""Translate LoRA names with diffusers' own ``lora_state_dict``, and find the layers it ignores.

It knows the names of kohya's sd-scripts for UNets, of XLabs, OneTrainer and others, and its own
older ones. It leaves out names that it does not know, often with only a line in the log. It is
therefore called twice: the second time, numbers in place of the factors show which layers remain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers.utils.state_dict_utils import (
    DIFFUSERS_OLD_TO_PEFT,
    DIFFUSERS_TO_PEFT,
    UNET_TO_DIFFUSERS,
    convert_state_dict,
)
from torch import Tensor

from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.lora_files.keys import group_layers
from gralora_diffusion.lora_files.low_rank import Pair

#: Styles of names that diffusers' own models do not have: names in such a style were not read.
_FOREIGN = ("kohya", "OneTrainer", "LyCORIS", "ComfyUI", "PEFT")
#: Endings that diffusers mistakes for kohya's names although the names are its own.
_PLAIN_ENDINGS = {".lora_down.weight": ".lora_A.weight", ".lora_up.weight": ".lora_B.weight"}


def through_diffusers(
    pairs: Mapping[str, Pair],
    keys: Mapping[str, tuple[str, str]],
    family: ModelFamily,
    options: Mapping[str, Any],
    where: str,
) -> dict[tuple[str, str], Pair]:
    """Return (component, path) -> pair.

    Args:
        pairs: scaled pairs by the layers' names in the file.
        keys: name -> the keys of both factors in the file.
        options: options for ``lora_state_dict``.
        where: name of the file for messages.

    Raises:
        AdapterFileError: diffusers does not read the names or ignores some. The message names them.
    """
    if not pairs:
        return {}
    found = _translated(pairs, keys, family, options, where)
    numbers = {name: float(number) for number, name in enumerate(pairs, 1)}
    marked = {
        name: (torch.ones_like(down), torch.full_like(up, numbers[name]))
        for name, (down, up) in pairs.items()
    }
    came = {
        float(up.flatten()[0])
        for _, up in _translated(marked, keys, family, options, where).values()
    }
    if lost := [name for name, number in numbers.items() if number not in came]:
        raise AdapterFileError(
            f"{where}: diffusers ignores {len(lost)} of {len(pairs)} layers when it reads this "
            f"file for {family.name}: {first_few(lost)}. Its pipelines do not have these layers. "
            "Convert the file to diffusers' names, or pass the state dict without these layers."
        )
    return found


def _translated(
    pairs: Mapping[str, Pair],
    keys: Mapping[str, tuple[str, str]],
    family: ModelFamily,
    options: Mapping[str, Any],
    where: str,
) -> dict[tuple[str, str], Pair]:
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        own = name.partition(".")[0] in family.components
        for key, factor in zip(keys[name], pair, strict=True):
            for ending, plain in _PLAIN_ENDINGS.items() if own else ():
                key = key.replace(ending, plain)
            tensors[key] = factor
        if name.startswith("lora_"):  # some converters require an alpha; the scale is folded in
            tensors[f"{name}.alpha"] = torch.tensor(float(len(pair[0])))
    pipeline_class = getattr(diffusers, family.pipeline_classes[0])
    try:
        result = pipeline_class.lora_state_dict(tensors, **options)
    except (ValueError, KeyError, IndexError, AssertionError, NotImplementedError) as error:
        raise AdapterFileError(
            f"{where}: diffusers does not read these names for {family.name} "
            f"({first_few(list(pairs))}): {error or type(error).__name__}"
        ) from error
    converted: dict[str, Tensor] = result[0] if isinstance(result, tuple) else result
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in converted.items():
        component, _, rest = key.partition(".")
        if component not in family.components:
            component, rest = family.denoiser, key
        if not key.endswith("alpha"):
            parts.setdefault(component, {})[rest] = tensor
    return {
        (component, path): pair
        for component, part in parts.items()
        for path, pair in _pairs(part, component, family, where).items()
    }


def _pairs(
    tensors: dict[str, Tensor], component: str, family: ModelFamily, where: str
) -> dict[str, Pair]:
    mapping = {**DIFFUSERS_TO_PEFT, **DIFFUSERS_OLD_TO_PEFT}
    if component == family.denoiser:
        mapping = UNET_TO_DIFFUSERS
    tensors = convert_state_dict(tensors, mapping)
    layers, _ = group_layers(tensors)
    if foreign := [name for name, layer in layers.items() if layer.style in _FOREIGN]:
        raise AdapterFileError(
            f"{where}: diffusers does not read names such as {first_few(foreign)} for "
            f"{family.name}. Convert the file to diffusers' names, or check that it is for "
            "this family."
        )
    return {
        name: (tensors[layer.parts["down"]], tensors[layer.parts["up"]].flatten(1))
        for name, layer in layers.items()
    }
