"""Find the scaling of a LoRA's factors from its tensors, its header and PEFT's config.

A layer's update is ``alpha / rank * up @ down``. Alpha is in a tensor (kohya's sd-scripts,
ComfyUI), in the header (diffusers), or in ``adapter_config.json`` (PEFT). If it is in none of them,
it is the rank, as in every other reader.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gralora_diffusion.adapters.placement.layer_config import is_finite_number, pattern_key
from gralora_diffusion.adapters.placement.path_patterns import PatternError
from gralora_diffusion.io.json_files import parse as parse_json

from .keys import DIFFUSERS_METADATA, Layer
from .peft_config import BESIDES, OTHER_FORMULA, invalid_scaling, other_adapter

#: How to treat an alpha that only a separate field of the header states; see ``LoraScalings``.
HeaderAlpha = Literal["apply", "ignore"]
HEADER_ALPHA: tuple[HeaderAlpha, ...] = ("apply", "ignore")
#: Fields of a header that state one alpha for all layers. The field of sd-scripts is often not a
#: number, because sd-scripts also writes a tensor for every layer.
_HEADER_ALPHAS = ("lora_alpha", "network_alpha", "alpha", "ss_network_alpha")
_OF_SD_SCRIPTS = "ss_network_alpha"
#: sd-scripts' arguments that make alpha differ between layers.
_ALPHAS_BY_LAYER = ("conv_alpha", "block_alphas", "conv_block_alphas")

#: Styles of names whose readers use alpha from a tensor whenever it exists.
_BY_TENSOR = ("kohya", "OneTrainer", "LyCORIS", "ComfyUI")
#: Relative difference of alphas that still count as equal: rounding to half precision.
_ROUNDING = 2.0**-8


@dataclass(frozen=True)
class _Config:
    """The validated scaling fields of PEFT's config."""

    rank: int | None
    alpha: float | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    stabilized: bool

    def alpha_of(self, path: str, rank: int, own: float | None) -> float | None:
        """Return alpha of a layer, adjusted for rank-stabilized LoRA, which divides by the root."""
        wanted = self.rank_pattern.get(pattern_key(self.rank_pattern, path), self.rank)
        if wanted is not None and rank and wanted != rank:
            raise ValueError(f"the config says rank {wanted}, but the factors have rank {rank}")
        alpha = self.alpha_pattern.get(pattern_key(self.alpha_pattern, path), self.alpha)
        if alpha is None:
            if own is None:
                raise ValueError("the config does not contain lora_alpha")
            return None
        return alpha * math.sqrt(rank) if self.stabilized else alpha


