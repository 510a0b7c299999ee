"""Recognize an original single file by its header: its family, or why it is not a base."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from gralora_diffusion.families import ModelFamily, get_family, list_families
from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.io.json_files import parse_object
from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.io.tensor_files import StoredTensor, read_header
from gralora_diffusion.key_maps import DENOISER

from .scaled_fp8 import FORMATS, explained, stored_formats

#: diffusers' answer for keys that it does not know, and for Stable Diffusion 1.x.
_UNKNOWN = "v1"
# endings of keys in quantized files: scales without which the weights have no meaning
_QUANTIZED = (
    *("scaled_fp8", ".scale_weight", ".weight_scale", ".weight_s_rel", ".absmax", ".comfy_quant"),
    *(".qweight", ".wscales"),
)
#: Dtypes of packed weights: several values in one, or with scales that only the header may name.
_PACKED = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "F4", "F8_E8M0")
#: First and last layer of a denoiser -> whether its outputs are patches of pixels.
_ENDS = {
    ("input_blocks.0.0.weight", "out.2.weight"): False,
    ("x_embedder.proj.weight", "final_layer.linear.weight"): True,
    ("img_in.weight", "final_layer.linear.weight"): True,
}
#: Keys that only bases for other tasks and samplers have: EDM's, and SDXL's refiner.
_OTHER_TASKS = ("edm_mean", "edm_std", "conditioner.embedders.0.model.")
#: Keys by which diffusers distinguishes versions of Stable Diffusion.
_VERSION_2 = f"{DENOISER}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
_XL = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
#: Field in which ComfyUI's files state how layers are stored (its ``QUANTIZATION.md``).
_QUANTIZATION = "_quantization_metadata"


class OriginalFileError(ValueError):
    """A single file is not a base, or is incomplete."""


class OriginalHeader:
    """Facts about an original checkpoint from its keys and shapes.

    Attributes:
        tensors: tensors in the header, by key.
        metadata: metadata in the header.
        prefix: prefix of the denoiser's keys; empty in a file of the denoiser alone.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        metadata: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.tensors, self.metadata = tensors, metadata
        self.keys = frozenset(tensors)
        self.prefix = DENOISER if self.begins_with(DENOISER) else ""

    @property
    def families(self) -> list[ModelFamily]:
        """The families that match most keys of the denoiser; empty if none is supported."""
        fitting = [
            family
            for family in map(get_family, list_families())
            if family.single_file_keys
            and {self.prefix + key for key in family.single_file_keys} <= self.keys
        ]
        most = max((len(family.single_file_keys) for family in fitting), default=0)
        return [family for family in fitting if len(family.single_file_keys) == most]

    @property
    def quantized(self) -> str | None:
        """A key that only quantized files have."""
        return self.quantized_below("")

    def quantized_below(self, prefix: str, scaled_fp8: bool = False) -> str | None:
        """Return a key with this prefix that only quantized files have, if there is one.

        Args:
            scaled_fp8: whether keys of scaled fp8 files that can be read do not count.
        """
        keys = self._quantized - (self.readable if scaled_fp8 else set())
        return min((key for key in keys if key.startswith(prefix)), default=None)

    @cached_property
    def readable(self) -> set[str]:
        """Keys that only scaled fp8 files have, as far as such a file can be read."""
        layers = _quantized_layers(self.metadata)
        if layers is None or set(layers.values()) - set(FORMATS):
            return set()
        return explained(self.tensors)

    @cached_property
    def _quantized(self) -> set[str]:
        """Keys that only quantized files have, and weights that the header calls quantized."""
        keys = {
            key
            for key, tensor in self.tensors.items()
            if key.endswith(_QUANTIZED)
            or (tensor.dtype_name.startswith(_PACKED) and key.endswith(".weight"))
        }
        layers = _quantized_layers(self.metadata)
        if layers is None:  # it cannot be read, so any layer may be quantized
            return {*self.keys}
        weights = {f"{name}.weight" for name in layers}
        # names of the denoiser's layers may have no prefix
        return keys | {key if key in self.keys else self.prefix + key for key in weights}

    @cached_property
    def kind(self) -> str:
        """The kind of model that diffusers takes it for."""
        if self._fills_masks:
            return self._kind_for_masks
        import torch  # both take seconds to import, and not every header needs this
        from diffusers.loaders.single_file_utils import infer_diffusers_model_type

        # only names and shapes are needed, so a meta tensor stands for each
        header = {key: torch.empty(t.shape, device="meta") for key, t in self.tensors.items()}
        try:
            return str(infer_diffusers_model_type(header))
        except (KeyError, IndexError, UnboundLocalError):  # keys as expected, shapes not
            return _UNKNOWN

    @property
    def _fills_masks(self) -> bool:
        """Whether it is a UNet for inpainting: latents, masked latents and a mask enter it."""
        first = self.tensors.get(f"{DENOISER}input_blocks.0.0.weight")
        return first is not None and first.shape[1:2] == (9,)

    @property
    def _kind_for_masks(self) -> str:
        """diffusers' kind of such a UNet, which it decides first and by these two keys."""
        version_2 = self.tensors.get(_VERSION_2)
        if version_2 is not None and version_2.shape[-1:] == (1024,):
            return "inpainting_v2"
        return "xl_inpaint" if _XL in self.tensors else "inpainting"

    @property
    def _predicts_its_input(self) -> bool:
        """Whether the denoiser has as many inputs as outputs, and nothing names another task.

        A base for inpainting or editing has more inputs, such as the latents of an image. This is
        all that distinguishes most files, and diffusers takes seconds to import.
        """
        if self.begins_with(_OTHER_TASKS):
            return False
        shape = {key: self.tensors[key].shape for key in self.keys}
        for (first, last), in_patches in _ENDS.items():
            inputs, outputs = shape.get(self.prefix + first), shape.get(self.prefix + last)
            if inputs and outputs and len(inputs) > 1:
                return outputs[0] == (math.prod(inputs[1:]) if in_patches else inputs[1])
        return False

    def other_kind(self, family: ModelFamily) -> str | None:
        """Return diffusers' kind of model, if it is not a text-to-image base of the family."""
        if self._predicts_its_input:
            return None
        return None if self.kind in (*family.single_file_types, _UNKNOWN) else self.kind

    def begins_with(self, start: str | tuple[str, ...]) -> bool:
        """Whether a key has this prefix."""
        return any(key.startswith(start) for key in self.keys)


