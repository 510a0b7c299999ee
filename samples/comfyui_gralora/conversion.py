"""Convert a native GraLoRA file to an ordinary LoRA with ComfyUI's names of a model's weights.

These are pure functions of tensors, names and shapes. They need torch and safetensors, but neither
ComfyUI nor gralora_diffusion. docs/file_format.md of gralora_diffusion describes the format, and
docs/how_it_works.md the mathematics.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .path_patterns import check_cost, path_pattern

METADATA_KEY = "gralora_adapter_metadata"
FORMAT_VERSION = 1
DENOISERS = ("unet", "transformer")
#: ComfyUI's class of a model -> the families of base models that it may be.
FAMILIES = {
    "SD15": ("stable-diffusion",),
    "SD20": ("stable-diffusion",),
    "SDXL": ("stable-diffusion-xl",),
    "SDXLRefiner": ("stable-diffusion-xl",),
    "SD3": ("stable-diffusion-3",),
    "Flux": ("flux",),
    "Flux2": ("flux2", "flux2-klein"),
}
#: FLUX.2's layers that are not in ComfyUI's table of diffusers' names -> their original names.
FLUX2_NAMES = {
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
}
CLIP_ENCODERS = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",)}
LANGUAGE_MODELS = ("mistral3_24b", "qwen3_4b", "qwen3_8b")
#: Maximum rank of a layer as a LoRA, above the width of any layer of these models. Conversion makes
#: the factors k times as large, and a file may claim any k.
MAX_RANK = 1 << 14
_DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
_MOST_AXES = 5  # a slice per block, rank and width, and a kernel of two axes
_PATTERNS = ("rank_pattern", "k_pattern", "alpha_pattern")
_FACTOR = re.compile(r"(.+)\.(gralora_[AB](?:_general\.weight)?)")


class GraloraError(ValueError):
    """A file cannot be used, or not with this model. The message says what to do.

    Names from the file are in it, so control characters are shown as escapes.
    """

    def __init__(self, message: str) -> None:
        visible = (c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message)
        super().__init__("".join(visible))


@dataclass(frozen=True)
class Layer:
    """One adapted layer as a LoRA pair: ``up @ down`` is its update, with the scaling in ``up``.

    ``down`` is (rank, in, *kernel), ``up`` (out, rank, *1 per kernel axis), both float32.
    """

    component: str
    path: str
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class GraloraFile:
    """The layers of a file, and the family of base models in it; None if it names no family."""

    layers: tuple[Layer, ...]
    family: str | None


# -- the file --------------------------------------------------------------------------------------


def read_gralora(path: str) -> GraloraFile:
    """Read a native file, ``pytorch_gralora_weights.safetensors`` or with another name.

    Raises:
        GraloraError: the file is damaged or of another kind, or a LoRA cannot represent it.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe is waited for without end
            raise OSError("not a regular file")
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise GraloraError(
            f"{path}: not a complete safetensors file ({error}). If it was copied or downloaded, "
            "copy or download it again."
        ) from error
    description = _description(path, metadata, tensors)
    layers = []
    for (component, layer), factors in _factors(path, tensors).items():
        where = f"{path}, {component}.{layer}"
        if component not in description["components"]:
            raise GraloraError(f"{where}: the metadata does not describe {component}.")
        up, down = _lora_pair(where, description["components"][component], layer, factors)
        layers.append(Layer(component, layer, up, down))
    return GraloraFile(tuple(layers), description.get("family"))


