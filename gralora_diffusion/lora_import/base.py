"""The base of a LoRA, in diffusers' layout: its family and its layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict

from gralora_diffusion.adapters.placement.targets import layer_shape, unsupported
from gralora_diffusion.base_models.meta_models import empty_model
from gralora_diffusion.base_models.pipeline_index import PipelineIndex
from gralora_diffusion.families import list_families
from gralora_diffusion.io.errors import AdapterFileError, ConfigError
from gralora_diffusion.io.hub import offline_problem
from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.lora_files.low_rank import Pair

#: In and out features and kernel of a layer.
LayerShape = tuple[int, int, tuple[int, ...]]


class LoraBase:
    """A base whose configuration is read, but not its weights.

    Args:
        source: folder or Hub id of a pipeline.

    Attributes:
        family: its family.
        unet_config: config of its UNet, if the names in a LoRA depend on it.

    Raises:
        ValueError: the pipeline cannot be loaded, or its family is not supported.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            self._index = PipelineIndex("base", source)
        except ConfigError as error:
            raise ValueError(
                f"{error.problems[0]}. If the base has another form, pass --family instead"
            ) from error
        family = self._index.family
        if family is None:
            raise ValueError(
                f"--base {source}: {self._index.pipeline_class} does not belong to a supported "
                f"family ({', '.join(list_families())})"
            )
        self.family, self.unet_config = family, None
        if "unet_config" in family.lora_options:
            with self._reading("unet"):
                config = UNet2DConditionModel.load_config(source, subfolder="unet")
                self.unet_config = FrozenDict(config)

    def check(self, pairs: Mapping[str, Mapping[str, Pair]], where: str) -> None:
        """Compare a LoRA with the base's layers.

        Args:
            pairs: component -> path of a layer -> its pair, (R, in, ...) and (out, R).
            where: the LoRA's name, for errors.

        Raises:
            AdapterFileError: the base does not have all layers, or has them with other widths. The
                message names some.
        """
        count = sum(len(layers) for layers in pairs.values())
        misfits = []
        for component, layers in pairs.items():
            in_base = self._layers(component)
            for path, (down, up) in layers.items():
                shape = down.shape[1], len(up), tuple(down.shape[2:])
                found = in_base.get(self.family.canonical(component, path))
                if found is None or not _same(shape, found):
                    held = _text(found) if found else "no such layer"
                    misfits.append(
                        f"{component}.{path} ({_text(shape)} in the LoRA, {held} in the base)"
                    )
        if misfits:
            raise AdapterFileError(
                f"{where} does not fit --base {self.source}: {len(misfits)} of {count} layers "
                f"differ: {first_few(misfits, 3)}. Pass the base that it was trained for."
            )

    def _layers(self, component: str) -> dict[str, LayerShape]:
        """Return canonical path -> shape of a component's layers; empty without the component."""
        if component not in self._index:
            return {}
        library, class_name = self._index.components[component]
        with self._reading(component):
            model = empty_model(library, class_name, self.source, component, {})
            return {
                self.family.canonical(component, path): layer_shape(module)
                for path, module in model.named_modules()
                if not unsupported(module)
            }

    @contextmanager
    def _reading(self, component: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # libraries may raise anything on damaged files
            problem = offline_problem(error, self.source) or str(error)
            raise ValueError(
                f"--base {self.source}: its {component} cannot be read: {problem}"
            ) from error


def _same(one: LayerShape, other: LayerShape) -> bool:
    """Whether an update of one shape can be added to a layer of the other."""
    flat = math.prod(one[2]) == math.prod(other[2]) == 1  # a 1 x 1 convolution as a matrix
    return one[:2] == other[:2] and (flat or one[2] == other[2])


def _text(shape: LayerShape) -> str:
    inputs, outputs, kernel = shape
    return f"{inputs} -> {outputs}{' ' + 'x'.join(map(str, kernel)) if kernel else ''}"
