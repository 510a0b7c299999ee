"""Tell diffusers' own adapter methods which components hold adapters, and which are fused.

``set_adapters``, ``delete_adapters``, ``fuse_lora`` and the others visit the components in
``_lora_loadable_modules``, a list of the class, and record fused adapters in ``_merged_adapters``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Set
from typing import Any

from diffusers import DiffusionPipeline

from gralora_diffusion.adapters.compatibility import component_models, gralora_layers

_LISTED, _FUSED = "_lora_loadable_modules", "_merged_adapters"


def register_components(pipe: DiffusionPipeline) -> None:
    """Have diffusers' methods reach every component that holds a GraLoRA adapter.

    diffusers' list does not contain T5, because LoRAs do not train it. This pipeline, not its
    class, therefore gets its own list while it needs one. Pipelines without these methods have no
    list and get none.
    """
    listed = getattr(type(pipe), _LISTED, None)
    if not listed:
        return
    models = component_models(pipe)
    more = [name for name, m in models.items() if name not in listed and gralora_layers(m)]
    vars(pipe).pop(_LISTED, None)
    if more:
        setattr(pipe, _LISTED, [*listed, *more])
    register_fused(pipe)


def register_fused(pipe: DiffusionPipeline) -> None:
    """Keep ``pipe.fused_loras`` and ``num_fused_loras`` correct from now on."""
    recorded = getattr(pipe, _FUSED, None)
    if recorded is None:
        return
    if not isinstance(recorded, FusedAdapters):
        recorded = FusedAdapters(pipe, recorded)
        setattr(pipe, _FUSED, recorded)
    recorded.update()


class FusedAdapters(Set[str]):
    """Names of a pipeline's fused adapters: LoRAs as diffusers records them, GraLoRAs as they are.

    Deleting or disabling a fused adapter subtracts its update, without a word to diffusers. What is
    fused when all layers are unloaded stays in the weights, and in this set.

    The pipeline holds this set, which therefore refers to it weakly: with a cycle, its memory would
    not be free as soon as it is deleted. A copy is an ordinary set.
    """

    def __init__(self, pipe: DiffusionPipeline, names: Iterable[str]) -> None:
        self._pipe = weakref.ref(pipe)
        self._names, self._ours = set(names), set[str]()

    def update(self) -> set[str]:
        """Look at the layers; return the names."""
        pipe = self._pipe()
        models = component_models(pipe).values() if pipe is not None else ()
        layers = [layer for model in models for layer in gralora_layers(model)]
        merged = {name for layer in layers for name in layer.merged_adapters}
        self._ours |= merged
        self._names |= merged
        if layers:
            self._names -= self._ours - merged
        return set(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self.update()

    def __iter__(self) -> Iterator[str]:
        return iter(self.update())

    def __len__(self) -> int:
        return len(self.update())

    def __repr__(self) -> str:
        return repr(self.update())

    def __reduce__(self) -> tuple[type[set[str]], tuple[list[str]]]:
        return set, (sorted(self.update()),)

    # diffusers replaces the set by the result of these operations

    def __or__(self, other: Set[Any]) -> FusedAdapters:
        return self._replaced(self.update() | set(other))

    def __and__(self, other: Set[Any]) -> FusedAdapters:
        return self._replaced(self.update() & set(other))

    def __sub__(self, other: Set[Any]) -> FusedAdapters:
        return self._replaced(self.update() - set(other))

    def _replaced(self, names: set[str]) -> FusedAdapters:
        result = object.__new__(FusedAdapters)
        result._pipe, result._names, result._ours = self._pipe, names, set(self._ours)
        return result
