"""The methods that every diffusers pipeline gains; their code is imported at the first use.

``load_lora_weights`` of diffusers also refuses a GraLoRA adapter and says what to call instead. It
would pass over such an adapter, or say that target modules are not found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from gralora_diffusion.io.file_names import PEFT_WEIGHTS_NAME, WEIGHTS_NAME

#: Functions of ``pipelines`` whose first argument is a pipeline.
METHODS = (
    "load_gralora_weights",
    "save_gralora_weights",
    "fuse_gralora",
    "unfuse_gralora",
    "unload_gralora_weights",
)
#: Marks methods that were changed already.
_REFUSES = "_refuses_gralora"


def install() -> None:
    """Change diffusers' classes: now, or as soon as diffusers defines them.

    This way diffusers does not have to be imported.
    """
    for name, (class_name, change) in _CHANGES.items():
        if hasattr(sys.modules.get(name), class_name):
            change(sys.modules[name])
        elif not any(isinstance(f, _Finder) and f.name == name for f in sys.meta_path):
            sys.meta_path.insert(0, _Finder(name, change))


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


def _refuse_gralora(module: ModuleType) -> None:
    """Make every ``load_lora_weights`` of diffusers recognize a GraLoRA adapter."""
    for value in list(vars(module).values()):
        load = vars(value).get("load_lora_weights") if isinstance(value, type) else None
        if load is not None and not hasattr(load, _REFUSES):
            value.load_lora_weights = _refusing(load)


def _refusing(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def load_lora_weights(
        self: Any, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any
    ) -> Any:
        source = pretrained_model_name_or_path_or_dict
        if _is_gralora(source, kwargs.get("weight_name")):
            raise ValueError(
                "this is a GraLoRA adapter, not a LoRA. Load it with "
                "`pipe.load_gralora_weights(...)`, or convert it with "
                "`gralora export --format lora`."
            )
        return load(self, source, *args, **kwargs)

    setattr(load_lora_weights, _REFUSES, True)
    return load_lora_weights


def _is_gralora(source: Any, weight_name: str | None) -> bool:
    """Whether a state dict, a local file, or a file of a local folder has GraLoRA factors."""
    from gralora_diffusion.io.errors import AdapterFileError
    from gralora_diffusion.io.tensor_files import read_header

    if isinstance(source, Mapping):
        return any("gralora_" in str(key) for key in source)
    path = Path(source)
    names = [weight_name] if weight_name else [WEIGHTS_NAME, PEFT_WEIGHTS_NAME]
    for file in [path / name for name in names] if path.is_dir() else [path]:
        try:
            if any("gralora_" in key for key in read_header(file)[0]):
                return True
        except (OSError, AdapterFileError):
            continue
    return False


#: Modules of diffusers -> a class that each defines, and what is changed then.
_CHANGES: dict[str, tuple[str, Callable[[ModuleType], None]]] = {
    "diffusers.pipelines.pipeline_utils": ("DiffusionPipeline", _add_methods),
    "diffusers.loaders.lora_pipeline": ("StableDiffusionLoraLoaderMixin", _refuse_gralora),
}


class _Finder:
    """Finds no module itself, but changes one after its import."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name, self.change = name, change

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            self.change(module)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec
