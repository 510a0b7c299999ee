"""Translate names in LoRA files that follow a base's original layout to diffusers' names.

These are the names of ComfyUI, and those of kohya's sd-scripts for transformers and text encoders.
diffusers only reads some of them, and FLUX.1's only at its published width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gralora_diffusion.families import ModelFamily
from gralora_diffusion.key_maps import KeyMap, Shape, locate
from gralora_diffusion.lora_files.low_rank import Pair

#: Prefixes of the denoiser's layers, in any layout.
_DENOISER = (
    *("diffusion_model.", "model.diffusion_model.", "base_model.model."),
    *("lora_transformer.", ""),  # OneTrainer's FLUX.2 first
)
_KOHYA_DENOISER = "lora_unet_"
#: Prefixes of diffusers' paths with ``_`` in place of every dot: OneTrainer's and LyCORIS's.
FLAT_DIFFUSERS = ("lora_transformer_", "lycoris_")
_COMFYUI_ENCODER = re.compile(r"text_encoders\.(\w+)\.transformer\.(.+)")
_KOHYA_ENCODER = re.compile(r"(lora_te\d?)_(.+)")
#: Parts of paths in CLIP and T5 that contain an underscore.
_WORDS = re.compile(r"text_model|text_projection|self_attn|(?:q|k|v|out)_proj|wi_[01]")
#: Paths of their layers that can be adapted.
_ENCODER_LAYER = re.compile(
    r"(?:text_model\.)?encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])"
    r"|text_projection"
    r"|encoder\.block\.\d+\.layer\.\d+\.(?:SelfAttention\.[qkvo]|DenseReluDense\.(?:wi(_[01])?|wo))"
)
#: ComfyUI's name of T5, and the prefix of the paths of its layers.
_T5, _T5_BLOCKS = "t5xxl", "encoder.block."


@dataclass(frozen=True)
class Place:
    """A layer of diffusers, and the rows of the LoRA's layer that form it, in their order."""

    component: str
    path: str
    rows: tuple[slice, ...]

    def pair_of(self, down: Tensor, up: Tensor) -> Pair:
        """Return the layer's part of the LoRA layer's pair, (R, in, ...) and (out, R).

        If layers were adapted one by one and then joined, ``up`` is block-diagonal. The part that
        only concerns the other layers is left out.
        """
        up = torch.cat([up[rows] for rows in self.rows])
        used = up.any(dim=0)
        return (down[used], up[:, used]) if used.any() else (down, up)


