"""Key styles of LoRA files: what each reader calls a layer, and what it wants as one layer.

Sources: diffusers' ``load_lora_weights`` (PEFT's keys under the component's name); kohya's
sd-scripts (``networks/lora*.py``); ComfyUI (``comfy/lora.py``, ``model_lora_keys_unet`` and
``model_lora_keys_clip``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..families import ModelFamily
from ..layouts import Layout, Rule, locate
from ..low_rank import join_rows

STYLES = ("comfyui", "kohya", "diffusers")
Pair = tuple[Tensor, Tensor]


class StyleError(ValueError):
    """A layer that a style has no name for."""


@dataclass(frozen=True)
class Names:
    """The layers of one component in one style.

    Args:
        prefix: what each name begins with, its separator included.
        separator: between the parts of a path.
        rules: if given, names are the original layout's, and layers that are one there are joined.
    """

    prefix: str
    separator: str = "."
    rules: tuple[Rule, ...] | None = None

    def name(self, path: str) -> str:
        """Return the layer's name.

        Raises:
            StyleError: the original layout has no place for it.
        """
        if self.rules is not None:
            location = locate(path, self.rules)
            if location is None:
                raise StyleError(f"{path} has no name in the original layout")
            path = location.original
        return self.prefix + path.replace(".", self.separator)

    def pairs(self, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
        """Return name -> pair; of layers that are one there, one pair with the same updates."""
        if self.rules is None:
            return {self.name(path): pair for path, pair in pairs.items()}
        named: dict[str, Pair] = {}
        joined: dict[str, dict[int, Pair]] = {}
        of_name: dict[str, Rule] = {}
        for path, (down, up) in pairs.items():
            name, location = self.name(path), locate(path, self.rules)
            assert location is not None  # or there would be no name
            rule = location.rule
            if len(rule.names) > 1:
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
    """One layer of several; those that were not trained get an update of nothing."""
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
    family: ModelFamily,
    component: str,
    style: str,
    keys: Iterable[str],
    layout: Layout | None,
) -> Names:
    """Return the names of a component's layers in a style.

    Args:
        keys: canonical, of the weights of all layers that will be named, or of the whole model
            where it is known.
        layout: that of the component, if it has one.

    Raises:
        StyleError: the style has no names for this component.
    """
    if style == "diffusers":
        return Names(f"{component}.")
    if layout is None:
        raise StyleError(f"style {style} has no names for {component} of {family.name}")
    rules = tuple(layout.rules_of(keys))
    if component != family.denoiser:
        if style == "comfyui":
            return Names(f"text_encoders.{layout.comfyui_name}.transformer.")
        return Names(f"{family.kohya_prefixes[component]}_", "_")
    if style == "kohya":
        prefix = f"{family.kohya_prefixes[component]}_"
        return Names(prefix, "_", rules if family.kohya_original_names else None)
    if any(len(rule.names) > 1 for rule in rules):
        # ComfyUI finds the rows of each itself: a third of the size of what joined ones take
        return Names(f"{component}.")
    return Names("diffusion_model.", ".", rules)