def _description(path: str, metadata: Mapping[str, str], keys: Iterable[str]) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        if any("gralora_" in key for key in keys):
            raise GraloraError(
                f"{path}: the metadata {METADATA_KEY} is missing, so alpha is not known. Save it "
                "with `pipe.save_gralora_weights(...)`."
            )
        raise GraloraError(f"{path}: not a GraLoRA file. Use the node Load LoRA for a LoRA.")
    try:
        description = json.loads(metadata[METADATA_KEY])
        version, components = description["format_version"], description["components"]
        kinds = {str(c.get("peft_type", "GRALORA")).split(".")[-1] for c in components.values()}
        for config in components.values():
            for name in _PATTERNS:
                check_cost(config.get(name) or {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise GraloraError(f"{path}: its metadata is damaged: {error!r}") from error
    if version != FORMAT_VERSION:
        raise GraloraError(
            f"{path}: the file has format_version {version}, but this node reads "
            f"{FORMAT_VERSION}. Replace the folder comfyui_gralora by that of a newer "
            "gralora-diffusion."
        )
    if kinds - {"GRALORA"}:
        raise GraloraError(
            f"{path}: this is an adapter of another kind, {', '.join(sorted(kinds))}, not GraLoRA."
        )
    return description


def _factors(path: str, tensors: Mapping[str, Tensor]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Return (component, layer) -> name of a factor -> tensor."""
    factors: dict[tuple[str, str], dict[str, Tensor]] = {}
    others = []
    for key, tensor in tensors.items():
        component, _, rest = key.partition(".")
        if (found := _FACTOR.fullmatch(rest)) is None:
            others.append(key)
        elif tensor.dtype not in _DTYPES or tensor.ndim > _MOST_AXES:
            raise GraloraError(
                f"{path}: {key} has the dtype {tensor.dtype} and {tensor.ndim} axes, which no "
                "factor has."
            )
        elif not torch.isfinite(tensor.float()).all():  # fp8 has no isfinite of its own
            raise GraloraError(f"{path}: {key} has NaN or infinite values; the training diverged.")
        else:
            factors.setdefault((component, found[1]), {})[found[2]] = tensor
    if others:
        raise GraloraError(
            f"{path}: {len(others)} tensors are not factors of an update (trained biases or whole "
            f"modules), such as {others[0]}. A LoRA cannot represent them: fuse the adapter into "
            "its base with `gralora export --format checkpoint` and load that file."
        )
    if not factors:
        raise GraloraError(f"{path}: this file contains no layers.")
    return factors


def _setting(config: Mapping[str, Any], pattern: str, field: str, layer: str) -> Any:
    """Return a layer's value in a config: the first key that matches counts, as in PEFT."""
    for key, value in (config.get(pattern) or {}).items():
        if path_pattern(key).matches_end(layer):
            return value
    return config[field]


def _lora_pair(
    where: str, config: Mapping[str, Any], layer: str, factors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return up and down of a layer, scaled, with the hybrid part as further rows and columns."""
    try:
        rank = _setting(config, "rank_pattern", "r", layer)
        k = _setting(config, "k_pattern", "gralora_k", layer)
        alpha = float(_setting(config, "alpha_pattern", "alpha", layer))
        hybrid = config.get("hybrid_r") or 0
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise GraloraError(f"{where}: the metadata is damaged: {error!r}") from error
    whole = all(type(number) is int for number in (rank, k, hybrid))
    if not (whole and min(rank, k) > 0 and hybrid >= 0 and math.isfinite(alpha)):
        raise GraloraError(
            f"{where}: the metadata is damaged: rank {rank!r:.40}, k {k!r:.40}, hybrid_r "
            f"{hybrid!r:.40} and alpha {alpha} are no ranks and scale of a layer."
        )
    if k * rank > MAX_RANK:
        raise GraloraError(
            f"{where}: rank {rank} and k {k} are a LoRA of rank {k * rank:,}; this node converts "
            f"up to {MAX_RANK:,}. Fuse the adapter with `gralora export --format checkpoint`."
        )
    names = ("A", "B", "A_general.weight", "B_general.weight") if hybrid else ("A", "B")
    wanted = {f"gralora_{name}" for name in names}
    if set(factors) != wanted:
        raise GraloraError(f"{where}: it has {sorted(factors)}, but must have {sorted(wanted)}.")
    A, B = factors["gralora_A"], factors["gralora_B"]
    right = A.ndim in (3, 5) and A.shape[::2][:2] == (k, rank) and B.shape[:2] == (k, rank)
    if not right or B.ndim != 3 or rank % k:
        raise GraloraError(
            f"{where}: shapes {tuple(A.shape)} and {tuple(B.shape)} do not fit rank {rank} and "
            f"k {k} in the metadata."
        )
    up, down = lora_factors(A.float(), B.float())
    if hybrid:
        plain_down = factors["gralora_A_general.weight"].float()
        plain_up = factors["gralora_B_general.weight"].float()
        wanted_up = (len(up), hybrid, *[1] * (plain_up.ndim - 2))
        if (plain_down.shape, plain_up.shape) != ((hybrid, *down.shape[1:]), wanted_up):
            raise GraloraError(f"{where}: the general pair does not fit hybrid_r {hybrid}.")
        down, up = torch.cat([down, plain_down]), torch.cat([up, plain_up.flatten(1)], dim=1)
    up = up * (alpha / (rank + hybrid))
    return up.reshape(*up.shape, *[1] * (down.ndim - 2)).contiguous(), down.contiguous()


def lora_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return up (out, k r) and down (k r, in, *kernel) with exactly the unscaled update of A and B.

    Block (j, n) of the update is ``(A[n][:, chunk j] @ B[j][chunk n]).T``: row (n, j, s) of
    ``down`` reads input block n, and the same column of ``up`` feeds output block j.

    Args:
        A: (k, in / k, r, *kernel), one slice per input block n.
        B: (k, r, out / k), one slice per output block j.
    """
    k, i, r, *kernel = A.shape
    s, o = r // k, B.shape[2]
    block = torch.arange(k)
    down = A.new_zeros(k, r, k, i, *kernel)
    down[block, :, block] = A.transpose(1, 2)
    up = B.new_zeros(k, o, k, k, s)
    up[block, :, :, block] = B.reshape(k, k, s, o).permute(0, 3, 1, 2)
    return up.reshape(k * o, k * r), down.reshape(k * r, k * i, *kernel)


# -- the names -------------------------------------------------------------------------------------


def comfyui_names(component: str, path: str) -> Sequence[str]:
    """Return ComfyUI's possible names of a layer; it depends on the model which one applies.

    ``component`` and ``path`` are diffusers' and transformers' names, such as ``unet`` and
    ``mid_block.attentions.0.proj_in``.
    """
    if component == "unet":
        return (f"lora_unet_{path.replace('.', '_')}",)
    if component == "transformer":
        if path in FLUX2_NAMES:
            return (f"diffusion_model.{FLUX2_NAMES[path]}",)
        return (f"transformer.{path}",)
    encoders: Sequence[str] = LANGUAGE_MODELS
    if path.startswith(("text_model.", "encoder.layers.", "embeddings.", "text_projection")):
        encoders = CLIP_ENCODERS.get(component, ())
        if not path.startswith(("text_model.", "text_projection")):
            path = f"text_model.{path}"  # ComfyUI has this level, transformers 5 does not
    elif path.startswith(("encoder.block.", "shared")):
        encoders = ("t5xxl",)
    path = path.replace("model.language_model.", "model.")
    return tuple(f"text_encoders.{encoder}.transformer.{path}" for encoder in encoders)


def check_family(file: GraloraFile, class_names: Iterable[str]) -> None:
    """Raise GraloraError unless the file's family is that of the model.

    Args:
        class_names: names of the class of ComfyUI's model config and of its base classes, in the
            order of inheritance.
    """
    names = list(class_names)
    known = next((FAMILIES[name] for name in names if name in FAMILIES), ())
    if file.family is not None and file.family not in known:
        raise GraloraError(
            f"This GraLoRA was trained on a base of the family {file.family}, but the model is "
            f"{names[0]} ({' or '.join(known) or 'not a supported family'}). Load a model of the "
            "same family."
        )


def lora_for(
    layers: Iterable[Layer], targets: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Return the layers as the tensors of a LoRA file that ComfyUI applies completely.

    Args:
        targets: ComfyUI's name of a layer -> key of its weight, or a tuple of that key, the layer's
            rows as (0, first, count) or None, and possibly more.
        shapes: key of a weight -> its shape.

    Raises:
        GraloraError: ComfyUI does not have a layer, or has it with another shape. The message names
            it.
    """
    lora: dict[str, Tensor] = {}
    unknown, misfits = [], []
    for layer in layers:
        path = f"{layer.component}.{layer.path}"
        name = next((n for n in comfyui_names(layer.component, layer.path) if n in targets), None)
        if name is None:
            unknown.append(path)
            continue
        want, got = _matrix_shape(targets[name], shapes), (len(layer.up), layer.down[0].numel())
        if want is not None and want != got:
            misfits.append(f"{path}: {want} in the model, {got} in the file")
            continue
        lora[f"{name}.lora_up.weight"] = layer.up
        lora[f"{name}.lora_down.weight"] = layer.down
        lora[f"{name}.alpha"] = torch.tensor(float(len(layer.down)))
    if unknown or misfits:
        raise GraloraError("\n".join(_problems(unknown, misfits)))
    return lora


def weight_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the logical shape of each weight by its key.

    ``state_dict()`` would give the shape in storage: two values of NVFP4 are one byte, and GGUF has
    blocks. Parameters have the logical shape.
    """
    both = {"remove_duplicate": False}  # tied weights have two keys
    tensors = (*model.named_buffers(**both), *model.named_parameters(**both))
    return {key: tuple(tensor.shape) for key, tensor in tensors}


def _matrix_shape(target: Any, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int] | None:
    """Return rows and columns of a target's weight; None if its shape is not known."""
    key, rows = (target, None) if isinstance(target, str) else target[:2]
    if key not in shapes:
        return None
    out, *rest = shapes[key]
    return out if rows is None else rows[2], torch.Size(rest).numel()


def _problems(unknown: Sequence[str], misfits: Sequence[str]) -> Iterator[str]:
    text = [name for name in unknown if not name.startswith(DENOISERS)]
    rest = [name for name in unknown if name.startswith(DENOISERS)]
    if text:
        yield (
            f"{len(text)} layers of this GraLoRA are in a text encoder that is not loaded or has "
            f"another type ({', '.join(sorted({name.split('.')[0] for name in text}))}; such as "
            f"{text[0]}). Load that text encoder, too, or set strength_clip to 0 to leave it out."
        )
    if rest:
        yield (
            f"The model does not have {len(rest)} layers of this GraLoRA, such as {rest[0]}: it "
            "was trained on another base. Load a model of the same kind."
        )
    if misfits:
        yield (
            f"{len(misfits)} layers of this GraLoRA have another shape (out, in) than in the "
            f"model, such as {misfits[0]}: it was trained on another base. Load a model of the "
            "same kind."
        )
