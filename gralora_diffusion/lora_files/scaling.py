"""How the factors of a LoRA are to be read, from all that its file and PEFT's config say of it.

A layer's update is ``alpha / rank * up @ down``. A tensor says what alpha is (kohya's sd-scripts,
ComfyUI), or the header (diffusers), or ``adapter_config.json`` (PEFT); where none of them does, it
is the rank, as every reader has it.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gralora_diffusion.adapters.placement.layer_config import is_finite_number, pattern_key
from gralora_diffusion.adapters.placement.path_patterns import PatternError

from .keys import DIFFUSERS_METADATA, Layer
from .peft_config import BESIDES, OTHER_FORMULA, invalid_scaling, other_adapter

#: What to do with an alpha that only a header's field of its own tells; see ``LoraScalings``.
HeaderAlpha = Literal["apply", "ignore"]
HEADER_ALPHA: tuple[HeaderAlpha, ...] = ("apply", "ignore")
#: Fields of a header that tell one alpha for all layers; that of sd-scripts, which writes a tensor
#: in every layer besides, is often no number.
_HEADER_ALPHAS = ("lora_alpha", "network_alpha", "alpha", "ss_network_alpha")
_OF_SD_SCRIPTS = "ss_network_alpha"
#: sd-scripts' arguments by which alpha differs from layer to layer.
_ALPHAS_BY_LAYER = ("conv_alpha", "block_alphas", "conv_block_alphas")

#: Styles of names whose readers take alpha from a tensor wherever there is one.
_BY_TENSOR = ("kohya", "OneTrainer", "LyCORIS", "ComfyUI")
#: Alphas that were rounded to half precision are taken for the same.
_ROUNDING = 2.0**-8


@dataclass(frozen=True)
class _Config:
    """What PEFT's config says of scaling, found to be valid."""

    rank: int | None
    alpha: float | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    stabilized: bool

    def alpha_of(self, path: str, rank: int, own: float | None) -> float | None:
        """Alpha of a layer; that of rank-stabilized LoRA, over the rank's root, is made up for."""
        wanted = self.rank_pattern.get(pattern_key(self.rank_pattern, path), self.rank)
        if wanted is not None and rank and wanted != rank:
            raise ValueError(f"the config says rank {wanted}, and the factors have rank {rank}")
        alpha = self.alpha_pattern.get(pattern_key(self.alpha_pattern, path), self.alpha)
        if alpha is None:
            if own is None:
                raise ValueError("the config says no lora_alpha")
            return None
        return alpha * math.sqrt(rank) if self.stabilized else alpha


class LoraScalings:
    """The scalings of all layers of a LoRA.

    Args:
        layers: by name, as ``group_layers`` returns them.
        metadata: the header's.
        configs: PEFT's ``adapter_config.json`` by component; the empty name if it is the only one.
        header_alpha: Whether an alpha counts that only a field of the header tells, such as
            ``lora_alpha`` or ``ss_network_alpha``. diffusers, ComfyUI and sd-scripts pass over it,
            some programs apply it, and some that fold alpha into the factors leave the field as it
            was. So nothing is assumed: without a choice such layers have no alpha that can be told.
        without_biases: biases are left out, so that a config may tell of them.

    Attributes:
        problems: What is said of reading and cannot be followed, in words.
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
        told = dict(configs or {}) or self._of_diffusers(metadata)
        for component, values in told.items():
            where = f"{component}: " if component else ""
            wrong = list(invalid_scaling(values))
            found = wrong or list(other_adapter(values, without_biases))
            self.problems += [f"{where}{problem}" for problem in found]
            self._configs[component] = None if wrong else _config(values)
        self._header = self._of_header(metadata, without_biases)
        self._check_patterns(layers)

    def alpha(self, layer: Layer, rank: int, own: float | None) -> float | None:
        """Return the alpha of a layer; None if nothing tells one, which means the rank.

        Args:
            own: that of the layer's own tensor.

        Raises:
            ValueError: It cannot be told, or two places tell different ones.
        """
        if own is not None and layer.style in _BY_TENSOR:
            return own
        component, told = self._component(layer), None
        if component is not None:
            config = self._configs[component]
            if config is None:
                raise ValueError("what its config says of scaling is not valid")
            if layer.is_flat and (config.alpha_pattern or config.rank_pattern):
                raise ValueError("the config's patterns are for paths with dots")
            told = config.alpha_of(layer.path, rank, own)
        if own is not None:
            if told is not None and not math.isclose(own, told, rel_tol=_ROUNDING):
                raise ValueError(f"a tensor says alpha {own:g}, and the config {told:g}")
            return own
        if self._is_damaged:
            raise ValueError("what the header says of scaling is damaged")
        return told if component is not None else self._alpha_of_header(rank)

    def _alpha_of_header(self, rank: int) -> float | None:
        others = {alpha: field for field, alpha in self._header.items() if alpha != rank}
        if not others or self._choice == "ignore":
            return None
        said = ", ".join(f"{field} {alpha:g}" for alpha, field in others.items())
        if self._choice is None:
            raise ValueError(
                f"the header says {said}, and no tensor does. Some programs mean that the update "
                f"is scaled by it over the rank, which is {rank}; others have scaled the factors "
                "already. Choose with --header_alpha apply or --header_alpha ignore"
            )
        if len(set(self._header.values())) > 1 or self._differ:
            differ = ", ".join([*self._header, *self._differ])
            raise ValueError(
                f"what the header says of alpha is not for all layers alike ({differ})"
            )
        return next(iter(others))

    def _component(self, layer: Layer) -> str | None:
        """Whose config a layer's is; None if there is none for it."""
        first, encoder = layer.name.partition(".")[0], layer.text_encoder
        if first in self._configs:
            return first
        if encoder in self._configs:
            return encoder
        known = [name for name in self._configs if name.startswith("text_encoder") == bool(encoder)]
        if "" in self._configs:
            if encoder and not self._encoders_only:
                raise ValueError("the config does not say which of several models it is for")
            return ""
        if encoder:
            # the number in other programs' names of an encoder is not the pipeline's
            if known and layer.style != "diffusers":
                raise ValueError(f"whether its config is that of {', '.join(known)} is not said")
            return None
        if known and (len(known) > 1 or first in ("unet", "transformer")):
            raise ValueError(f"whether its config is that of {', '.join(known)} is not said")
        return known[0] if known else None

    def _of_diffusers(self, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Component -> config of diffusers' ``lora_adapter_metadata``, where a file has it."""
        text = metadata.get(DIFFUSERS_METADATA)
        if not text:
            return {}
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            self._is_damaged = True
            self.problems.append(f"{DIFFUSERS_METADATA} in the header is no JSON ({error})")
            return {}
        if not isinstance(values, dict):
            self._is_damaged = True
            self.problems.append(f"{DIFFUSERS_METADATA} in the header is no mapping")
            return {}
        found: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            component, _, field = name.rpartition(".")
            found.setdefault(component, {})[field] = value
        return found

    def _of_header(self, metadata: Mapping[str, str], without_biases: bool) -> dict[str, float]:
        """Field -> the alpha that it tells for all layers."""
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
                self.problems.append(f"{field} in the header is no number ({reprlib.repr(alpha)})")
        return alphas

    def _check_patterns(self, layers: Mapping[str, Layer]) -> None:
        """A pattern that no layer matches may be for other names than the file's."""
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
                        f"{name} names layers that are not there: {', '.join(unused[:3])}"
                    )


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
    """A header's value, which is always text."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except (ValueError, RecursionError):
        return None if text == "None" else text
