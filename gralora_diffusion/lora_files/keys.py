"""Find the tensors of each layer in adapter files of other programs, by the endings of their keys.

A key is the layer's name and an ending that identifies one of the layer's tensors. The endings are
those that ComfyUI reads (``comfy/lora.py``, ``comfy/weight_adapter/``) and that diffusers and PEFT
write.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

#: Key of a header under which diffusers keeps PEFT's config.
DIFFUSERS_METADATA = "lora_adapter_metadata"
#: Ending of a key -> the part of the layer that its tensor is.
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
#: XLabs' names of joined queries, keys and values and of the output projection, with a number.
_NUMBERED = re.compile(r"(.+\.processor\.(?:qkv|proj)_lora[12]?)\.(down|up)\.weight")
_LONGEST_FIRST = sorted(_ENDINGS, key=len, reverse=True)

#: Kinds of adapters and the parts that define them; the first kind with all its parts counts.
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

#: Prefix of layer names -> the style of the file.
_STYLES = {
    **dict.fromkeys(("lora_transformer_", "lora_transformer."), "OneTrainer"),
    "lora_unet_": "kohya",
    "lora_te": "kohya",
    "lora_prior_": "kohya",
    "lycoris_": "LyCORIS",
    **dict.fromkeys(("diffusion_model.", "model.diffusion_model."), "ComfyUI"),
    "text_encoders.": "ComfyUI",
    "base_model.model.": "PEFT",
    "unet.": "diffusers",
    "transformer.": "diffusers",
    "text_encoder": "diffusers",
}
#: Prefix of the layer names of a text encoder -> its attribute of the pipeline.
_TEXT_ENCODERS = {
    **dict.fromkeys(("lora_te1_", "lora_te_"), "text_encoder"),
    **{f"lora_te{n}_": f"text_encoder_{n}" for n in (2, 3, 4)},
    **{f"text_encoder{n}.": f"text_encoder{n}" for n in ("", "_2", "_3", "_4")},
    "text_encoders.": "text encoders",
}
_BEGINNINGS = sorted(
    {*_STYLES, *_TEXT_ENCODERS} - {"text_encoder", "lora_te"}, key=len, reverse=True
)


_FLAT_STYLES = ("kohya", "OneTrainer", "LyCORIS")

_MOST_AXES = 5  # of a convolution over three axes
#: Part -> least and largest number of axes: a convolution's factors also have those of its kernel.
_AXES = {
    **dict.fromkeys(("down", "up", "lokr_w2", "gralora_A_general", "gralora_B_general"), (2, 5)),
    **dict.fromkeys(("mid", "lokr_t2", "hada_t1", "hada_t2"), (3, 5)),
    **{f"hada_{name}": (2, 2) for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
    **{f"lokr_{name}": (2, 2) for name in ("w1", "w1_a", "w1_b", "w2_a", "w2_b")},
    "gralora_A": (3, 5),
    "gralora_B": (3, 3),
    "alpha": (0, 1),
}
#: Part -> the sizes that must not be 0.
_SIZED: dict[str, Callable[[Sequence[int]], Sequence[int]]] = {
    "down": lambda shape: shape[1:],
    "up": lambda shape: shape[:1],
    "gralora_A": lambda shape: shape,
    "gralora_B": lambda shape: shape,
}
#: torch's names of the dtypes that factors may have; 8-bit values are read without scales.
_DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


class Stored(Protocol):
    """What is asked of a tensor here: torch's are such, and those of ``io.arrays``."""

    @property
    def dtype(self) -> Any: ...

    @property
    def shape(self) -> Sequence[int]: ...


