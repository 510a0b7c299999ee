"""Identify a file: an adapter of this or another program, a checkpoint, or a pipeline."""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping

from gralora_diffusion.io.json_files import parse_object
from gralora_diffusion.io.tensor_files import SUB_BYTE
from gralora_diffusion.key_maps import DENOISER

from .facts import ComponentFacts, Inspection, LayerFacts
from .kinds import Kind, component_of, find_kind
from .layers import Settings, layer_facts
from .source import Source

__all__ = ["ComponentFacts", "Inspection", "LayerFacts", "inspect_file"]

_VAES = ("first_stage_model.", "vae.")
_FIRST = ("unet", "transformer", "denoiser", "model")


def inspect_file(
    path: str | os.PathLike[str], *, check: bool = False, sha256: bool = False
) -> Inspection:
    """Inspect a file or folder.

    All tensors of an adapter are read, one layer after the other. Of other files only the headers
    are read, so a checkpoint of any size takes no time.

    Args:
        check: also read all tensors of a checkpoint, and list those with NaN or infinity.
        sha256: hash the files.

    Raises:
        AdapterFileError: the path does not exist, a file is not a complete safetensors file, or its
            kind is not known.
    """
    source = Source(path)
    kind = find_kind(source)
    layers, problems, non_finite = _read_adapter(source, kind) if kind.layers else ([], [], None)
    if check and not kind.layers:
        non_finite = _non_finite(source, source.headers)
    norms = [layer.norm for layer in layers if layer.norm is not None]
    ranks = [layer.effective_rank for layer in layers if layer.effective_rank is not None]
    return Inspection(
        path=str(source.path),
        title=kind.title,
        families=[family.name for family in kind.families],
        family_told_by=kind.told_by,
        style=kind.style,
        bytes=sum(file.stat().st_size for file in source.files),
        files=[str(file) for file in source.files],
        tensors=len(source.headers),
        parameters=sum(math.prod(h.shape) for k, h in source.headers.items() if _counts(k)),
        dtypes=dict(Counter(h.dtype_name for h in source.headers.values()).most_common()),
        components=_components(source, kind),
        layers=layers,
        others=kind.others,
        problems=problems,
        norm=math.hypot(*norms) if norms and len(norms) == len(layers) else None,
        median_effective_rank=statistics.median(ranks) if ranks else None,
        trigger=_trigger(source.metadata),
        metadata=source.metadata,
        non_finite=non_finite,
        sha256=source.sha256() if sha256 else None,
    )


def _read_adapter(source: Source, kind: Kind) -> tuple[list[LayerFacts], list[str], list[str]]:
    """Return the layers, problems with the file's scaling information, and non-finite tensors."""
    settings, layers = Settings(source, kind), []
    non_finite = _non_finite(source, kind.others)
    for layer in kind.layers.values():
        parts = {part: source.read(key) for part, key in layer.parts.items()}
        component = component_of(layer, kind, source)
        layers.append(layer_facts(layer, component, source, settings, parts))
        non_finite += [layer.parts[part] for part, t in parts.items() if not t.is_finite()]
    return layers, settings.lora.problems, non_finite


def _non_finite(source: Source, keys: Iterable[str]) -> list[str]:
    return [
        key
        for key in keys
        if source.headers[key].dtype_name not in SUB_BYTE and not source.read(key).is_finite()
    ]


def _counts(key: str) -> bool:
    """Whether a tensor holds parameters and not a setting."""
    return not key.endswith(".alpha")


def _components(source: Source, kind: Kind) -> dict[str, ComponentFacts]:
    owners = {
        key: component_of(layer, kind, source)
        for layer in kind.layers.values()
        for key in layer.parts.values()
    }
    components: dict[str, ComponentFacts] = {}
    for key, header in source.headers.items():
        name = owners.get(key) or _part_of_a_model(key, source, kind)
        facts = components.setdefault(name, ComponentFacts())
        facts.tensors += 1
        facts.parameters += math.prod(header.shape) if _counts(key) else 0
    for layer in kind.layers.values():
        components[component_of(layer, kind, source)].layers += 1
    return dict(sorted(components.items(), key=lambda item: (item[0] not in _FIRST, item[0])))


def _part_of_a_model(key: str, source: Source, kind: Kind) -> str:
    if kind.layers:
        return "other"
    if source.is_pipeline:
        return key.partition(".")[0]
    denoiser = kind.families[0].denoiser if kind.families else "model"
    if key.startswith(DENOISER):
        return denoiser
    if key.startswith(_VAES):
        return "vae"
    for family in kind.families:
        for name in family.all_text_encoders:
            prefixes = [p for one in family.original_key_maps.get(name, ()) for p in one.prefixes]
            if key.startswith(tuple(prefixes)):
                return name
    whole = any(other.startswith(DENOISER) for other in source.headers)
    return "other" if whole else denoiser


def _trigger(metadata: Mapping[str, str]) -> str | None:
    """Return the trigger phrase: the one in the metadata, or the most frequent tag."""
    for name in ("modelspec.trigger_phrase", "trained_words", "instance_prompt"):
        if metadata.get(name):
            return metadata[name]
    try:
        folders = parse_object(metadata.get("ss_tag_frequency", "{}"))
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({tag: int(count) for tag, count in tags.items()})
        most = counts.most_common(2)
    except (ValueError, TypeError, AttributeError, OverflowError):
        return None
    if not most or (len(most) > 1 and most[0][1] == most[1][1]):
        return None  # none is more frequent than the others
    return most[0][0].strip()
