"""What differs between base models, one file each, found here.

A family is a module of this package that ends in ``FAMILY = Name()`` with a :class:`ModelFamily`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from diffusers import DiffusionPipeline

from .base import Conditioning, ModelFamily, PublishedNames

__all__ = [
    "Conditioning",
    "ModelFamily",
    "PublishedNames",
    "find_family",
    "get_family",
    "list_families",
]


@cache
def _families() -> dict[str, ModelFamily]:
    found: dict[str, ModelFamily] = {}
    owners: dict[str, str] = {}
    for info in pkgutil.iter_modules(__path__):
        if info.name == "base":
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
    """Return the family whose pipeline classes this pipeline (or class) is of, if any."""
    for cls in (pipe if isinstance(pipe, type) else type(pipe)).__mro__:
        for family in _families().values():
            if cls.__name__ in family.pipeline_classes:
                return family
    return None


def get_family(which: str | DiffusionPipeline) -> ModelFamily:
    """Return the family of that name, or of that pipeline.

    Raises:
        ValueError: no such family; lists those there are.
    """
    families = _families()
    if isinstance(which, str):
        if which not in families:
            raise ValueError(f"no family named {which!r}. Families: {', '.join(list_families())}.")
        return families[which]
    family = find_family(which)
    if family is None:
        raise ValueError(
            f"{type(which).__name__} is not a pipeline of a supported family. "
            f"Families: {', '.join(list_families())}."
        )
    return family
