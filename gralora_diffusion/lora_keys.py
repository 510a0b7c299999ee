"""How the adapter files of other programs name what belongs to one layer, whatever its own name.

A key is the layer's name and an ending that says which of the layer's tensors it is. Endings are
those that ComfyUI reads (``comfy/lora.py``, ``comfy/weight_adapter/``), diffusers and PEFT write.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .config_values import pattern_key

#: Key of a header under which diffusers keeps PEFT's config.
DIFFUSERS_METADATA = "lora_adapter_metadata"
#: Ending of a key -> the part of the layer that it holds.
_ENDINGS = {
    **dict.fromkeys(
        (
            *(".lora_down.weight", "_lora.down.weight", ".lora.down.weight"),
            *(".lora_A.weight", ".lora_A.default.weight", ".lora_A"),
            ".lora_linear_layer.down.weight",
        ),
        "down",
    ),
    **dict.fromkeys(
        (
            *(".lora_up.weight", "_lora.up.weight", ".lora.up.weight"),
            *(".lora_B.weight", ".lora_B.default.weight", ".lora_B"),
            ".lora_linear_layer.up.weight",
        ),
        "up",
    ),
    ".lora_mid.weight": "mid",
    ".lora_B.bias": "up_bias",
    ".lora_A.bias": "down_bias",
    ".alpha": "alpha",
    **dict.fromkeys(
        (
            *(".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
            ".lora_magnitude_vector.default.weight",
        ),
        "magnitude",
    ),
    **{f".{name}": name for name in ("gralora_A", "gralora_B")},
    **{f".{name}.weight": name for name in ("gralora_A_general", "gralora_B_general")},
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{
        f".lokr_{name}": f"lokr_{name}"
        for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    },
    **{f".{name}": "oft" for name in ("oft_blocks", "oft_diag", "oft_R.weight")},
    **{f".{name}.weight": f"glora_{name}" for name in ("a1", "a2", "b1", "b2")},
    **{f".{name}": name for name in ("diff", "diff_b", "set_weight", "w_norm", "b_norm")},
    ".reshape_weight": "reshape",
}
#: XLabs' names of queries, keys and values in one and of what follows them, which end in a number.
_NUMBERED = re.compile(r"(.+\.processor\.(?:qkv|proj)_lora[12]?)\.(down|up)\.weight")
_LONGEST_FIRST = sorted(_ENDINGS, key=len, reverse=True)

#: Kinds of adapters and parts that make a layer one of them; the first that it has all of counts.
_KINDS: tuple[tuple[str, set[str]], ...] = (
    ("GraLoRA", {"gralora_A", "gralora_B"}),
    ("DoRA", {"magnitude", "down", "up"}),
    ("LoRA", {"down", "up"}),
    ("LoHa", {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
    *(
        ("LoKr", {first, second})
        for first in ("lokr_w1", "lokr_w1_a")
        for second in ("lokr_w2", "lokr_w2_a")
    ),
    ("OFT", {"oft"}),
    ("GLoRA", {"glora_a1", "glora_a2"}),
    *(("difference", {part}) for part in ("diff", "diff_b", "set_weight", "w_norm", "b_norm")),
)

#: How names of layers begin -> the style of the file.
_STYLES = {
    "lora_transformer_": "OneTrainer",
    "lora_unet_": "kohya",
    "lora_te": "kohya",
    "lora_prior_": "kohya",
    "lycoris_": "LyCORIS",
    "diffusion_model.": "ComfyUI",
    "text_encoders.": "ComfyUI",
    "base_model.model.": "PEFT",
    "unet.": "diffusers",
    "transformer.": "diffusers",
    "text_encoder": "diffusers",
}
#: How names of layers begin that say the text encoder -> its attribute of the pipeline.
_TEXT_ENCODERS = {
    **dict.fromkeys(("lora_te1_", "lora_te_"), "text_encoder"),
    **{f"lora_te{n}_": f"text_encoder_{n}" for n in (2, 3, 4)},
    **{f"text_encoder{n}.": f"text_encoder{n}" for n in ("", "_2", "_3", "_4")},
    "text_encoders.": "text encoders",
}
_BEGINNINGS = sorted(
    {*_STYLES, *_TEXT_ENCODERS} - {"text_encoder", "lora_te"}, key=len, reverse=True
)


@dataclass
class Layer:
    """One adapted layer: part -> key."""

    name: str
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Which adapter it is: GraLoRA, LoRA, DoRA, LoHa, LoKr, OFT, GLoRA, difference."""
        return next((kind for kind, parts in _KINDS if parts <= set(self.parts)), "unknown")

    @property
    def style(self) -> str:
        """Whose way of naming layers it is."""
        return next((s for start, s in _STYLES.items() if self.name.startswith(start)), "bare")

    @property
    def text_encoder(self) -> str | None:
        """The text encoder that the name says it is in, if any."""
        return next((c for start, c in _TEXT_ENCODERS.items() if self.name.startswith(start)), None)

    @property
    def plain_name(self) -> str:
        """The name without what it begins with, and ``_`` for every dot."""
        name = self.name
        while start := next((s for s in _BEGINNINGS if name.startswith(s)), None):
            name = name.removeprefix(start)
        return re.sub(r"\W", "_", name.replace(".processor.", "."))


@dataclass(frozen=True)
class LoraScaling:
    """What PEFT's config of a LoRA says of its layers; without one alpha is the rank.

    ``config`` has the fields of PEFT's ``LoraConfig``.
    """

    config: Mapping[str, Any]

    def alpha(self, path: str, rank: int) -> float:
        """Alpha of the layer at ``path``, by which over its rank the update is scaled.

        That of rank-stabilized LoRA, which is scaled by alpha over the root of the rank, is made up
        for.
        """
        pattern = self.config.get("alpha_pattern") or {}
        key = pattern_key(pattern, path)
        alpha = float(pattern.get(key, self.config.get("lora_alpha", rank)))
        return alpha * math.sqrt(rank) if self.config.get("use_rslora") else alpha


def lora_scalings(metadata: Mapping[str, str]) -> dict[str, LoraScaling]:
    """Return component -> scaling of diffusers' ``lora_adapter_metadata``, where a file has it.

    Raises:
        ValueError: it is no JSON of that form.
    """
    values: dict[str, dict[str, Any]] = {}
    for name, value in dict(json.loads(metadata.get(DIFFUSERS_METADATA, "{}"))).items():
        component, _, field_name = name.partition(".")
        values.setdefault(component, {})[field_name] = value
    return {component: LoraScaling(config) for component, config in values.items()}


def _split(key: str) -> tuple[str, str | None]:
    """The layer's name and the part."""
    if numbered := _NUMBERED.fullmatch(key):
        return numbered[1], numbered[2]
    for ending in _LONGEST_FIRST:
        if key.endswith(ending):
            return key.removesuffix(ending), _ENDINGS[ending]
    return key, None


def group_layers(keys: Iterable[str]) -> tuple[dict[str, Layer], list[str]]:
    """Return the layers that an adapter file's keys name, and the keys that are of none.

    Two keys for one part of a layer leave the second among the rest.
    """
    layers: dict[str, Layer] = {}
    rest = []
    for key in keys:
        name, part = _split(key)
        if part is None or layers.setdefault(name, Layer(name)).parts.setdefault(part, key) != key:
            rest.append(key)
    # half a pair, or an ending that a model's own parameter happens to have
    for name, layer in list(layers.items()):
        if layer.kind == "unknown":
            rest += layers.pop(name).parts.values()
    return layers, rest
