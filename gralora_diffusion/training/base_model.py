"""Load the frozen base: a diffusers folder, a Hub id, or one original .safetensors file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import diffusers
import torch
from safetensors import SafetensorError
from torch import nn

from gralora_diffusion.errors import ConfigError
from gralora_diffusion.families import ModelFamily, get_family, list_families
from gralora_diffusion.hub import offline_problem

from .config import TrainingConfig
from .config_checks import check_sizes
from .pipeline_index import PipelineIndex
from .quantization import check_computing_dtype, loading_arguments
from .single_file import SingleFile, without_text_encoder

LOADING_ERRORS = (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError)


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
    index = None
    if not Path(base).is_file():
        index = PipelineIndex(
            "pretrained_model_name_or_path", base, config.cache_dir, config.revision
        )
    elif config.base_config:
        index = PipelineIndex("base_config", config.base_config, config.cache_dir)
    family = _told_family(config, index)
    if Path(base).is_file():
        family = SingleFile(Path(base)).family_told(family)
    assert family is not None
    return family


def _told_family(config: TrainingConfig, index: PipelineIndex | None) -> ModelFamily | None:
    """The family that ``--family`` and the index, if there is one, agree on."""
    chosen = get_family(config.family) if config.family else None
    if index is None:
        return chosen
    if chosen and index.family and index.family is not chosen:
        raise ConfigError(
            [
                f"--family {config.family}, but --{index.option} is {index.family.name} "
                f"({index.pipeline_class}). Leave out --family, or give a base of {config.family}"
            ]
        )
    if not (chosen or index.family):
        raise ConfigError(
            [
                f"--{index.option} {index.source}: {index.pipeline_class} is of no supported "
                f"family ({', '.join(list_families())}). If it is one of them, say --family"
            ]
        )
    return chosen or index.family


def load_base(
    config: TrainingConfig,
    family: ModelFamily,
    dtype: torch.dtype,
    vae_dtype: torch.dtype = torch.float32,
) -> Any:
    """Load the base as a text-to-image pipeline, all its weights frozen, on the CPU.

    bitsandbytes quantizes on the GPU: 4 bits are brought back, so that only those models are there
    that compute. Of 8 bits a copy would stay there, and come to be two.

    The denoiser and the text encoders come in ``dtype``. The VAE of a training is fp32: its
    half-precision latents are wrong in some bases, and each picture passes through it once.

    Raises:
        ConfigError: the base cannot be loaded or is not one to train.
    """
    base, revision = config.pretrained_model_name_or_path, config.revision
    pipeline_class = getattr(diffusers, family.pipeline_classes[0])
    # a component that is given is not loaded from the base
    given: dict[str, Any] = {**family.load_options, **_vae(config, pipeline_class, vae_dtype)}
    for name in config.leave_out_text_encoders or ():
        given |= without_text_encoder(name)
    try:
        if Path(base).is_file():
            file = SingleFile(Path(base))
            base, parts = file.load(config, family, dtype, vae_dtype, given)
            given, revision = {**parts, **given}, None
        pipe = pipeline_class.from_pretrained(
            base,
            dtype={"default": dtype, "vae": vae_dtype},
            variant=config.variant,
            revision=revision,
            cache_dir=config.cache_dir,
            use_safetensors=True,
            **given,
            **loading_arguments(config, family, dtype),
        )
        check_computing_dtype(pipe, dtype)
        family.check_base(pipe)
    except ConfigError:
        raise
    except LOADING_ERRORS as error:
        base = config.pretrained_model_name_or_path
        problem = offline_problem(
            error, base, revision=config.revision, cache_dir=config.cache_dir
        ) or str(error)
        if Path(base).is_file() and config.base_config is None:
            problem += (
                ". What a single file lacks comes from the Hub; offline, give a folder with a "
                "pipeline of the same kind as --base_config"
            )
        raise ConfigError(
            [f"--pretrained_model_name_or_path {base} cannot be used: {problem}"]
        ) from error
    freeze(pipe)
    for component in pipe.components.values():
        if getattr(component, "is_loaded_in_4bit", False):
            component.to("cpu")
    return pipe


def completed(
    config: TrainingConfig, family: ModelFamily, pipe: Any, precision: str
) -> TrainingConfig:
    """Return the options with a value for each that was left to the family and the base.

    Args:
        precision: what accelerate is set to: no, fp16 or bf16.

    Raises:
        ConfigError: sizes or a ``clip_skip`` that the base cannot take.
    """
    config = config.with_defaults(
        {
            **family.training_defaults,
            "resolution": family.native_resolution(pipe),
            "mixed_precision": precision,
        }
    )
    check_sizes(config, family.size_divisor(pipe))
    if family.skipped_layers is None:
        return replace(config, clip_skip=None)  # it has no use, which the user was told
    if problems := list(_clip_skip(config, family, pipe)):
        raise ConfigError(problems)
    return config


def _clip_skip(config: TrainingConfig, family: ModelFamily, pipe: Any) -> Iterator[str]:
    for name in family.usual_text_encoders or family.text_encoders:
        layers = getattr(pipe, name).config.num_hidden_layers
        most = layers - (family.skipped_layers or 0)
        if config.clip_skip is not None and config.clip_skip > most:
            yield (
                f"--clip_skip is {config.clip_skip}, but of the {layers} layers of this base's "
                f"{name} at most {most} can be skipped; 1 is usual"
            )


def freeze(pipe: Any) -> None:
    """Have no weight of the base trained, and all compute what they compute in the pipeline."""
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
            _remove_dropout(component)


def present(pipe: Any, names: Iterable[str]) -> list[nn.Module]:
    """Return those of the pipeline's models that are there: it may lack a text encoder."""
    return [model for name in names if (model := getattr(pipe, name)) is not None]


def _remove_dropout(model: nn.Module) -> None:
    """Have the frozen layers compute in training what they compute in the pipeline (T5 drops)."""
    for module in model.modules():
        attribute = "p" if isinstance(module, nn.Dropout) else "dropout"
        if isinstance(vars(module).get(attribute), float):
            setattr(module, attribute, 0.0)


def vae_class(pipeline_class: type) -> Any:
    """Return the class of VAE that a pipeline was written for, by its annotation."""
    return get_type_hints(pipeline_class.__init__)["vae"]  # type: ignore[misc]


def _vae(config: TrainingConfig, pipeline_class: type, dtype: torch.dtype) -> dict[str, Any]:
    """The VAE that takes the place of the base's, if there is to be one."""
    source = config.pretrained_vae_model_name_or_path
    if not source:
        return {}
    wanted = vae_class(pipeline_class)
    option = f"--pretrained_vae_model_name_or_path {source}"
    try:
        found = wanted.load_config(source, cache_dir=config.cache_dir).get("_class_name")
        if found not in (wanted.__name__, None):
            raise ConfigError([f"{option} is {found}; the base needs {wanted.__name__}"])
        vae = wanted.from_pretrained(
            source, dtype=dtype, cache_dir=config.cache_dir, use_safetensors=True
        )
    except ConfigError:
        raise
    except LOADING_ERRORS as error:
        problem = offline_problem(error, source, cache_dir=config.cache_dir)
        raise ConfigError([f"{option} cannot be used: {problem or error}"]) from error
    return {"vae": vae}
