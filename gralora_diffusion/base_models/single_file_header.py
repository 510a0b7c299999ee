"""An original single file, told apart by its header: the family, and why it is no base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from gralora_diffusion.families import ModelFamily, get_family, list_families
from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.io.json_files import parse_object
from gralora_diffusion.io.tensor_files import StoredTensor, read_header
from gralora_diffusion.key_maps import DENOISER

#: What diffusers says of keys that it does not know, and of Stable Diffusion 1.x.
_UNKNOWN = "v1"
# ends of keys that only quantized files have: numbers without which the weights are not theirs
_QUANTIZED = (
    *("scaled_fp8", ".scale_weight", ".weight_scale", ".weight_s_rel", ".absmax", ".comfy_quant"),
    *(".qweight", ".wscales"),
)
#: Weights that are packed, several values in one or with scales that only the header may tell of.
_PACKED = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "F4", "F8_E8M0")
#: Where ComfyUI's files say in which form layers are stored (its ``QUANTIZATION.md``).
_QUANTIZATION = "_quantization_metadata"


class OriginalFileError(ValueError):
    """A single file that is no base, or not a whole one."""


class OriginalHeader:
    """What the keys and shapes of an original checkpoint tell of it.

    Attributes:
        tensors: what the header says of them, by key.
        metadata: what the header says besides.
        prefix: how the denoiser's keys begin; empty in a file of the denoiser alone.
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
        """Those that know the denoiser by most keys; none if it is of no supported family."""
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

    def quantized_below(self, prefix: str) -> str | None:
        """Return a key with this beginning that only quantized files have, if there is one."""
        return min((key for key in self._quantized if key.startswith(prefix)), default=None)

    @cached_property
    def _quantized(self) -> set[str]:
        """Keys that tell a quantized file, and layers that its header says are stored so."""
        keys = {
            key
            for key, tensor in self.tensors.items()
            if key.endswith(_QUANTIZED)
            or (tensor.dtype_name.startswith(_PACKED) and key.endswith(".weight"))
        }
        told = _quantized_layers(self.metadata)
        if told is None:  # it cannot be read, so nothing is known of any of them
            return {*self.keys}
        weights = {f"{name}.weight" for name in told}
        # names of the denoiser's layers may lack the prefix
        return keys | {key if key in self.keys else self.prefix + key for key in weights}

    @cached_property
    def kind(self) -> str:
        """What diffusers takes it for."""
        import torch  # both take seconds to import, and not every header is asked
        from diffusers.loaders.single_file_utils import infer_diffusers_model_type

        # only names and shapes are needed, so a meta tensor stands for each
        header = {key: torch.empty(t.shape, device="meta") for key, t in self.tensors.items()}
        try:
            return str(infer_diffusers_model_type(header))
        except (KeyError, IndexError, UnboundLocalError):  # keys as expected, shapes not
            return _UNKNOWN

    def other_kind(self, family: ModelFamily) -> str | None:
        """What diffusers takes it for, if that is no text-to-image base of the family."""
        return None if self.kind in (*family.single_file_types, _UNKNOWN) else self.kind

    def begins_with(self, start: str | tuple[str, ...]) -> bool:
        """Whether a key begins so."""
        return any(key.startswith(start) for key in self.keys)


def _quantized_layers(metadata: Mapping[str, str]) -> list[str] | None:
    """The layers that a header calls quantized; None if what it says cannot be read."""
    if _QUANTIZATION not in metadata:
        return []
    try:
        return [str(name) for name in dict(parse_object(metadata[_QUANTIZATION])["layers"])]
    except (ValueError, TypeError, KeyError):
        return None


class OriginalFile(OriginalHeader):
    """An original checkpoint. Only its header is read.

    Raises:
        OriginalFileError: not a whole .safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            tensors, metadata = read_header(self.path)
        except AdapterFileError as error:
            raise self.error(str(error).removeprefix(f"{self.path}: ")) from error
        super().__init__(tensors, metadata)

    def error(self, problem: str) -> ValueError:
        return OriginalFileError(f"{self.path}: {problem}")

    def find_family(self, any_task: bool = False, denoiser_only: bool = False) -> ModelFamily:
        """Return the family of this file.

        Args:
            any_task: whether bases for inpainting, editing and so on are taken, too.
            denoiser_only: whether nothing else of the file is read, so that the rest may be
                quantized.

        Raises:
            OriginalFileError: no base of a supported family, or a quantized one.
        """
        if not self.families:
            raise self.error(self._not_a_base())
        family = self.families[0]
        if not any_task and (kind := self.other_kind(family)):
            raise self.error(
                f"diffusers takes this single file for {kind!r}, which is of no supported "
                f"family ({', '.join(list_families())}). Give the text-to-image base"
            )
        if key := self.quantized_below(self.prefix):
            raise self.error(
                f"a quantized file ({key}), which cannot be read. Give the one in 16 bits"
            )
        if (key := self.quantized) and not denoiser_only:
            raise self.error(
                f"its denoiser is not quantized, but something else is ({key}), which cannot be "
                "read. Give a file in 16 bits; an export of the denoiser alone (--denoiser_only) "
                "takes this one, too"
            )
        return family

    def _not_a_base(self) -> str:
        what = f"this single file is of no supported family ({', '.join(list_families())})"
        if any("lora" in key.lower() for key in self.keys):
            return f"{what}: it is an adapter. Give the base that it belongs to"
        if self.begins_with(("down_blocks.", "transformer_blocks.", "encoder.down_blocks.")):
            return (
                f"{what}: its keys are those of one model in diffusers' layout. Give the folder of "
                "the whole pipeline, with model_index.json"
            )
        some = ", ".join(sorted(self.keys)[:3])
        return (
            f"{what}: it holds none of their denoisers (its keys: {some}, ...). A VAE or a text "
            "encoder alone is no base"
        )
