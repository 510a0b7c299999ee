"""Tiny real pipelines, one file per family: ``FAMILY``, its name, and ``build``, a builder."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

_MODULES = [
    importlib.import_module(f"{__name__}.{info.name}")
    for info in pkgutil.iter_modules(__path__)
    if info.name != "parts"
]

#: family name -> builder of a tiny pipeline
PIPELINES: dict[str, Callable[..., Any]] = {module.FAMILY: module.build for module in _MODULES}
