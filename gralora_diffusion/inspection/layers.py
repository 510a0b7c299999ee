"""Facts of one adapted layer of each kind, computed from its factors without the dense update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from gralora_diffusion.adapters.placement.layer_config import invalid_values, layer_settings
from gralora_diffusion.adapters.placement.path_patterns import PatternError
from gralora_diffusion.io.arrays import Array, StoredArray
from gralora_diffusion.io.file_names import METADATA_KEY, PEFT_PREFIX
from gralora_diffusion.lora_files.keys import Layer
from gralora_diffusion.lora_files.scaling import LoraScalings
from gralora_diffusion.lora_files.spectrum import (
    Values,
    effective_rank,
    gralora_singular_values,
    matrix_singular_values,
    singular_values,
)

from .facts import LayerFacts
from .kinds import Kind, described, layer_widths
from .source import Source


class Settings:
    """Rank, k and alpha as the metadata and configs of a source state them.

    Raises:
        AdapterFileError: the config of a GraLoRA adapter is damaged.
    """

    def __init__(self, source: Source, kind: Kind) -> None:
        self._source = source
        components = described(source.metadata).get("components", {})
        if not isinstance(components, Mapping):
            raise source.error(f"its metadata {METADATA_KEY} is damaged")
        self._gralora = {name: _config(values, name, source) for name, values in components.items()}
        of_loras = {}
        for name, values in source.configs.items():
            if str(values.get("peft_type")).endswith("GRALORA"):
                self._gralora[name] = _config(values, name, source)
            elif "peft_type" in values:
                of_loras[name] = values
        if METADATA_KEY in source.metadata and not self._gralora:
            raise source.error(f"its metadata {METADATA_KEY} is damaged")
        loras = {name: layer for name, layer in kind.layers.items() if "down" in layer.parts}
        self.lora = LoraScalings(loras, source.metadata, of_loras)

    def gralora(self, name: str) -> dict[str, float]:
        """Return alpha and scaling of a GraLoRA layer, if a config sets them.

        Raises:
            AdapterFileError: a pattern of the config cannot be matched in bounded time.
        """
        component, path = _of_a_component(name, self._gralora)
        if component is None:
            return {}
        config = self._gralora[component]
        try:
            r, _, alpha = layer_settings(config, path)
        except PatternError as error:
            raise self._source.error(f"a pattern of its config is {error}") from error
        return {"alpha": float(alpha), "scaling": alpha / (r + config.hybrid_r)}


#: PEFT's defaults of the fields that are read here.
_DEFAULTS = {"hybrid_r": 0, "gralora_dropout": 0.0, "bias": "none"}


def _config(values: Any, name: str, source: Source) -> Any:
    """Return a file's config under PEFT's names, without PEFT's class: it takes seconds to import.

    A field of a later version does no harm here, because the adapter is not loaded.
    """
    if not isinstance(values, Mapping):
        raise source.error(f"{name}: the adapter's config is not a mapping but {values!r}")
    config: Any = SimpleNamespace(**_DEFAULTS | dict(values))
    if missing := [field for field in ("r", "gralora_k", "alpha") if field not in values]:
        problems = [f"these fields are missing: {', '.join(missing)}"]
    else:
        try:
            problems = invalid_values(config)
        except TypeError as error:
            problems = [str(error)]
    if problems:
        raise source.error(f"{name}: the adapter's config is not valid: {'; '.join(problems)}")
    return config


def _of_a_component(name: str, components: Mapping[str, Any]) -> tuple[str | None, str]:
    component, _, path = name.partition(".")
    if component not in components:
        component, path = "", name
    return (component if component in components else None), path.removeprefix(PEFT_PREFIX)


def layer_facts(
    layer: Layer, component: str, source: Source, settings: Settings, parts: dict[str, StoredArray]
) -> LayerFacts:
    """Return the facts of a layer from its tensors by part."""
    facts = LayerFacts(
        path=layer.name.replace(PEFT_PREFIX, "", 1),
        component=component,
        kind=layer.kind,
        parameters=sum(math.prod(t.shape) for part, t in parts.items() if part != "alpha"),
    )
    widths = layer_widths(layer, source)
    facts.inputs, facts.outputs = widths or (None, None)
    facts.problem = layer.problem(parts)
    if facts.problem:
        return facts
    if layer.kind == "GraLoRA":
        _describe_gralora(facts, parts, settings.gralora(layer.name))
    else:
        _describe_other(facts, layer, parts, settings)
    if all(part.is_finite() for part in parts.values()):
        _measure(facts, {part: stored.values().astype("f8") for part, stored in parts.items()})
    return facts


def _describe_gralora(
    facts: LayerFacts, parts: dict[str, StoredArray], settings: dict[str, float]
) -> None:
    facts.k, _, facts.rank, *facts.kernel = parts["gralora_A"].shape
    general = parts.get("gralora_A_general")
    facts.hybrid_rank = 0 if general is None else general.shape[0]
    facts.alpha, facts.scaling = settings.get("alpha"), settings.get("scaling")


def _describe_other(
    facts: LayerFacts, layer: Layer, parts: dict[str, StoredArray], settings: Settings
) -> None:
    for part in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if part in parts:
            facts.rank = parts[part].shape[0]
            break
    kernel = parts.get("mid", parts.get("down", parts.get("diff")))
    facts.kernel = [] if kernel is None else list(kernel.shape[2:])
    facts.scaling = 1.0
    own = float(parts["alpha"].values().reshape(())) if "alpha" in parts else None
    if facts.rank is None:
        facts.alpha = own
        return
    try:
        is_lora = "down" in parts
        facts.alpha = settings.lora.alpha(layer, facts.rank, own) if is_lora else own
    except ValueError as error:
        facts.problem, facts.scaling = str(error), None
        return
    if facts.alpha is not None:
        # a layer of rank 0 has no update to scale
        facts.scaling = facts.alpha / facts.rank if facts.rank else None


def _measure(facts: LayerFacts, parts: dict[str, Array]) -> None:
    if "diff" in parts:
        facts.norm = _norm(parts["diff"])
        return
    if facts.rank == 0:  # ranks were pruned until none was left
        facts.norm = facts.effective_rank = 0.0
        return
    values = _singular_values(parts)
    if values is None or not np.isfinite(values).all():
        return
    facts.effective_rank = effective_rank(values)
    if facts.scaling is not None:
        facts.norm = abs(facts.scaling) * _norm(values)


def _norm(values: Array) -> float:
    return float(np.linalg.norm(values.reshape(-1)))


def _singular_values(parts: dict[str, Array]) -> Values | None:
    """Return those of the unscaled update; None if they would need the dense update."""
    if {"gralora_A", "gralora_B"} <= set(parts):
        general = None
        if {"gralora_A_general", "gralora_B_general"} <= set(parts):
            general = parts["gralora_A_general"], _matrix(parts["gralora_B_general"])
        return gralora_singular_values(parts["gralora_A"], parts["gralora_B"], general)
    if {"down", "up"} <= set(parts):
        down, up = parts["down"], _matrix(parts["up"])
        if "mid" in parts:  # Tucker's form, of convolutions
            down = np.einsum("srhw,ri->sihw", parts["mid"], _matrix(down), optimize=True)
        return singular_values(down, up)
    first, second = _kronecker_factor(parts, "lokr_w1"), _kronecker_factor(parts, "lokr_w2")
    if first is None or second is None or "lokr_t2" in parts:
        return None
    products = np.outer(*[matrix_singular_values(_matrix(factor)) for factor in (first, second)])
    return -np.sort(-products, axis=None)


def _kronecker_factor(parts: dict[str, Array], name: str) -> Array | None:
    if {f"{name}_a", f"{name}_b"} <= set(parts):
        product: Array = parts[f"{name}_a"] @ _matrix(parts[f"{name}_b"])
        return product
    return parts.get(name)


def _matrix(factor: Array) -> Array:
    """Return a factor with its kernel's axes joined to its columns."""
    return factor.reshape(len(factor), math.prod(factor.shape[1:]))
