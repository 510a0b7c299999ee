"""Load the frozen base: a diffusers folder, a Hub id, or one original .safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors import SafetensorError, safe_open
from torch import nn

from ..families import ModelFamily, find_family, get_family, list_families
from .config import TrainingConfig
from .config_checks import ConfigError
from .quantization import check_computing_dtype, loading_arguments


def find_base_family(config: TrainingConfig) -> ModelFamily:
    """Tell the family of the base from its index or its keys, before any weight is loaded.

    Raises:
        ConfigError: the base is not there, not readable, or of no supported family.
    """
    base = config.pretrained_model_name_or_path
    if config.family and config.family not in list_families():
        raise ConfigError(
            [f"--family is {config.family!r}; it must be one of {', '.join(list_families())}"]
        )
    if Path(base).is_file():
        family, found = _family_of_file(Path(base)), "this single file"
    else:
        try:
            index = DiffusionPipeline.load_config(
                base, revision=config.revision, cache_dir=config.cache_dir
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                [
                    f"--pretrained_model_name_or_path {base}: no diffusers pipeline there "
                    f"({error}). Give a folder with model_index.json, a Hub id such as "
                    "stable-diffusion-v1-5/stable-diffusion-v1-5, or one .safetensors checkpoint"
                ]
            ) from error
        found = str(index.get("_class_name"))
        family = find_family(getattr(diffusers, found, object))
    if config.family:
        chosen = get_family(config.family)
        if family and family is not chosen:
            raise ConfigError(
                [f"--family {config.family}, but the base is {family.name} ({found})"]
            )
        return chosen
    if family is None:
        raise ConfigError(
            [
                f"--pretrained_model_name_or_path {base}: {found} is of no supported family "
                f"({', '.join(list_families())}). If it is one of them, say --family"
            ]
        )
    return family


def load_base(
    config: TrainingConfig,
    family: ModelFamily,
    dtype: torch.dtype,
    vae_dtype: torch.dtype = torch.float32,
) -> Any:
    """Load the base as a text-to-image pipeline, all its weights frozen.

    The denoiser and the text encoders come in ``dtype``. The VAE of a training is fp32: its
    half-precision latents are wrong in some bases, and each picture passes through it once.

    Raises:
        ConfigError: the base cannot be loaded or is not one to train.
    """
    base = config.pretrained_model_name_or_path
    pipeline_class = getattr(diffusers, family.pipeline_classes[0])
    # a component that is given is not loaded from the base
    given: dict[str, Any] = {**family.load_options, **_vae(config, vae_dtype)}
    try:
        if Path(base).is_file():
            # in fp32 first: the VAE is to stay as exact as the file has it
            pipe = pipeline_class.from_single_file(
                base,
                dtype=torch.float32,
                config=config.base_config,
                cache_dir=config.cache_dir,
                **given,
            )
            for name, component in pipe.components.items():
                wanted = vae_dtype if name == "vae" else dtype
                if isinstance(component, nn.Module) and component.dtype != wanted:
                    component.to(wanted)
        else:
            pipe = pipeline_class.from_pretrained(
                base,
                dtype={"default": dtype, "vae": vae_dtype},
                variant=config.variant,
                revision=config.revision,
                cache_dir=config.cache_dir,
                **given,
                **loading_arguments(config, family, dtype),
            )
        check_computing_dtype(pipe, dtype)
        family.check_base(pipe)
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        hint = ""
        if Path(base).is_file() and config.base_config is None:
            hint = (
                ". A single file takes its configuration from the Hub; offline, give a folder with "
                "the pipeline's configuration as --base_config"
            )
        raise ConfigError(
            [f"--pretrained_model_name_or_path {base} cannot be used: {error}{hint}"]
        ) from error
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    return pipe


def _vae(config: TrainingConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The VAE that takes the place of the base's, if there is to be one."""
    source = config.pretrained_vae_model_name_or_path
    if not source:
        return {}
    try:
        vae = AutoencoderKL.from_pretrained(source, dtype=dtype, cache_dir=config.cache_dir)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            [f"--pretrained_vae_model_name_or_path {source} cannot be used: {error}"]
        ) from error
    return {"vae": vae}


def _family_of_file(path: Path) -> ModelFamily | None:
    try:
        with safe_open(path, framework="pt") as file:
            # only names and shapes are needed, so a meta tensor stands for each
            checkpoint = {
                key: torch.empty(file.get_slice(key).get_shape(), device="meta")
                for key in file.keys()  # noqa: SIM118
            }
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            [
                f"--pretrained_model_name_or_path {path}: not a whole .safetensors file ({error}). "
                "Other formats (.ckpt, .gguf) must be converted first"
            ]
        ) from error
    kind = infer_diffusers_model_type(checkpoint)
    known = any(key.startswith("model.diffusion_model.") for key in checkpoint)
    families = [get_family(name) for name in list_families()]
    # "v1" is also what diffusers says of keys that it does not know
    return next((f for f in families if known and kind in f.single_file_types), None)