@dataclass
class Layer:
    """One adapted layer: part -> key."""

    name: str
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The kind of adapter: GraLoRA, LoRA, DoRA, LoHa, LoKr, OFT, GLoRA or difference."""
        return next((kind for kind, parts in _KINDS if parts <= set(self.parts)), "unknown")

    @property
    def style(self) -> str:
        """The program or library whose names the layer follows."""
        return next((s for start, s in _STYLES.items() if self.name.startswith(start)), "bare")

    @property
    def text_encoder(self) -> str | None:
        """The text encoder in the name, if there is one."""
        return next((c for start, c in _TEXT_ENCODERS.items() if self.name.startswith(start)), None)

    @property
    def path(self) -> str:
        """The name without its prefixes."""
        name = self.name
        while start := next((s for s in _BEGINNINGS if name.startswith(s)), None):
            name = name.removeprefix(start)
        return name

    @property
    def is_flat(self) -> bool:
        """Whether the path has ``_`` in place of every dot."""
        return self.style in _FLAT_STYLES and "." not in self.path

    @property
    def plain_name(self) -> str:
        """The path with ``_`` in place of every dot."""
        return re.sub(r"\W", "_", self.path.replace(".processor.", "."))

    def problem(self, tensors: Mapping[str, Stored]) -> str | None:
        """Return why these tensors, by part, do not form a layer of this kind; None if they do.

        A rank of 0 is valid: such a layer has no update.
        """
        for part, tensor in tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in _DTYPES and (part != "alpha" or not dtype.startswith(("int", "uint"))):
                return f"{part} has dtype {dtype}; expected {', '.join(_DTYPES)}"
            fewest, most = _AXES.get(part, (0, _MOST_AXES))
            if not fewest <= len(tensor.shape) <= most:
                allowed = f"{fewest}" if fewest == most else f"{fewest} to {most}"
                return f"{part} has {len(tensor.shape)} axes; expected {allowed}"
            if part in _SIZED and 0 in _SIZED[part](tensor.shape):
                return f"{part} is empty: its shape is {tuple(tensor.shape)}"
        if "alpha" in tensors and (count := math.prod(tensors["alpha"].shape)) != 1:
            return f"alpha has {count} values; expected one"
        for what, one, other in _sizes_that_agree({p: t.shape for p, t in tensors.items()}):
            if one != other:
                return f"{what} differ: {one} and {other}"
        return None


def _sizes_that_agree(shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, int, int]]:
    """Yield a description of sizes that must be equal in two parts of a layer, and both sizes."""
    down, up, mid = (shapes.get(part) for part in ("down", "up", "mid"))
    if down is not None and up is not None:
        if mid is None:
            yield "rows of its down matrix and columns of its up matrix", down[0], up[1]
        else:
            yield "columns of its up matrix and first axis of its middle", up[1], mid[0]
            yield "rows of its down matrix and second axis of its middle", down[0], mid[1]
            yield "the kernel of its down matrix and 1", math.prod(down[2:]), 1
        yield "the kernel of its up matrix and 1", math.prod(up[2:]), 1
    a, b = shapes.get("gralora_A"), shapes.get("gralora_B")
    if a is not None and b is not None:
        yield "blocks of its gralora_A and gralora_B", a[0], b[0]
        yield "rank of its gralora_A and gralora_B", a[2], b[1]
        yield "its rank and a multiple of k", a[2], a[2] // max(a[0], 1) * a[0]
        general = shapes.get("gralora_A_general"), shapes.get("gralora_B_general")
        if general[0] is not None and general[1] is not None:
            yield "rank of its general pair's factors", general[0][0], general[1][1]
            yield "inputs of its general pair and of its blocks", general[0][1], a[0] * a[1]
            yield "outputs of its general pair and of its blocks", general[1][0], b[0] * b[2]
    for first, second in (
        *(("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b")),
        *(("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")),
    ):
        if {first, second} <= set(shapes) and not {"lokr_t2", "hada_t1"} & set(shapes):
            yield f"columns of {first} and rows of {second}", shapes[first][1], shapes[second][0]


def _split(key: str) -> tuple[str, str | None]:
    """Return the layer's name and the part."""
    if numbered := _NUMBERED.fullmatch(key):
        return numbered[1], numbered[2]
    for ending in _LONGEST_FIRST:
        if key.endswith(ending):
            return key.removesuffix(ending), _ENDINGS[ending]
    return key, None


def group_layers(keys: Iterable[str]) -> tuple[dict[str, Layer], list[str]]:
    """Return the layers in an adapter file's keys, and the keys that do not belong to any layer.

    If two keys stand for the same part of a layer, the second is in the rest.
    """
    layers: dict[str, Layer] = {}
    rest = []
    for key in keys:
        name, part = _split(key)
        if part is None or layers.setdefault(name, Layer(name)).parts.setdefault(part, key) != key:
            rest.append(key)
    # an incomplete pair, or a model's own parameter with one of these endings
    for name, layer in list(layers.items()):
        if layer.kind == "unknown":
            rest += layers.pop(name).parts.values()
    return layers, rest
