"""An original single file, told apart by its header: the family, and why it is no base."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type

from .families import ModelFamily, get_family, list_families
from .layouts import DENOISER
from .tensor_files import AdapterFileError, read_header

#: What diffusers says of keys that it does not know, and of Stable Diffusion 1.x.
_UNKNOWN = "v1"
# ends of keys that only quantized files have: numbers without which the weights are not theirs
_QUANTIZED = ("scaled_fp8", ".scale_weight", ".weight_scale", ".absmax", ".comfy_quant")


class OriginalFileError(ValueError):
    """A single file that is no base, or not a whole one."""


class OriginalFile:
    """An original checkpoint. Only its header is read.

    Attributes:
        tensors: what the header says of them, by key.
        metadata: what it says besides.
        prefix: how the denoiser's keys begin; empty in a file of the denoiser alone.
        kind: what diffusers takes it for.

    Raises:
        OriginalFileError: not a whole .safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.tensors, self.metadata = read_header(self.path)
        except AdapterFileError as error:
            raise self.error(str(error).removeprefix(f"{self.path}: ")) from error
        self.keys = frozenset(self.tensors)
        self.prefix = DENOISER if self.begins_with(DENOISER) else ""
        # only names and shapes are needed, so a meta tensor stands for each
        header = {key: torch.empty(t.shape, device="meta") for key, t in self.tensors.items()}
        try:
            self.kind = infer_diffusers_model_type(header)
        except (KeyError, IndexError, UnboundLocalError):  # keys as expected, shapes not
            self.kind = _UNKNOWN

    def error(self, problem: str) -> ValueError:
        return OriginalFileError(f"{self.path}: {problem}")

    def find_family(self, any_task: bool = False) -> ModelFamily:
        """Return the family of this file.

        Args:
            any_task: whether bases for inpainting, editing and so on are taken, too.

        Raises:
            OriginalFileError: no base of a supported family, or a quantized one.
        """
        families = [get_family(name) for name in list_families()]
        fitting = [f for f in families if f.single_file_keys and self._holds(f.single_file_keys)]
        family = max(fitting, key=lambda f: len(f.single_file_keys), default=None)
        if family is None:
            raise self.error(self._not_a_base())
        if not any_task and self.kind not in (*family.single_file_types, _UNKNOWN):
            raise self.error(
                f"diffusers takes this single file for {self.kind!r}, which is of no supported "
                f"family ({', '.join(list_families())}). Give the text-to-image base"
            )
        if quantized := sorted(key for key in self.keys if key.endswith(_QUANTIZED)):
            raise self.error(
                f"a quantized file ({quantized[0]}), which cannot be read. Give the one in 16 bits"
            )
        return family

    def begins_with(self, start: str | tuple[str, ...]) -> bool:
        """Whether a key begins so."""
        return any(key.startswith(start) for key in self.keys)

    def _holds(self, denoiser_keys: Collection[str]) -> bool:
        return all(self.prefix + key in self.keys for key in denoiser_keys)

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
