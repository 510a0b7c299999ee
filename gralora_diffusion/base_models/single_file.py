"""A base in one original .safetensors file: what it is, and its models, read by diffusers.

Such a file holds a denoiser and often a VAE and text encoders. What it lacks, always the scheduler
and the tokenizers, comes from a pipeline of the same kind in diffusers' layout.
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
from safetensors.torch import load_file
from torch import Tensor, nn

from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.hub import fetch
from gralora_diffusion.key_maps import DENOISER

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
        ConfigError: not a whole .safetensors file.
    """

    def error(self, problem: str) -> ConfigError:
        return ConfigError([f"--pretrained_model_name_or_path {self.path}: {problem}"])

    def family_told(self, told: ModelFamily | None) -> ModelFamily:
        """Return the family of this file.

        Args:
            told: what the options say that it is.

        Raises:
            ConfigError: no base of a supported family, or another one than told.
        """
        family = self.find_family()
        if told and told is not family:
            raise self.error(
                f"this single file is {family.name}, but --family or --base_config says {told.name}"
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
            dtype: of denoiser and text encoders.
            given: components that are not to be read.

        Returns:
            The folder or Hub id that the rest of the pipeline is to be loaded from, and component
            -> model; None for an optional text encoder that is neither here nor there.

        Raises:
            ConfigError: something lacks here and there, or the weights are not of the family.
        """
        index, parts = self.rest(options, family, given)
        folder = source = index.source
        if not Path(source).is_dir():
            folder = str(fetch(source, ["*.json"], cache_dir=options.cache_dir))
        held = self._held(family)
        read = [name for name in held if name not in given and name not in parts]

        checkpoint = load_file(self.path)
        models = _Models(self, index, folder)
        tensors = _taken(checkpoint, self.prefix)
        parts[family.denoiser] = models.denoiser(family.denoiser, tensors, self.prefix, dtype)
        for name in read:
            tensors = _taken(checkpoint, held[name])
            if name == "vae":
                parts[name] = models.model(name, tensors, vae_dtype)
            else:
                parts[name] = models.text_encoder(name, tensors, dtype)
        if "v_pred" in self.keys:  # how files of Stable Diffusion XL say it
            scheduler = getattr(diffusers, index.component_class("scheduler")[1])
            betas = {"rescale_betas_zero_snr": True} if "ztsnr" in self.keys else {}
            parts["scheduler"] = scheduler.from_pretrained(
                folder, subfolder="scheduler", prediction_type="v_prediction", **betas
            )
        return source, parts

    def rest(
        self, options: BaseModelOptions, family: ModelFamily, given: Collection[str]
    ) -> tuple[PipelineIndex, dict[str, Any]]:
        """Return the pipeline that completes the file, and component -> None for what it lacks too.

        Raises:
            ConfigError: there is no such pipeline, or something else lacks here and there.
        """
        source = self._source_of_the_rest(options, family)
        try:
            index = PipelineIndex("base_config", source, options.cache_dir)
        except ConfigError as error:
            if options.base_config:
                raise
            raise self.error(
                f"what it lacks would come from {source}, as nothing else was given. Offline, give "
                f"a folder with a pipeline of the same kind as --base_config. {error.problems[0]}"
            ) from error
        return index, self._left_out(options, family, index, self._held(family), given)

    # -- the header --------------------------------------------------------------------------------

    def _held(self, family: ModelFamily) -> dict[str, tuple[str, ...]]:
        """VAE and text encoders that the file holds -> how their keys begin."""
        held: dict[str, tuple[str, ...]] = {"vae": VAES}
        for name, key_maps in family.original_key_maps.items():
            if name in family.all_text_encoders:
                held[name] = tuple(prefix for key_map in key_maps for prefix in key_map.prefixes)
        return {name: starts for name, starts in held.items() if self.begins_with(starts)}

    # -- what lacks --------------------------------------------------------------------------------

    def _source_of_the_rest(self, options: BaseModelOptions, family: ModelFamily) -> str:
        if options.base_config:
            return options.base_config
        if self.kind in family.single_file_types and family.single_file_default:
            return DIFFUSERS_DEFAULT_PIPELINE_PATHS[self.kind]["pretrained_model_name_or_path"]
        raise self.error(
            f"this single file is {family.name}, but which of them cannot be told from it. Give "
            "the pipeline that it belongs to, a folder or a Hub id, as --base_config"
        )

    def _left_out(
        self,
        options: BaseModelOptions,
        family: ModelFamily,
        index: PipelineIndex,
        held: Collection[str],
        given: Collection[str],
    ) -> dict[str, Any]:
        """Find what is neither in the file nor in the pipeline for the rest."""
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
                logger.warning("the base is loaded without %s, which %s lacks", name, self.path)
            else:
                misses = "configuration" if name in held else "weights"
                problems.append(
                    f"--base_config {index.source}: no {misses} of the {name} there, which the "
                    "single file needs from it. Give a pipeline that has them"
                )
        if problems:
            raise ConfigError(problems)
        return left_out


class _Models:
    """Models of a single file, made with the configuration in a pipeline's folder."""

    def __init__(self, file: SingleFile, index: PipelineIndex, folder: str) -> None:
        self.file, self.index, self.folder = file, index, folder

    def denoiser(
        self, name: str, tensors: dict[str, Tensor], prefix: str, dtype: torch.dtype
    ) -> nn.Module:
        # diffusers looks for a UNet under the prefix, and for some transformers without
        wanted = DENOISER if name == "unet" else ""
        tensors = {wanted + key.removeprefix(prefix): t for key, t in tensors.items()}
        count = _numbers(tensors)
        model = self.model(name, tensors, dtype)
        expected = _numbers(model.state_dict())
        if expected != count:  # what has no place in the model would be passed over
            raise self._unreadable(name, f"it has {count} weights, the model {expected}")
        return model

    def model(self, name: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
        """One of diffusers' models."""
        model_class = getattr(diffusers, self.index.component_class(name)[1])
        try:
            return model_class.from_single_file(
                tensors, config=self.folder, subfolder=name, torch_dtype=dtype
            )
        except (ValueError, KeyError, IndexError, RuntimeError) as error:
            raise self._unreadable(name, f"{type(error).__name__}: {error}") from error

    def text_encoder(self, name: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
        """One of transformers' models."""
        class_name = self.index.component_class(name)[1]
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
        model.tie_weights()  # T5 is written without the copy of its embedding
        if absent := [key for key, p in model.named_parameters() if p.is_meta]:
            raise self._unreadable(name, f"{len(absent)} weights lack, such as {absent[0]}")
        return model

    def _unreadable(self, name: str, problem: str) -> ConfigError:
        return self.file.error(
            f"its {name} cannot be read with the configuration of {self.index.source} ({problem}). "
            "Give the pipeline that it belongs to as --base_config"
        )


def _taken(checkpoint: dict[str, Tensor], start: str | tuple[str, ...]) -> dict[str, Tensor]:
    """Take the tensors whose keys begin so out of the checkpoint."""
    return {key: checkpoint.pop(key) for key in list(checkpoint) if key.startswith(start)}


def _numbers(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def without_text_encoder(name: str) -> dict[str, None]:
    """Arguments for a pipeline that leave out a text encoder and its tokenizer."""
    return {name: None, name.replace("text_encoder", "tokenizer"): None}