class LoraScalings:
    """The scalings of all layers of a LoRA.

    Args:
        layers: layers by name, as ``group_layers`` returns them.
        metadata: the header's metadata.
        configs: PEFT's ``adapter_config.json`` by component; the empty name if it is the only one.
        header_alpha: Whether to apply an alpha that only a field of the header states, such as
            ``lora_alpha`` or ``ss_network_alpha``. diffusers, ComfyUI and sd-scripts ignore it and
            some programs apply it. Others fold alpha into the factors and leave the field
            unchanged. Nothing is assumed, so without a choice such layers have no known alpha.
        without_biases: biases are left out, so a config may mention them.

    Attributes:
        problems: Descriptions of statements about the factors that cannot be followed.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        metadata: Mapping[str, str],
        configs: Mapping[str, Any] | None = None,
        header_alpha: HeaderAlpha | None = None,
        without_biases: bool = False,
    ) -> None:
        self.problems: list[str] = []
        self._configs: dict[str, _Config | None] = {}
        self._is_damaged = False
        self._choice = header_alpha
        self._encoders_only = all(layer.text_encoder for layer in layers.values())
        by_component = dict(configs or {}) or self._of_diffusers(metadata)
        for component, values in by_component.items():
            where = f"{component}: " if component else ""
            wrong = list(invalid_scaling(values))
            found = wrong or list(other_adapter(values, without_biases))
            self.problems += [f"{where}{problem}" for problem in found]
            self._configs[component] = None if wrong else _config(values)
        self._header = self._of_header(metadata, without_biases)
        self._check_patterns(layers)

    def alpha(self, layer: Layer, rank: int, own: float | None) -> float | None:
        """Return the alpha of a layer; None if it is stated nowhere, which means the rank.

        Args:
            own: alpha in the layer's own tensor.

        Raises:
            ValueError: it cannot be determined, or two places contradict each other.
        """
        if own is not None and layer.style in _BY_TENSOR:
            return own
        component, stated = self._component(layer), None
        if component is not None:
            config = self._configs[component]
            if config is None:
                raise ValueError("the scaling fields of its config are not valid")
            if layer.is_flat and (config.alpha_pattern or config.rank_pattern):
                raise ValueError("the config's patterns are for paths with dots")
            stated = config.alpha_of(layer.path, rank, own)
        if own is not None:
            if stated is not None and not math.isclose(own, stated, rel_tol=_ROUNDING):
                raise ValueError(f"alpha is {own:g} in a tensor, but {stated:g} in the config")
            return own
        if self._is_damaged:
            raise ValueError("the scaling fields of the header are damaged")
        return stated if component is not None else self._alpha_of_header(rank)

    def _alpha_of_header(self, rank: int) -> float | None:
        others = {alpha: field for field, alpha in self._header.items() if alpha != rank}
        if not others or self._choice == "ignore":
            return None
        said = ", ".join(f"{field} {alpha:g}" for alpha, field in others.items())
        if self._choice is None:
            raise ValueError(
                f"only the header states alpha ({said}), and no tensor does. Some programs scale "
                f"the update by alpha over the rank, which is {rank}; others have already scaled "
                "the factors. Choose --header_alpha apply or --header_alpha ignore"
            )
        if len(set(self._header.values())) > 1 or self._differ:
            differ = ", ".join([*self._header, *self._differ])
            raise ValueError(f"the header does not state the same alpha for all layers ({differ})")
        return next(iter(others))

    def _component(self, layer: Layer) -> str | None:
        """Return the component whose config applies to a layer; None if no config does."""
        first, encoder = layer.name.partition(".")[0], layer.text_encoder
        if first in self._configs:
            return first
        if encoder in self._configs:
            return encoder
        known = [name for name in self._configs if name.startswith("text_encoder") == bool(encoder)]
        if "" in self._configs:
            if encoder and not self._encoders_only:
                raise ValueError("the config does not name which of several models it is for")
            return ""
        if encoder:
            # other programs do not number encoders as the pipeline does
            if known and layer.style != "diffusers":
                raise ValueError(_unclear(known))
            return None
        if known and (len(known) > 1 or first in ("unet", "transformer")):
            raise ValueError(_unclear(known))
        return known[0] if known else None

    def _of_diffusers(self, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Return component -> config of diffusers' ``lora_adapter_metadata``, if it exists."""
        text = metadata.get(DIFFUSERS_METADATA)
        if not text:
            return {}
        try:
            values = parse_json(text)
        except ValueError as error:
            self._is_damaged = True
            self.problems.append(f"{DIFFUSERS_METADATA} in the header is not JSON ({error})")
            return {}
        if not isinstance(values, dict):
            self._is_damaged = True
            self.problems.append(f"{DIFFUSERS_METADATA} in the header is not a mapping")
            return {}
        found: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            component, _, field = name.rpartition(".")
            found.setdefault(component, {})[field] = value
        return found

    def _of_header(self, metadata: Mapping[str, str], without_biases: bool) -> dict[str, float]:
        """Return field -> the alpha that it states for all layers."""
        named = ("init_lora_weights", "use_rslora", *OTHER_FORMULA, *BESIDES)
        said = {name: _parsed(metadata[name]) for name in named if name in metadata}
        stabilized = said.pop("use_rslora", False)
        self.problems += [f"header: {p}" for p in other_adapter(said, without_biases)]
        args = metadata.get("ss_network_args", "")
        self._differ = [name for name in _ALPHAS_BY_LAYER if name in args]
        self._differ += ["use_rslora"] if stabilized else []
        alphas = {}
        for field, text in metadata.items():
            if field not in _HEADER_ALPHAS and not field.endswith(".lora_alpha"):
                continue
            alpha = _parsed(text)
            if is_finite_number(alpha):
                alphas[field] = float(alpha)
            elif field != _OF_SD_SCRIPTS:
                self._is_damaged = True
                self.problems.append(
                    f"{field} in the header is not a number ({reprlib.repr(alpha)})"
                )
        return alphas

    def _check_patterns(self, layers: Mapping[str, Layer]) -> None:
        """Report patterns that match no layer: they may be for names that the file does not use."""
        if not any(c and (c.alpha_pattern or c.rank_pattern) for c in self._configs.values()):
            return
        paths: dict[str, list[str]] = {}
        for layer in layers.values():
            try:
                component = self._component(layer)
            except ValueError:
                continue
            if component is not None and not layer.is_flat and "alpha" not in layer.parts:
                paths.setdefault(component, []).append(layer.path)
        for component, config in self._configs.items():
            if config is None or component not in paths:
                continue
            for name, pattern, usual in (
                ("alpha_pattern", config.alpha_pattern, config.alpha),
                ("rank_pattern", config.rank_pattern, config.rank),
            ):
                try:
                    unused = [
                        key
                        for key, value in pattern.items()
                        if value != usual
                        and not any(pattern_key([key], path) == key for path in paths[component])
                    ]
                except PatternError as error:
                    self.problems.append(f"{name} is {error}")
                    continue
                if unused:
                    self.problems.append(
                        f"{name} names layers that do not exist: {', '.join(unused[:3])}"
                    )


def _unclear(components: list[str]) -> str:
    return f"it is not clear whether the config of {', '.join(components)} applies to it"


def _config(values: Mapping[str, Any]) -> _Config:
    alpha = values.get("lora_alpha")
    return _Config(
        values.get("r"),
        None if alpha is None else float(alpha),
        values.get("rank_pattern") or {},
        values.get("alpha_pattern") or {},
        bool(values.get("use_rslora")),
    )


def _parsed(text: str) -> Any:
    """Parse a header's value, which is always a string."""
    try:
        return parse_json(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return None if text == "None" else text
