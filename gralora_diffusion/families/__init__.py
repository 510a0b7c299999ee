"""The families of base models, one file each, and functions to find them.

A family is a module of this package that ends in ``FAMILY = Name()`` with a :class:`ModelFamily`.
Help texts list all families, so only methods that compute import torch and diffusers.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from .base import (
    Conditioning,
    ControlCount,
    ControlPreparation,
    LayerMark,
    ModelFamily,
    PublishedNames,
    control_key,
)
from .clip_skip import mend_clip_skip, too_much_clip_skip
from .control_sizes import LARGEST_CONTROL, SMALLEST_CONTROL, reduced, reduced_size

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "LARGEST_CONTROL",
    "SMALLEST_CONTROL",
    "Conditioning",
    "ControlCount",
    "ControlPreparation",
    "LayerMark",
    "ModelFamily",
    "PublishedNames",
    "control_key",
    "families_of_layers",
    "family_called",
    "family_name_of",
    "family_of_metadata",
    "find_family",
    "find_pipeline_family",
    "get_family",
    "list_families",
    "mend_clip_skip",
    "reduced",
    "reduced_size",
    "too_much_clip_skip",
]

#: Modules of this package that are not families.
_SHARED = ("base", "clip_skip", "control_sizes", "presets")
#: Fields of a header that name the base. The first one that is known counts.
_NAMES_OF_THE_BASE = ("modelspec.architecture", "ss_base_model_version")


@cache
def _families() -> dict[str, ModelFamily]:
    found: dict[str, ModelFamily] = {}
    owners: dict[str, str] = {}
    for info in pkgutil.iter_modules(__path__):
        if info.name in _SHARED:
            continue
        family: ModelFamily = importlib.import_module(f"{__name__}.{info.name}").FAMILY
        if family.name in found:
            raise ValueError(
                f"two families are named {family.name!r}; the second is in {info.name}.py"
            )
        for pipeline in family.pipeline_classes:
            if pipeline in owners:
                raise ValueError(
                    f"pipeline class {pipeline} belongs to {owners[pipeline]} and {family.name}"
                )
            owners[pipeline] = family.name
        found[family.name] = family
    return found


def list_families() -> list[str]:
    """Return the names of the supported families."""
    return sorted(_families())


def find_family(pipe: DiffusionPipeline | type) -> ModelFamily | None:
    """Return the family of a pipeline or pipeline class, if it is supported."""
    for cls in (pipe if isinstance(pipe, type) else type(pipe)).__mro__:
        if family := find_pipeline_family(cls.__name__):
            return family
    return None


def find_pipeline_family(class_name: str) -> ModelFamily | None:
    """Return the family of the pipeline class with this name, if it is supported."""
    families = _families().values()
    return next((f for f in families if class_name in f.pipeline_classes), None)


def family_called(text: str) -> ModelFamily | None:
    """Return the family of a name in a file's metadata, such as ``stable-diffusion-v1/lora``.

    It is the family whose ``known_as`` contains the longest prefix of the name.
    """
    plain = re.sub(r"[._ ]", "-", text.lower())
    known = [(len(k), f) for f in _families().values() for k in f.known_as if plain.startswith(k)]
    return max(known, key=lambda entry: entry[0], default=(0, None))[1]


def family_name_of(text: str) -> str | None:
    """Return the name of the family that a text such as ``sdxl`` means, if it is known."""
    family = family_called(text)
    return family.name if family else None


def family_of_metadata(metadata: Mapping[str, str]) -> tuple[ModelFamily, str] | None:
    """Return the family in a file's metadata, and the field that names it."""
    for name in _NAMES_OF_THE_BASE:
        if (text := metadata.get(name)) and (family := family_called(text)):
            return family, name
    return None


def families_of_layers(layers: Mapping[str, tuple[int, int]]) -> list[ModelFamily]:
    """Return the families whose marks match most of these layers; empty if no layer matches.

    Args:
        layers: path with ``_`` for every dot -> inputs and outputs.
    """
    counts = {
        family.name: sum(
            any(_bears(mark, path, *widths) for mark in family.layer_marks)
            for path, widths in layers.items()
        )
        for family in _families().values()
    }
    most = max(counts.values())
    return [get_family(name) for name, count in counts.items() if count == most > 0]


def _bears(mark: LayerMark, path: str, inputs: int, outputs: int) -> bool:
    return (
        re.search(mark.pattern, path) is not None
        and (not mark.inputs or inputs in mark.inputs)
        and (not mark.outputs or outputs in mark.outputs)
    )


def get_family(which: str | DiffusionPipeline) -> ModelFamily:
    """Return the family with this name, or of this pipeline.

    Raises:
        ValueError: there is no such family; the message lists all families.
    """
    families = _families()
    if isinstance(which, str):
        if which not in families:
            raise ValueError(
                f"no family is named {which!r}. Choose from {', '.join(list_families())}."
            )
        return families[which]
    family = find_family(which)
    if family is None:
        raise ValueError(
            f"{type(which).__name__} is not a pipeline of a supported family. "
            f"Supported families: {', '.join(list_families())}."
        )
    return family
