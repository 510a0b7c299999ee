"""Read an adapter without a model, as scaled updates of layers by component and path."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from gralora_diffusion.adapters.adapter_file import Adapter, ComponentAdapter
from gralora_diffusion.adapters.compatibility import component_of
from gralora_diffusion.adapters.layers.functional import add_delta_rows, lora_factors, row_factors
from gralora_diffusion.adapters.placement.layer_config import layer_settings
from gralora_diffusion.adapters.placement.path_patterns import PatternError
from gralora_diffusion.adapters.placement.targets import layer_of
from gralora_diffusion.families import ModelFamily, get_family, list_families
from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.io.tensor_files import is_finite, is_real
from gralora_diffusion.key_maps import Shape

_FACTORS = ("gralora_A", "gralora_B")
_GENERAL = ("gralora_A_general.weight", "gralora_B_general.weight")


@dataclass(frozen=True)
class LayerUpdate:
    """The update of one layer: ``scaling`` times the update that the factors define.

    Attributes:
        A: (k, in/k, r[, h, w]).
        B: (k, r, out/k).
        general: the hybrid's plain LoRA, (hybrid_r, in[, h, w]) and (out, hybrid_r[, 1, 1]).
        scaling: alpha / (r + hybrid_r) times the user's scale.
    """

    A: Tensor
    B: Tensor
    general: tuple[Tensor, Tensor] | None
    scaling: float

    @property
    def shape(self) -> Shape:
        """Shape of the layer's weight."""
        k, i, _, *kernel = self.A.shape
        return (k * self.B.shape[2], k * i, *kernel)

    def add_to(self, target: Tensor, start: int) -> None:
        """Add rows ``start``... of the update to ``target`` (rows, in * h * w), fp32, in place."""
        add_delta_rows(target, *self._rows, start, self.scaling)
        if self.general:
            down, up = (factor.float().flatten(1) for factor in self.general)
            target.addmm_(up[start : start + len(target)], down, alpha=self.scaling)

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor]:
        return row_factors(self.A.float(), self.B.float())

    def lora_pair(self) -> tuple[Tensor, Tensor]:
        """Return the LoRA with exactly the same update in fp32, with the scaling folded in.

        ``down`` is (rank, in[, h, w]), ``up`` (out, rank).
        """
        down, up = lora_factors(self.A.float(), self.B.float())
        if self.general:
            plain_down, plain_up = (factor.float() for factor in self.general)
            down = torch.cat([down, plain_down])
            up = torch.cat([up, plain_up.flatten(1)], dim=1)
        return down, up * self.scaling


@dataclass(frozen=True)
class AdapterLayers:
    """The part of an adapter for one component, by canonical name (see ``key_maps``)."""

    updates: dict[str, LayerUpdate] = field(default_factory=dict)
    #: Trained biases and whole modules: key of the model -> the value that replaces the model's.
    replaced: dict[str, Tensor] = field(default_factory=dict)


def find_adapter_family(adapter: Adapter, given: str | None) -> ModelFamily:
    """Return an adapter's family from its file or from the caller.

    Args:
        given: the caller's family, if there is one.

    Raises:
        AdapterFileError: the two differ, or both are missing.
    """
    if adapter.family and given and adapter.family != given:
        raise AdapterFileError(
            f"{adapter.source}: this adapter was trained for {adapter.family}, but the base is "
            f"{given}. Pass a base of {adapter.family}."
        )
    name = adapter.family or given
    if name is None:
        raise AdapterFileError(
            f"{adapter.source}: the file does not name its family of base models. Pass the base or "
            "the family."
        )
    return get_family(name)


def adapts_denoiser_only(adapter: Adapter) -> bool:
    """Whether an adapter does not change any text encoder."""
    known = {name for family in list_families() for name in get_family(family).components}
    names = [component_of(part, adapter, ["", *known]) for part in adapter.components]
    return not any(name.startswith("text_encoder") for name in names)


def adapter_layers(
    adapter: Adapter, family: ModelFamily, scale: float = 1.0
) -> dict[str, AdapterLayers]:
    """Sort the tensors of an adapter into updates and replaced values, by component.

    Args:
        scale: the user's scale, multiplied into the scaling of each layer.

    Raises:
        AdapterFileError: tensors are missing, unexpected, misshapen or not finite. The message
            names all of them.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be a finite number")
    parts, problems = {}, []
    for component, part in adapter.components.items():
        name = component_of(component, adapter, family.components)
        if name not in family.components:
            known = ", ".join(family.components)
            problems.append(
                f"it has weights for {name!r}, which {family.name} does not have (it has {known})"
            )
            continue
        try:
            parts[name], found = _sorted_out(part, partial(family.canonical, name), scale)
        except PatternError as error:
            found = [f"a pattern of its config is {error}"]
        problems += [f"{name}: {problem}" for problem in found]
    if not problems and not any(p.updates or p.replaced for p in parts.values()):
        problems.append("it has no weights")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise AdapterFileError(f"{adapter.source} cannot be exported:\n{lines}")
    return parts


def _sorted_out(
    part: ComponentAdapter, canonical: Callable[[str], str], scale: float
) -> tuple[AdapterLayers, list[str]]:
    layers, problems = AdapterLayers(), []
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in part.tensors.items():
        if not is_real(tensor, factor=".gralora_" in key):
            problems.append(f"{key} is {tensor.dtype}, which has no real numbers")
        elif not is_finite(tensor):
            problems.append(f"{key} has NaN or infinite values")
        if ".gralora_" in key:
            path = layer_of(key)
            factors.setdefault(path, {})[key.removeprefix(f"{path}.")] = tensor
        else:
            layers.replaced[canonical(key.replace(".base_layer.", "."))] = tensor
    hybrid_rank = part.config.hybrid_r
    expected = {*_FACTORS, *(_GENERAL if hybrid_rank else ())}
    for path, held in factors.items():
        rank, k, alpha = layer_settings(part.config, path)
        if problem := _problem(held, expected, rank, k, hybrid_rank):
            problems.append(f"{path}: {problem}")
            continue
        general = (held[_GENERAL[0]], held[_GENERAL[1]]) if hybrid_rank else None
        scaling = scale * alpha / (rank + hybrid_rank)
        layers.updates[canonical(path)] = LayerUpdate(
            held["gralora_A"], held["gralora_B"], general, scaling
        )
    return layers, problems


def _problem(
    held: dict[str, Tensor], expected: set[str], rank: int, k: int, hybrid_rank: int
) -> str | None:
    if set(held) != expected:
        missing, more = sorted(expected - set(held)), sorted(set(held) - expected)
        return f"missing: {', '.join(missing) or 'none'}; unexpected: {', '.join(more) or 'none'}"
    A, B = held["gralora_A"], held["gralora_B"]
    fits = A.dim() in (3, 5) and B.dim() == 3 and A.shape[0] == B.shape[0] == k
    fits = fits and A.shape[2] == B.shape[1] == rank and rank % k == 0
    if fits and hybrid_rank:
        down, up = held[_GENERAL[0]], held[_GENERAL[1]]
        fits = down.shape == (hybrid_rank, k * A.shape[1], *A.shape[3:])
        fits = fits and up.shape[:2] == (k * B.shape[2], hybrid_rank)
    if fits:
        return None
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in held.items())
    return f"{shapes} do not fit each other, or do not fit rank {rank} and k {k} of the config"
