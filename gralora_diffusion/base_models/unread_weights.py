"""Models that are built before their weights are read, so that a process reads only what it keeps.

Until then each weight is a placeholder: a single NaN in the shape of the weight, which takes no
memory and would show in any result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.io.hub import fetch
from gralora_diffusion.io.tensor_files import StoredTensor, read_header
from gralora_diffusion.key_maps import KeyMapError

from . import scaled_fp8
from .folder import MODEL_CONFIG, read_json, weight_files
from .meta_models import convert, empty_model
from .options import BaseModelOptions
from .pipeline_index import PipelineIndex
from .single_file import SingleFile, left_out_parts

#: How many bytes of a file are in memory besides the weights.
_BUFFER = 16 << 20


@dataclass(frozen=True)
class StoredRows:
    """Consecutive rows (first axis) of a tensor in a file.

    Attributes:
        start, stop: the first row, and the one after the last. A scalar is one row.
        scale: factor of all values, for scaled fp8.
    """

    tensor: StoredTensor
    start: int
    stop: int
    scale: float | None = None

    @property
    def numbers_per_row(self) -> int:
        return math.prod(self.tensor.shape[1:])

    @property
    def numbers(self) -> int:
        return (self.stop - self.start) * self.numbers_per_row

    def read(self, target: Tensor, start: int) -> None:
        """Read consecutive values of these rows, from number ``start`` on.

        Args:
            target: where they go, contiguous, (values,).

        Raises:
            AdapterFileError: the file is shorter than its header says.
        """
        stored, size = self.tensor, self.tensor.dtype.itemsize
        with open(stored.path, "rb") as file:
            file.seek(stored.offset + (self.start * self.numbers_per_row + start) * size)
            for part in target.split(max(1, _BUFFER // size)):
                data = bytearray(part.numel() * size)
                if file.readinto(data) != len(data):
                    raise AdapterFileError(
                        f"{stored.path}: it ends within {stored.key}. Copy it again."
                    )
                if not data:
                    continue
                values = torch.frombuffer(data, dtype=stored.dtype)
                part.copy_(values if self.scale is None else values.float() * self.scale)


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a model in its files, by their names in the model.

    Names may also be those in the model with an adapter, whose layers contain the base's.

    Attributes:
        places: name -> the rows that a weight consists of, in order.
    """

    places: Mapping[str, Sequence[StoredRows]]

    def read(self, name: str, target: Tensor, start: int = 0) -> None:
        """Read consecutive rows of a weight, from row ``start`` on.

        Args:
            target: where they go, contiguous, (rows, *the weight's other dimensions), of any dtype
                and on any device. A scalar is one row.

        Raises:
            AdapterFileError: the file is shorter than its header says.
        """
        first = start * self._rows(name)[0].numbers_per_row
        self._read(name, target.detach().view(-1), first)

    def first_values(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        """Return the first ``count`` values of a weight, fewer if it has fewer."""
        numbers = sum(rows.numbers for rows in self._rows(name))
        values = torch.empty(min(count, numbers), dtype=dtype)
        self._read(name, values, 0)
        return values

    def _read(self, name: str, values: Tensor, first: int) -> None:
        last, place = first + len(values), 0
        for rows in self._rows(name):
            begin, end = max(first, place), min(last, place + rows.numbers)
            if begin < end:
                rows.read(values[begin - first : end - first], begin - place)
            place += rows.numbers

    def __contains__(self, name: str) -> bool:
        """Whether it is a stored weight, and not the second name of one."""
        return _without_layer(name) in self.places

    def _rows(self, name: str) -> Sequence[StoredRows]:
        return self.places[_without_layer(name)]


def _without_layer(name: str) -> str:
    return name.replace(".base_layer.", ".")


@dataclass
class UnreadModels:
    """Models of a base without their weights.

    Attributes:
        models: component -> the model, for ``load_base``.
        weights: component -> where its weights are.
        whole: component -> why it must be loaded whole.
    """

    models: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, StoredWeights] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)


class _Absent(ValueError):
    """The base does not have the weights of this component."""


def unread_models(
    options: BaseModelOptions, family: ModelFamily, components: Sequence[str], dtype: torch.dtype
) -> UnreadModels:
    """Return those of a base's components that it has, see :func:`unread_model`."""
    found = UnreadModels()
    for name in components:
        try:
            found.models[name], found.weights[name] = unread_model(options, family, name, dtype)
        except _Absent:
            continue
        except ValueError as error:
            found.whole[name] = str(error)
    return found


def unread_model(
    options: BaseModelOptions, family: ModelFamily, component: str, dtype: torch.dtype
) -> tuple[Any, StoredWeights]:
    """Return the base's denoiser or a text encoder without its weights, and where these are stored.

    The model has the dtypes of ``load_base``, and its buffers have their values. Its weights are
    placeholders.

    Raises:
        ValueError: ``load_base`` has to load it whole, or to report a problem with its files. The
            message says why.
    """
    try:
        folder, library, class_name, stored = _find(options, family, component)
        model = empty_model(library, class_name, str(folder), component, {})
        places = {}
        for name, tensor in model.state_dict().items():
            rows = stored.get(family.canonical(component, name))
            if rows is not None and _fits(rows, tensor):
                places[name] = rows
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        wanted = tensors.keys() & model.state_dict().keys()
        if not wanted <= places.keys() or (
            component == family.denoiser and len(places) != len(stored)
        ):
            raise ValueError("its files do not have exactly the names and shapes of its weights")
        convert(model, dtype)
        weights = StoredWeights(places)
        for name, tensor in model.state_dict().items():
            if not tensor.is_meta:  # a buffer
                weights.read(name, tensor)
    except _Absent:
        raise
    except Exception as error:  # libraries may raise anything on damaged files
        raise ValueError(str(error)) from error
    model._apply(lambda tensor: _placeholder(tensor) if tensor.is_meta else tensor)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model, weights


