"""``model_index.json`` of a pipeline in diffusers' layout: its family and its components."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from gralora_diffusion.families import ModelFamily, find_family
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.hub import check_cache, offline_problem


class PipelineIndex:
    """The index of a diffusers folder or Hub id; no weight is read.

    Args:
        option: the option that names it, for errors.

    Attributes:
        pipeline_class: name of the pipeline's class.
        components: component -> library and name of its class, without components that are None.
        settings: the names of the pipeline's own settings that are switched on.

    Raises:
        ConfigError: the index does not exist or cannot be read.
    """

    def __init__(
        self, option: str, source: str, cache_dir: str | None = None, revision: str | None = None
    ) -> None:
        try:
            if not Path(source).exists():
                check_cache(source, cache_dir)
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
        self.components: dict[str, tuple[str, str]] = {
            name: (entry[0], entry[1])
            for name, entry in index.items()
            if isinstance(entry, (list, tuple)) and list(map(type, entry)) == [str, str]
        }
        self.settings = frozenset(name for name, entry in index.items() if entry is True)

    @property
    def family(self) -> ModelFamily | None:
        """The family of the pipeline, if it is supported."""
        return find_family(getattr(diffusers, self.pipeline_class, object))

    def __contains__(self, component: str) -> bool:
        return component in self.components

    def has_weights(self, component: str) -> bool:
        """Whether this pipeline has that model. For a Hub id, only the index is checked."""
        folder = Path(self.source)
        if component not in self or not folder.is_dir():
            return component in self
        files = (folder / component).glob("*")
        return any(file.suffix in (".safetensors", ".bin") for file in files)

    def check_libraries(self) -> None:
        """Check that the class of every component can be loaded.

        Raises:
            ConfigError: a component needs a library that is not installed.
        """
        problems = []
        for component, (library, name) in self.components.items():
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
