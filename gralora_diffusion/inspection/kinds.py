"""Find a file's kind and its family of models from its keys, metadata and config files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gralora_diffusion.base_models.single_file_header import OriginalHeader
from gralora_diffusion.families import (
    ModelFamily,
    families_of_layers,
    family_of_metadata,
    find_pipeline_family,
    get_family,
    list_families,
)
from gralora_diffusion.io.file_names import METADATA_KEY
from gralora_diffusion.io.json_files import parse_object
from gralora_diffusion.lora_files.keys import Layer, group_layers

from .source import Source

_MODELS_OF_DIFFUSERS = ("down_blocks.", "transformer_blocks.", "single_transformer_blocks.")


@dataclass
class Kind:
    """The kind of a source.

    Attributes:
        title: a description in words.
        adapter: kind of layer (GraLoRA, LoRA, LoHa, ...) -> number of layers; empty if the source
            is not an adapter.
        style: the program or library whose layer names an adapter uses.
        layers: the adapter's layers by name.
        others: keys of an adapter file that do not belong to any layer.
        families: the families that it may be for; several if they cannot be distinguished.
        told_by: the evidence for the families.
    """

    title: str
    adapter: Counter[str] = field(default_factory=Counter)
    style: str | None = None
    layers: dict[str, Layer] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    families: list[ModelFamily] = field(default_factory=list)
    told_by: str = ""


def find_kind(source: Source) -> Kind:
    """Return the kind of ``source``.

    Raises:
        AdapterFileError: its kind is not known.
    """
    layers, others = group_layers(source.headers)
    if METADATA_KEY in source.metadata or any("peft_type" in c for c in source.configs.values()):
        kind = _described_adapter(source, layers, others)
    elif len(layers) and sum(len(layer.parts) for layer in layers.values()) > len(others):
        kind = _adapter(layers, others)
    else:
        kind = _model(source)
    if not kind.families:
        kind.families, kind.told_by = _families(source, kind)
    return kind


def _described_adapter(source: Source, layers: dict[str, Layer], others: list[str]) -> Kind:
    kind = _adapter(layers, others)
    if METADATA_KEY in source.metadata:
        kind.title, kind.style = "GraLoRA adapter, native file", None
    else:
        types = sorted({str(c.get("peft_type")) for c in source.configs.values()})
        named = " and ".join(kind.adapter) or ", ".join(types)
        kind.title, kind.style = f"{named} adapter, PEFT folder", "PEFT"
    return kind


def _adapter(layers: dict[str, Layer], others: list[str]) -> Kind:
    kinds = Counter(layer.kind for layer in layers.values())
    styles = Counter(layer.style for layer in layers.values())
    style = styles.most_common(1)[0][0] if styles else "bare"
    what = " and ".join(kinds)
    if "GraLoRA" in kinds:
        title = "GraLoRA weights without their config, so rank and alpha are not known"
    elif set(kinds) == {"difference"}:
        title = f"differences of whole weights (.diff), {style} names"
    else:
        title = f"{what} file, {style} names"
    return Kind(title, kinds, style, layers, others)


def _model(source: Source) -> Kind:
    name = str(source.configs.get("", {}).get("_class_name", ""))
    if source.is_pipeline:
        return _named(Kind(f"pipeline in diffusers' layout ({name})"), name)
    file = OriginalHeader(source.headers, source.metadata)
    if families := file.families:
        kind = Kind(f"original single-file checkpoint{_particulars(file, families[0])}")
        kind.families, kind.told_by = families, "its keys"
        return kind
    if name or file.begins_with(_MODELS_OF_DIFFUSERS):
        return Kind(f"one model in diffusers' layout{f' ({name})' if name else ''}")
    some, known = ", ".join(sorted(file.keys)[:3]), ", ".join(list_families())
    raise source.error(
        f"this is neither a known adapter nor a base of {known} (its keys: {some}, ...)"
    )


def _particulars(file: OriginalHeader, family: ModelFamily) -> str:
    text = "" if file.prefix else " of the denoiser alone"
    if file.quantized:
        text += f", quantized ({file.quantized})"
    if kind := file.other_kind(family):
        text += f", which diffusers takes for {kind!r}"
    return text


def _named(kind: Kind, class_name: str) -> Kind:
    if family := find_pipeline_family(class_name):
        kind.families, kind.told_by = [family], "the pipeline's class"
    return kind


def _families(source: Source, kind: Kind) -> tuple[list[ModelFamily], str]:
    name = described(source.metadata).get("family")
    if name in list_families():
        return [get_family(name)], "its metadata"
    if named := family_of_metadata(source.metadata):
        return [named[0]], named[1]
    widths = {
        layer.plain_name: found
        for layer in kind.layers.values()
        if not layer.text_encoder and (found := layer_widths(layer, source))
    }
    families = families_of_layers(widths)
    return families, "names and shapes of its layers" if families else ""


def layer_widths(layer: Layer, source: Source) -> tuple[int, int] | None:
    """Return inputs and outputs of an adapted layer, if they follow from its parts' shapes."""
    shapes = {part: source.headers[key].shape for part, key in layer.parts.items()}
    shapes = {part: shape for part, shape in shapes.items() if len(shape) > 1}
    if {"down", "up"} <= set(shapes):
        return shapes["down"][1], shapes["up"][0]
    if {"gralora_A", "gralora_B"} <= set(shapes):
        (k, i, *_), o = shapes["gralora_A"], shapes["gralora_B"][-1]
        return k * i, k * o
    if {"hada_w1_a", "hada_w1_b"} <= set(shapes) and "hada_t1" not in shapes:
        return shapes["hada_w1_b"][1], shapes["hada_w1_a"][0]
    if "diff" in shapes:
        return shapes["diff"][1], shapes["diff"][0]
    return None


def described(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the description in the metadata of a native file; empty if it is damaged."""
    try:
        return parse_object(metadata.get(METADATA_KEY, "{}"))
    except ValueError:
        return {}


def component_of(layer: Layer, kind: Kind, source: Source) -> str:
    """Return the part of the pipeline that a layer belongs to: its attribute, if it is known."""
    first = layer.name.partition(".")[0]
    if first in source.configs or first in {f.denoiser for f in kind.families}:
        return first
    if layer.name.startswith("text_encoders."):
        return ".".join(layer.name.split(".")[:2])
    prefixes = {f"{p}_": c for family in kind.families for c, p in family.kohya_prefixes.items()}
    if named := next((c for prefix, c in prefixes.items() if layer.name.startswith(prefix)), None):
        return named
    if layer.text_encoder:
        return layer.text_encoder
    denoisers = {family.denoiser for family in kind.families}
    return denoisers.pop() if len(denoisers) == 1 else "denoiser"