def _fits(rows: Sequence[StoredRows], tensor: Tensor) -> bool:
    """Whether a weight has these rows. A 1 x 1 convolution may be stored as a matrix."""
    one = tensor.shape[1:].numel()
    return sum(part.numbers for part in rows) == tensor.numel() and all(
        part.numbers_per_row == one for part in rows
    )


def _find(
    options: BaseModelOptions, family: ModelFamily, component: str
) -> tuple[Path, str, str, dict[str, tuple[StoredRows, ...]]]:
    """Return the folder of configurations, library and class of a model, and where its weights are.

    They are listed by the names that the family's key maps have. All that ``load_base`` will read
    is downloaded.

    Raises:
        _Absent: the base does not have this model.
        ValueError: the model's weights must be read by its library.
    """
    base = options.pretrained_model_name_or_path
    given = left_out_parts(options, family)
    hub: dict[str, Any] = {"cache_dir": options.cache_dir}
    if Path(base).is_file():
        file = SingleFile(Path(base))
        index, left_out = file.rest(options, family, given)
        given |= left_out
        held = {family.denoiser, *file.held(family)}
        if component in held and component not in given:
            folder = Path(index.source)
            if not folder.is_dir():
                folder = fetch(index.source, ["*.json"], cache_dir=options.cache_dir)
            return folder, *index.components[component], _in_file(file, family, component)
        given |= dict.fromkeys(held)
    else:
        hub["revision"] = options.revision
        index = PipelineIndex("pretrained_model_name_or_path", base, **hub)
    if component in given or component not in index:
        raise _Absent(f"the base has no {component}")
    folder = Path(index.source)
    if not folder.is_dir():
        pipeline_class: Any = getattr(diffusers, family.pipeline_classes[0])
        hub |= {"variant": options.variant, "use_safetensors": True}
        folder = Path(pipeline_class.download(index.source, **hub, **given))
    stored = _in_folder(folder / component, options.variant)
    named = {family.canonical(component, key): rows for key, rows in stored.items()}
    return folder, *index.components[component], named


def _in_folder(folder: Path, variant: str | None) -> dict[str, tuple[StoredRows, ...]]:
    if "quantization_config" in read_json(folder / MODEL_CONFIG):
        raise ValueError("it is quantized")
    # diffusers reads the usual files where a component has no such variant
    files = weight_files(folder, variant) or weight_files(folder)
    if not files:
        raise _Absent(f"{folder} has no weights")
    return {
        key: (_all_of(tensor),)
        for file in files
        if file.suffix == ".safetensors"
        for key, tensor in read_header(file)[0].items()
    }


def _in_file(
    file: SingleFile, family: ModelFamily, component: str
) -> dict[str, tuple[StoredRows, ...]]:
    """Return where the weights of a model are in a single file, by its family's names.

    Raises:
        ValueError: a weight is transposed in the file, or the denoiser has one without a name.
    """
    key_maps = family.original_key_maps.get(component, ())
    if component == family.denoiser:
        key_map, prefix = key_maps[0], file.prefix
    else:
        found = [(one, one.begins(file.tensors)) for one in key_maps]
        key_map, prefix = next((one, start) for one, start in found if start is not None)
    tensors = {k: t for k, t in file.tensors.items() if k.startswith(prefix)}
    scales = scaled_fp8.read_scales(tensors)
    weights = tensors.keys() - (file.readable - scales.keys())
    shapes = {key.removeprefix(prefix): tensors[key].shape for key in tensors if key in weights}
    places: dict[str, dict[int, StoredRows]] = {}
    read = set()
    try:
        originals = key_map.read(shapes)
    except KeyMapError as error:
        raise ValueError(str(error)) from error
    for original in originals:
        key, first = prefix + original.key, 0
        read.add(key)
        for part in original.parts:
            if part.transposed:
                raise ValueError(f"the file has the transpose of {part.key}")
            count = part.stop - part.start if original.shape else 1
            rows = StoredRows(tensors[key], first, first + count, scales.get(key))
            places.setdefault(part.key, {})[part.start] = rows
            first += count
    if component == family.denoiser and (others := sorted(weights - read)):
        raise ValueError(f"the file has {others[0]}, which the model does not have")
    return {
        name: tuple(rows for _, rows in sorted(parts.items())) for name, parts in places.items()
    }


def _all_of(tensor: StoredTensor) -> StoredRows:
    return StoredRows(tensor, 0, tensor.shape[0] if tensor.shape else 1)


def _placeholder(tensor: Tensor) -> Tensor:
    return torch.full((), math.nan, dtype=tensor.dtype).expand(tensor.shape)
