"""A base in one original .safetensors or .gguf file: its family and its models, read by diffusers.

Such a file contains a denoiser and often a VAE and text encoders. The missing parts, always the
scheduler and the tokenizers, come from a pipeline of the same kind in diffusers' layout.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    create_diffusers_clip_model_from_ldm,
    create_diffusers_t5_model_from_checkpoint,
)
from safetensors import safe_open
from torch import Tensor, nn

from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.hub import fetch
from gralora_diffusion.io.tensor_files import StoredTensor
from gralora_diffusion.key_maps import DENOISER

from . import gguf_file, scaled_fp8
from .options import BaseModelOptions
from .pipeline_index import PipelineIndex
from .single_file_header import OriginalFile

logger = logging.getLogger(__name__)

VAES = ("first_stage_model.", "vae.")
TEXT_ENCODERS = {
    "CLIPTextModel": create_diffusers_clip_model_from_ldm,
    "CLIPTextModelWithProjection": create_diffusers_clip_model_from_ldm,
    "T5EncoderModel": create_diffusers_t5_model_from_checkpoint,
}


class SingleFile(OriginalFile):
    """An original checkpoint as a base. Only its header is read until :meth:`load`.

    Raises:
        ConfigError: it is not a complete .safetensors file.
    """

    def _read(self) -> tuple[Mapping[str, StoredTensor], Mapping[str, str]]:
        if not gguf_file.is_gguf(str(self.path)):
            return super()._read()
        try:
            return gguf_file.read_tensors(self.path), {}
        except (ValueError, OSError) as error:
            raise self.error(str(error)) from error

    def error(self, problem: str) -> ConfigError:
        return ConfigError([f"--pretrained_model_name_or_path {self.path}: {problem}"])

    def check_family(self, expected: ModelFamily | None) -> ModelFamily:
        """Return the family of this file.

        Args:
            expected: the family in the options, if they name one.

        Raises:
            ConfigError: the file is not a base of a supported family, or not of the expected one.
        """
        family = self.find_family(scaled_fp8=True)
        if expected and expected is not family:
            raise self.error(
                f"this single file is {family.name}, but --family or --base_config says "
                f"{expected.name}"
            )
        return family

    def load(
        self,
        options: BaseModelOptions,
        family: ModelFamily,
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
        given: Collection[str],
    ) -> tuple[str, dict[str, Any]]:
        """Read the models of the file.

        Args:
            dtype: dtype of denoiser and text encoders.
            given: components that need not be read.

        Returns:
            The folder or Hub id for the rest of the pipeline, and component -> model; None for an
            optional text encoder that is in neither of them.

        Raises:
            ConfigError: a component is in neither of them, or the weights do not fit the family.
        """
        index, parts = self.rest(options, family, given)
        folder = source = index.source
        if not Path(source).is_dir():
            folder = str(fetch(source, ["*.json"], cache_dir=options.cache_dir))
        held = self.held(family)
        read = [name for name in held if name not in given and name not in parts]

        models = _Models(self, index, folder)
        if family.denoiser not in given:
            tensors = self._tensors(self.prefix, dtype)
            parts[family.denoiser] = models.denoiser(family.denoiser, tensors, self.prefix, dtype)
        for name in read:
            tensors = self._tensors(held[name], dtype)
            if name == "vae":
                parts[name] = models.model(name, tensors, vae_dtype)
            else:
                parts[name] = models.text_encoder(name, tensors, dtype)
        if "v_pred" in self.keys:  # the mark in files of Stable Diffusion XL
            scheduler = getattr(diffusers, index.components["scheduler"][1])
            betas = {"rescale_betas_zero_snr": True} if "ztsnr" in self.keys else {}
            parts["scheduler"] = scheduler.from_pretrained(
                folder, subfolder="scheduler", prediction_type="v_prediction", **betas
            )
        return source, parts

    def _tensors(self, start: str | tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
        """Read the tensors with this prefix.

        Those in scaled fp8 become ``dtype``; those of GGUF stay quantized.
        """
        if gguf_file.is_gguf(str(self.path)):
            return gguf_file.load_tensors(self.path)
        stored = {key: tensor for key, tensor in self.tensors.items() if key.startswith(start)}
        with safe_open(self.path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in stored}
        try:
            scaled_fp8.read(tensors, scaled_fp8.find_scales(stored), dtype)
        except ValueError as error:
            raise self.error(f"{error}. Pass the file in 16 bits") from error
        return tensors

    def rest(
        self, options: BaseModelOptions, family: ModelFamily, given: Collection[str]
    ) -> tuple[PipelineIndex, dict[str, Any]]:
        """Return the pipeline that completes the file, and component -> None for absent encoders.

        Raises:
            ConfigError: there is no such pipeline, or another component is in neither of them.
        """
        source = self._source_of_the_rest(options, family)
        try:
            index = PipelineIndex("base_config", source, options.cache_dir)
            index.check_libraries()
        except ConfigError as error:
            if options.base_config:
                raise
            raise self.error(
                f"its missing parts would come from {source}, the default for this family, which "
                "cannot be used. Offline, pass a folder with a pipeline of the same kind as "
                f"--base_config. {error.problems[0]}"
            ) from error
        if not options.base_config and index.family is not family:
            raise self._unknown_model(family)
        return index, self._left_out(options, family, index, self.held(family), given)

    # -- the header --------------------------------------------------------------------------------

    def held(self, family: ModelFamily) -> dict[str, tuple[str, ...]]:
        """Return VAE and text encoders in the file -> the prefixes of their keys."""
        held: dict[str, tuple[str, ...]] = {"vae": VAES}
        for name, key_maps in family.original_key_maps.items():
            if name in family.all_text_encoders:
                held[name] = tuple(prefix for key_map in key_maps for prefix in key_map.prefixes)
        return {name: starts for name, starts in held.items() if self.begins_with(starts)}

    # -- missing parts -----------------------------------------------------------------------------

    def _source_of_the_rest(self, options: BaseModelOptions, family: ModelFamily) -> str:
        if options.base_config:
            return options.base_config
        known = (
            *(*family.single_file_types, *family.inpainting_file_types),
            *family.editing_file_types,
        )
        if self.kind in known and family.single_file_default:
            return DIFFUSERS_DEFAULT_PIPELINE_PATHS[self.kind]["pretrained_model_name_or_path"]
        raise self._unknown_model(family)

    def _unknown_model(self, family: ModelFamily) -> ValueError:
        return self.error(
            f"this single file is {family.name}, but it does not show which of these models it is. "
            "Pass its pipeline as --base_config: a folder or a Hub id"
        )

    def _left_out(
        self,
        options: BaseModelOptions,
        family: ModelFamily,
        index: PipelineIndex,
        held: Collection[str],
        given: Collection[str],
    ) -> dict[str, Any]:
        """Return the text encoders that are neither in the file nor in the other pipeline."""
        left_out: dict[str, Any] = {}
        problems = []
        whole = any(name in held for name in family.all_text_encoders)
        for name in ("vae", *family.all_text_encoders):
            optional = name in family.optional_text_encoders
            # a file that has other text encoders is complete without it
            elsewhere = bool(options.base_config) or not (whole and optional)
            found = name in index if name in held else elsewhere and index.has_weights(name)
            if found or name in given:
                continue
            if optional:
                left_out |= without_text_encoder(name)
                logger.warning(
                    "the base is loaded without %s: %s does not contain it", name, self.path
                )
            else:
                misses = "configuration" if name in held else "weights"
                problems.append(
                    f"--base_config {index.source} does not contain the {misses} of the {name}, "
                    "which the single file needs. Pass a pipeline that does"
                )
        if problems:
            raise ConfigError(problems)
        return left_out


class _Models:
    """Models of a single file, built with the configuration in a pipeline's folder."""

    def __init__(self, file: SingleFile, index: PipelineIndex, folder: str) -> None:
        self.file, self.index, self.folder = file, index, folder

    def denoiser(
        self, name: str, tensors: dict[str, Tensor], prefix: str, dtype: torch.dtype
    ) -> nn.Module:
        # diffusers expects the prefix for a UNet, and no prefix for some transformers
        wanted = DENOISER if name == "unet" else ""
        tensors = {wanted + key.removeprefix(prefix): t for key, t in tensors.items()}
        if gguf_file.is_gguf(str(self.file.path)):  # diffusers checks the shapes of packed weights
            config = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
            return self.model(name, tensors, dtype, quantization_config=config)
        count = _numbers(tensors)
        model = self.model(name, tensors, dtype)
        expected = _numbers(model.state_dict())
        if expected != count:  # diffusers would ignore weights that the model does not have
            raise self._unreadable(name, f"it has {count} weights, but the model has {expected}")
        return model

    def model(
        self, name: str, tensors: dict[str, Tensor], dtype: torch.dtype, **options: Any
    ) -> nn.Module:
        """Read one of diffusers' models."""
        model_class = getattr(diffusers, self.index.components[name][1])
        try:
            return model_class.from_single_file(
                tensors, config=self.folder, subfolder=name, torch_dtype=dtype, **options
            )
        except (ValueError, KeyError, IndexError, RuntimeError) as error:
            raise self._unreadable(name, f"{type(error).__name__}: {error}") from error

    def text_encoder(self, name: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
        """Read one of transformers' models."""
        class_name = self.index.components[name][1]
        try:
            model = TEXT_ENCODERS[class_name](
                getattr(transformers, class_name),
                tensors,
                config=self.folder,
                subfolder=name,
                torch_dtype=dtype,
            )
        except (ValueError, KeyError, RuntimeError) as error:
            raise self._unreadable(name, f"{type(error).__name__}: {error}") from error
        model.tie_weights()  # files of T5 do not contain the copy of its embedding
        if absent := [key for key, p in model.named_parameters() if p.is_meta]:
            raise self._unreadable(name, f"{len(absent)} weights are missing, such as {absent[0]}")
        return model

    def _unreadable(self, name: str, problem: str) -> ConfigError:
        return self.file.error(
            f"its {name} cannot be read with the configuration of {self.index.source} ({problem}). "
            "Pass its own pipeline as --base_config"
        )


def _numbers(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def left_out_parts(options: BaseModelOptions, family: ModelFamily) -> dict[str, Any]:
    """Return arguments for a pipeline without the parts that family and options leave out."""
    parts: dict[str, Any] = dict(family.load_options)
    for name in options.leave_out_text_encoders or ():
        parts |= without_text_encoder(name)
    return parts


def without_text_encoder(name: str) -> dict[str, None]:
    """Return arguments for a pipeline without a text encoder and its tokenizer."""
    return {name: None, name.replace("text_encoder", "tokenizer"): None}
