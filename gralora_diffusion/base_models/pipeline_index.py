"""``model_index.json`` of a pipeline in diffusers' layout: its family and its components."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from gralora_diffusion.families import ModelFamily, find_family
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.hub import offline_problem


class PipelineIndex:
    """The index of a diffusers folder or Hub id; no weight is read.

    Args:
        option: the training option that names it, for errors.

    Raises:
        ConfigError: the index does not exist, or a component needs a library that is not installed.
    """

    def __init__(
        self, option: str, source: str, cache_dir: str | None, revision: str | None = None
    ) -> None:
        try:
            index = DiffusionPipeline.load_config(source, revision=revision, cache_dir=cache_dir)
            if not isinstance(index, dict):
                raise ValueError(f"its index is a JSON {type(index).__name__}, not an object")
        except Exception as error:  # diffusers may raise anything on damaged files
            problem = offline_problem(error, source, revision=revision, cache_dir=cache_dir) or (
                f"no diffusers pipeline could be loaded ({error}). Pass a folder with "
                "model_index.json, or a Hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
            )
            raise ConfigError([f"--{option} {source}: {problem}"]) from error
        self.option, self.source = option, source
        self.pipeline_class = str(index.get("_class_name"))
        self._components = {
            name: entry
            for name, entry in index.items()
            if isinstance(entry, list) and list(map(type, entry)) == [str, str]
        }
        self._check_libraries()

    @property
    def family(self) -> ModelFamily | None:
        """The family of the pipeline, if it is supported."""
        return find_family(getattr(diffusers, self.pipeline_class, object))

    def __contains__(self, component: str) -> bool:
        return component in self._components

    def component_class(self, component: str) -> tuple[str, str]:
        """Return library and name of the class of a component."""
        library, name = self._components[component]
        return library, name

    def has_weights(self, component: str) -> bool:
        """Whether this pipeline has that model. For a Hub id, only the index is checked."""
        folder = Path(self.source)
        if component not in self or not folder.is_dir():
            return component in self
        files = (folder / component).glob("*")
        return any(file.suffix in (".safetensors", ".bin") for file in files)

    def _check_libraries(self) -> None:
        problems = []
        for component, (library, name) in self._components.items():
            if library not in ("diffusers", "transformers"):
                continue
            # both have placeholders for classes whose library is not installed
            found: Any = getattr(importlib.import_module(library), name, None)
            try:
                getattr(found, "from_pretrained", None)
            except ImportError:
                needed = " ".join(map(str, found._backends))
                problems.append(
                    f"--{self.option} {self.source}: the class of its {component}, {name}, needs: "
                    f"pip install {needed}"
                )
        if problems:
            raise ConfigError(problems)
