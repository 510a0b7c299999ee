"""A denoiser built before its weights are read, so that a process reads only what it keeps.

Until then each weight is a placeholder: a single NaN in the shape of the weight, which takes no
memory and would show in any result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.io.tensor_files import StoredTensor, read_header

from .folder import MODEL_CONFIG, read_json, weight_files
from .meta_models import convert, empty_model
from .options import BaseModelOptions
from .pipeline_index import PipelineIndex
from .single_file import left_out_parts

#: How many bytes of a file are in memory besides the weights.
_BUFFER = 16 << 20


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a model in its files, by their names in the model.

    Names may also be those in the model with an adapter, whose layers contain the base's.
    """

    tensors: Mapping[str, StoredTensor]

    def read(self, name: str, target: Tensor, start: int = 0) -> None:
        """Read consecutive rows of a weight, from row ``start`` on.

        Args:
            target: where they go, contiguous, (rows, *the weight's other dimensions), of any dtype
                and on any device. A scalar is one row.

        Raises:
            AdapterFileError: the file is shorter than its header says.
        """
        stored = self._stored(name)
        values = target.detach().view(-1)
        size = stored.dtype.itemsize
        position = stored.offset + start * math.prod(stored.shape[1:]) * size
        with open(stored.path, "rb") as file:
            file.seek(position)
            for part in values.split(max(1, _BUFFER // size)):
                data = bytearray(part.numel() * size)
                if file.readinto(data) != len(data):
                    raise AdapterFileError(f"{stored.path}: it ends within {name}. Copy it again.")
                if data:
                    part.copy_(torch.frombuffer(data, dtype=stored.dtype))

    def first_values(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        """Return the first ``count`` values of a weight, fewer if it has fewer."""
        shape = self._stored(name).shape
        values = torch.empty(min(count, math.prod(shape)), dtype=dtype)
        self.read(name, values)
        return values

    def _stored(self, name: str) -> StoredTensor:
        return self.tensors[name.replace(".base_layer.", ".")]


def unread_denoiser(
    options: BaseModelOptions, family: ModelFamily, dtype: torch.dtype
) -> tuple[Any, StoredWeights]:
    """Return the base's denoiser with placeholders for its weights, and where those are stored.

    The denoiser has the dtypes of ``load_base``, and its buffers have their values.

    Raises:
        ValueError: ``load_base`` has to load it whole, or to report a problem with its files. The
            message says why.
    """
    if Path(options.pretrained_model_name_or_path).is_file():
        raise ValueError("it is in a single file")
    try:
        folder, (library, class_name) = _folder(options, family)
        if "quantization_config" in read_json(folder / MODEL_CONFIG):
            raise ValueError("it is quantized")
        # diffusers reads the usual files where a component has no such variant
        files = weight_files(folder, options.variant) or weight_files(folder)
        tensors = {
            key: tensor
            for file in files
            if file.suffix == ".safetensors"
            for key, tensor in read_header(file)[0].items()
        }
        model = empty_model(library, class_name, str(folder.parent), folder.name, {})
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        if shapes != {key: tensor.shape for key, tensor in tensors.items()}:
            raise ValueError("its files do not have exactly the names and shapes of its weights")
        convert(model, dtype)
        weights = StoredWeights(tensors)
        for key, tensor in model.state_dict().items():
            if not tensor.is_meta:  # a buffer
                weights.read(key, tensor)
    except Exception as error:  # libraries may raise anything on damaged files
        raise ValueError(str(error)) from error
    model._apply(lambda tensor: _placeholder(tensor) if tensor.is_meta else tensor)
    return model, weights


def _folder(options: BaseModelOptions, family: ModelFamily) -> tuple[Path, tuple[str, str]]:
    """Return the denoiser's folder, downloaded if need be, and the library and name of its class.

    What is downloaded is all that ``load_base`` will read.
    """
    base = options.pretrained_model_name_or_path
    hub: dict[str, Any] = {"revision": options.revision, "cache_dir": options.cache_dir}
    index = PipelineIndex("pretrained_model_name_or_path", base, **hub)
    folder = Path(base)
    if not folder.is_dir():
        pipeline_class: Any = getattr(diffusers, family.pipeline_classes[0])
        folder = Path(
            pipeline_class.download(
                base,
                variant=options.variant,
                use_safetensors=True,
                **hub,
                **left_out_parts(options, family),
            )
        )
    return folder / family.denoiser, index.components[family.denoiser]


def _placeholder(tensor: Tensor) -> Tensor:
    return torch.full((), math.nan, dtype=tensor.dtype).expand(tensor.shape)