def _quantized_layers(metadata: Mapping[str, str]) -> dict[str, str] | None:
    """Return the layers that a header calls quantized, and their formats; None if unreadable."""
    if _QUANTIZATION not in metadata:
        return {}
    try:
        layers = dict(parse_object(metadata[_QUANTIZATION])["layers"])
        return {str(name): str(layer["format"]) for name, layer in layers.items()}
    except (ValueError, TypeError, KeyError):
        return None


class OriginalFile(OriginalHeader):
    """An original checkpoint. Only its header is read.

    Raises:
        OriginalFileError: it is not a complete .safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            tensors, metadata = self._read()
        except AdapterFileError as error:
            raise self.error(str(error).removeprefix(f"{self.path}: ")) from error
        super().__init__(tensors, metadata)

    def _read(self) -> tuple[Mapping[str, StoredTensor], Mapping[str, str]]:
        """Return the tensors and the metadata in the header."""
        return read_header(self.path)

    def error(self, problem: str) -> ValueError:
        return OriginalFileError(f"{self.path}: {problem}")

    def find_family(
        self, any_task: bool = False, denoiser_only: bool = False, scaled_fp8: bool = False
    ) -> ModelFamily:
        """Return the family of this file.

        Args:
            any_task: whether bases for depth, editing and so on are accepted, too.
            denoiser_only: only the denoiser is read, so the rest may be quantized.
            scaled_fp8: whether weights in fp8 may have a scale.

        Raises:
            OriginalFileError: the file is not a base of a supported family, or is quantized.
        """
        if not self.families:
            raise self.error(self._not_a_base())
        family = self.families[0]
        kind = None if any_task else self.other_kind(family)
        trained = (*family.inpainting_file_types, *family.editing_file_types)
        if kind is not None and kind not in trained:
            raise self.error(
                f"diffusers takes this single file for {kind!r}, which does not belong to a "
                f"supported family ({', '.join(list_families())}). Pass the text-to-image base"
            )
        if key := self.quantized_below(self.prefix, scaled_fp8):
            raise self.error(
                f"this is a quantized file ({key}), which cannot be read{self._why_unreadable()}. "
                "Pass the file in 16 bits"
            )
        if (key := self.quantized_below("", scaled_fp8)) and not denoiser_only:
            raise self.error(
                f"its denoiser is not quantized, but another part is ({key}), and cannot be read. "
                "Pass a file in 16 bits, or export the denoiser alone with --denoiser_only"
            )
        return family

    def _why_unreadable(self) -> str:
        """Return which of ComfyUI's formats the file has, if it names any that cannot be read."""
        layers = _quantized_layers(self.metadata) or {}
        found = {*layers.values(), *stored_formats(self.tensors)} - set(FORMATS)
        if not found:
            return ""
        named = first_few(sorted(found))
        return (
            f": it has weights in {named}. Of ComfyUI's formats, only {' and '.join(FORMATS)} are"
        )

    def _not_a_base(self) -> str:
        what = (
            f"this single file does not belong to a supported family ({', '.join(list_families())})"
        )
        if any("lora" in key.lower() for key in self.keys):
            return f"{what}: it is an adapter. Pass the base that it belongs to"
        if self.begins_with(("down_blocks.", "transformer_blocks.", "encoder.down_blocks.")):
            return (
                f"{what}: its keys are those of one model in diffusers' layout. Pass the folder of "
                "the whole pipeline, with model_index.json"
            )
        some = ", ".join(sorted(self.keys)[:3])
        return (
            f"{what}: it contains none of their denoisers (its keys: {some}, ...). A VAE or a text "
            "encoder alone is not a base. Pass a file with a denoiser"
        )
