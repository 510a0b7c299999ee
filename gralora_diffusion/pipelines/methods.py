"""The methods that every diffusers pipeline gains; their code is imported at the first use."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

#: Functions of ``pipelines`` whose first argument is a pipeline.
METHODS = (
    "load_gralora_weights",
    "save_gralora_weights",
    "fuse_gralora",
    "unfuse_gralora",
    "unload_gralora_weights",
)
#: Where diffusers defines ``DiffusionPipeline``.
_HOME = "diffusers.pipelines.pipeline_utils"


def install() -> None:
    """Make ``METHODS`` methods of ``DiffusionPipeline``: now, or as soon as diffusers defines it.

    This way diffusers does not have to be imported.
    """
    if hasattr(sys.modules.get(_HOME), "DiffusionPipeline"):
        _add_methods(sys.modules[_HOME])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Method:
    """Stands for a method until it is first looked up on a pipeline or its class."""

    def __init__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name

    def __get__(self, instance: object, owner: type) -> Any:
        function = getattr(import_module(".loading", __package__), self.name)
        setattr(self.owner, self.name, function)
        return getattr(owner if instance is None else instance, self.name)


def _add_methods(module: ModuleType) -> None:
    pipeline_class = module.DiffusionPipeline
    for name in METHODS:
        setattr(pipeline_class, name, _Method(pipeline_class, name))


class _Finder:
    """Finds no module itself, but adds the methods after the import of diffusers' module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _HOME:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            _add_methods(module)

        spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec
