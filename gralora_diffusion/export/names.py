"""Key styles of LoRA files: each reader's names of layers, and the layers that it joins.

Sources: diffusers' ``load_lora_weights`` (PEFT's keys under the component's name); kohya's
sd-scripts (``networks/lora*.py``); ComfyUI (``comfy/lora.py``, ``model_lora_keys_unet`` and
``model_lora_keys_clip``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gralora_diffusion.families import ModelFamily
from gralora_diffusion.key_maps import Rule, Shape, layers_per_block, locate
from gralora_diffusion.lora_files.low_rank import join_rows

Pair = tuple[Tensor, Tensor]


class StyleError(ValueError):
    """A style has no name for a layer."""


@dataclass(frozen=True)
class Names:
    """The layers of one component in one style.

    Args:
        prefix: prefix of each name, including its separator.
        separator: separator between the parts of a path.
        rules: if given, names are those of the original layout.
        split_prefix: if given, layers that are joined in the original stay separate, under
            diffusers' names with this prefix. Otherwise they are joined.
        layers_per_block: the number by which the blocks of a UNet are counted in these names.
    """

    prefix: str
    separator: str = "."
    rules: tuple[Rule, ...] | None = None
    split_prefix: str | None = None
    layers_per_block: int | None = None

    def name(self, path: str) -> str:
        """Return the layer's name.

        Raises:
            StyleError: the original layout does not contain it.
        """
        if self.rules is not None:
            location = locate(path, self.rules)
            if location is None:
                raise StyleError(f"{path} has no name in the original layout")
            if self.split_prefix is not None and len(location.rule.names) > 1:
                return self.split_prefix + path
            path = location.original
        return self.prefix + path.replace(".", self.separator)

    def pairs(self, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
        """Return name -> pair; layers that the style joins become one pair with equal updates."""
        if self.rules is None:
            return {self.name(path): pair for path, pair in pairs.items()}
        named: dict[str, Pair] = {}
        joined: dict[str, dict[int, Pair]] = {}
        of_name: dict[str, Rule] = {}
        for path, (down, up) in pairs.items():
            name, location = self.name(path), locate(path, self.rules)
            assert location is not None  # or there would be no name
            rule = location.rule
            if len(rule.names) > 1 and self.split_prefix is None:
                joined.setdefault(name, {})[location.part] = (down, up)
                of_name[name] = rule
            elif rule.halves_swapped and up.shape[0] == 2 * down.shape[1]:
                named[name] = (down, torch.cat(up.chunk(2)[::-1]))
            else:
                named[name] = (down, up)
        for name, parts in joined.items():
            named[name] = _joined(parts, of_name[name])
        return named


def _joined(parts: Mapping[int, Pair], rule: Rule) -> Pair:
    """Join several layers; layers that were not trained get an update of zero."""
    number, (down, up) = next(iter(parts.items()))
    unit = up.shape[0] // rule.sizes[number]
    nothing = down.new_zeros(0, *down.shape[1:])
    return join_rows(
        [
            parts.get(part, (nothing, up.new_zeros(size * unit, 0)))
            for part, size in enumerate(rule.sizes)
        ]
    )


def find_names(
    family: ModelFamily, component: str, style: str, shapes: Mapping[str, Shape]
) -> Names:
    """Return the names of a component's layers in a style.

    Args:
        shapes: shapes by canonical key, of the weights to name, or of the whole model if it is
            known.

    Raises:
        StyleError: the style has no names for this component.
    """
    key_map, prefix = family.find_key_map(component, shapes), None
    if style == "diffusers":
        return Names(f"{component}.")
    if component != family.denoiser and style == "comfyui":
        prefix = family.comfyui_prefix(component, shapes)
    elif component in family.kohya_prefixes:
        prefix = family.kohya_prefixes[component] + "_"
    if component == family.denoiser and key_map:
        rules = tuple(key_map.rules_of(shapes))
        counted = layers_per_block(shapes) if "unet_config" in family.lora_options else None
        if style == "kohya" and prefix:
            if not family.kohya_original_names:
                return Names(prefix, "_")
            return Names(prefix, "_", rules, None, counted)
        # ComfyUI finds the rows of split layers itself; they are a third of the size of joined ones
        return Names("diffusion_model.", ".", rules, f"{component}.", counted)
    if prefix is None:
        raise StyleError(f"style {style} has no names for this {component} of {family.name}")
    return Names(prefix, "_" if style == "kohya" else ".")