class OriginalNames:
    """The names of one family.

    Args:
        names: names of all layers of the LoRA.
        layers_per_block: of the base's UNet, if it has one.
    """

    def __init__(self, family: ModelFamily, names: Iterable[str], layers_per_block: int) -> None:
        self._family = family
        key_maps = family.original_key_maps.get(family.denoiser, ())
        self._key_map = key_maps[0] if key_maps else KeyMap(("",), ())
        self._rules = self._key_map.rules_of(_telling_keys(names, layers_per_block))
        # a UNet's rules stand for blocks, and the rest of a name is ambiguous without dots
        whole = not callable(self._key_map.rules)
        self._flat = [(_flat(rule.original), rule) for rule in self._rules if whole]
        self._flat_own = [
            (_flat(name), name) for rule in self._rules if whole for name in rule.names
        ]

    def places(self, name: str, shape: Shape) -> list[Place]:
        """Return the layers of diffusers for a LoRA's layer; none if its name has another style.

        Args:
            shape: shape of its update, (out, in, ...).
        """
        if match := _COMFYUI_ENCODER.fullmatch(name):
            return self._in_text_encoder(self._called(match[1]), match[2])
        if match := _KOHYA_ENCODER.fullmatch(name):
            path = _dotted(match[2])
            return self._in_text_encoder(self._numbered(match[1], path), path)
        if name.startswith(_KOHYA_DENOISER):
            for pattern, rule in self._flat:
                if match := pattern.fullmatch(name.removeprefix(_KOHYA_DENOISER)):
                    return self._in_denoiser(_filled(rule.original, match), shape)
            return []
        if name.startswith(FLAT_DIFFUSERS):
            rest = name.removeprefix(next(s for s in FLAT_DIFFUSERS if name.startswith(s)))
            for pattern, own in self._flat_own:
                if match := pattern.fullmatch(rest):
                    whole = (slice(None),)
                    return [Place(self._family.denoiser, _filled(own, match), whole)]
            return []
        for start in _DENOISER:
            if name.startswith(start):
                return self._in_denoiser(name.removeprefix(start), shape)
        return []

    def misses(self, name: str) -> bool:
        """Whether a name is unknown although all names of its style are known."""
        return bool(self._flat_own) and name.startswith(FLAT_DIFFUSERS)

    def knows(self, component: str, path: str) -> bool:
        """Whether a component of the family may have a layer with this path in diffusers."""
        if not self._family.original_key_maps.get(component):
            return True
        if component == self._family.denoiser:
            return locate(path, self._key_map.rules_of([path])) is not None
        return _ENCODER_LAYER.fullmatch(path) is not None

    def _in_denoiser(self, path: str, shape: Shape) -> list[Place]:
        """Find a path of the original layout, or a path of diffusers if it has no other meaning."""
        component, key = self._family.denoiser, f"{path}.weight"
        if locate(path, self._rules) and not self._is_original(path):
            return [Place(component, path, (slice(None),))]
        original = KeyMap(self._key_map.prefixes, self._rules).read({key: shape})
        if not original:
            return []
        rows: dict[str, list[tuple[int, slice]]] = {}
        start = 0
        for part in original[0].parts:
            stop = start + part.stop - part.start
            name = part.key.removesuffix(".weight")
            rows.setdefault(name, []).append((part.start, slice(start, stop)))
            start = stop
        return [
            Place(component, name, tuple(piece for _, piece in sorted(pieces, key=lambda p: p[0])))
            for name, pieces in rows.items()
        ]

    def _is_original(self, path: str) -> bool:
        """Whether a layer has exactly this name in the original."""
        matches = (rule.original_pattern.match(path) for rule in self._rules)
        return any(match and not match["rest"] for match in matches)

    def _in_text_encoder(self, component: str | None, path: str) -> list[Place]:
        known = component is not None and self.knows(component, path)
        return [Place(component or "", path, (slice(None),))] if known else []

    def _called(self, name: str) -> str | None:
        """Return the text encoder with that name in ComfyUI."""
        return next(
            (
                component
                for component in self._family.all_text_encoders
                for key_map in self._family.original_key_maps.get(component, ())
                if key_map.comfyui_name == name
            ),
            None,
        )

    def _numbered(self, prefix: str, path: str) -> str | None:
        """Return the text encoder with that prefix in sd-scripts; T5 has several prefixes."""
        if path.startswith(_T5_BLOCKS):
            return self._called(_T5)
        prefixes = {start: c for c, start in self._family.kohya_prefixes.items()}
        alone = {"lora_te": "text_encoder", "lora_te1": "text_encoder"}
        component = {**alone, **prefixes}.get(prefix)
        return component if component in self._family.all_text_encoders else None


def _telling_keys(names: Iterable[str], layers_per_block: int) -> list[str]:
    """Return keys in diffusers' names from which the rules of the UNet with these names follow.

    Levels that do not exist do no harm, because the blocks are numbered consecutively.
    """
    names = [name.removeprefix(start) for name in names for start in _DENOISER[:1]]
    blocks = [int(n) for name in names for n in re.findall(r"(?:input|output)_blocks\.(\d+)", name)]
    levels = max(blocks, default=0) // (layers_per_block + 1) + 1
    # in a block with attention, the sampler comes third
    attending = [int(n) for name in names for n in re.findall(r"output_blocks\.(\d+)\.2\.", name)]
    return [
        "conv_out.weight",  # so that the other keys determine all rules
        *(f"up_blocks.{level}.resnets.{layers_per_block}.conv1" for level in range(levels)),
        *(f"up_blocks.{n // (layers_per_block + 1)}.attentions.0.norm" for n in attending),
    ]


def _flat(original: str) -> re.Pattern[str]:
    """Return the pattern of a name with underscores in place of dots."""
    return re.compile(re.escape(original.replace(".", "_")).replace(re.escape("*"), r"(\d+)"))


def _filled(name: str, match: re.Match[str]) -> str:
    numbers = iter(match.groups())
    return re.sub(r"\*", lambda _: next(numbers), name)


def _dotted(name: str) -> str:
    """Return a path in CLIP or T5 with its dots restored."""
    marked = _WORDS.sub(lambda match: match[0].replace("_", "\0"), name)
    return marked.replace("_", ".").replace("\0", "_")
