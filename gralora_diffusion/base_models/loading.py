"""Load the frozen base: a diffusers folder, a Hub id, or one original .safetensors file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_type_hints

import diffusers
import torch
from torch import nn

from gralora_diffusion.families import ModelFamily, get_family, list_families
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.hub import offline_problem
from gralora_diffusion.io.safe_text import first_few

from .folder import check_weight_files
from .options import BaseModelOptions
from .pipeline_index import PipelineIndex
from .quantization import check_computing_dtype, loading_arguments
from .single_file import SingleFile, without_text_encoder


def find_base_family(options: BaseModelOptions) -> ModelFamily:
    """Tell the family of the base from its index or its keys, before any weight is loaded.

    Raises:
        ConfigError: the base is not there, not readable, or of no supported family.
    """
    base = options.pretrained_model_name_or_path
    if options.family and options.family not in list_families():
        raise ConfigError(
            [f"--family is {options.family!r}; it must be one of {', '.join(list_families())}"]
        )
    index = None
    if not Path(base).is_file():
        index = PipelineIndex(
            "pretrained_model_name_or_path", base, options.cache_dir, options.revision
        )
    elif options.base_config:
        index = PipelineIndex("base_config", options.base_config, options.cache_dir)
    family = _named_family(options, index)
    if Path(base).is_file():
        family = SingleFile(Path(base)).family_told(family)
    assert family is not None
    return family


def _named_family(options: BaseModelOptions, index: PipelineIndex | None) -> ModelFamily | None:
    """The family that ``--family`` and the index, if there is one, agree on."""
    chosen = get_family(options.family) if options.family else None
    if index is None:
        return chosen
    if chosen and index.family and index.family is not chosen:
        raise ConfigError(
            [
                f"--family {options.family}, but --{index.option} is {index.family.name} "
                f"({index.pipeline_class}). Leave out --family, or give a base of {options.family}"
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
    options: BaseModelOptions,
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
    base, revision = options.pretrained_model_name_or_path, options.revision
    pipeline_class = getattr(diffusers, family.pipeline_classes[0])
    # a component that is given is not loaded from the base
    given: dict[str, Any] = {**family.load_options, **_vae(options, pipeline_class, vae_dtype)}
    for name in options.leave_out_text_encoders or ():
        given |= without_text_encoder(name)
    try:
        if Path(base).is_dir():
            check_weight_files(Path(base), options.variant)
        if Path(base).is_file():
            file = SingleFile(Path(base))
            base, parts = file.load(options, family, dtype, vae_dtype, given)
            given, revision = {**parts, **given}, None
        pipe = pipeline_class.from_pretrained(
            base,
            dtype={"default": dtype, "vae": vae_dtype},
            variant=options.variant,
            revision=revision,
            cache_dir=options.cache_dir,
            use_safetensors=True,
            **given,
            **loading_arguments(options, family, dtype),
        )
        _check_all_there(pipe)
        check_computing_dtype(pipe, dtype)
        family.check_base(pipe)
    except ConfigError:
        raise
    except Exception as error:  # libraries raise whatever they meet in what is damaged
        base = options.pretrained_model_name_or_path
        problem = offline_problem(
            error, base, revision=options.revision, cache_dir=options.cache_dir
        ) or str(error)
        if Path(base).is_file() and options.base_config is None:
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


def _check_all_there(pipe: Any) -> None:
    """Raise ValueError if a model has weights that its files lack; diffusers only says so."""
    for name, model in pipe.components.items():
        if isinstance(model, nn.Module):
            lacking = [key for key, tensor in model.state_dict().items() if tensor.is_meta]
            if lacking:
                raise ValueError(f"the files of its {name} lack {first_few(lacking)}")


def freeze(pipe: Any) -> None:
    """Have no weight of the base trained, and all compute what they compute in the pipeline."""
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
            _remove_dropout(component)


def existing_models(pipe: Any, names: Iterable[str]) -> list[nn.Module]:
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


def _vae(options: BaseModelOptions, pipeline_class: type, dtype: torch.dtype) -> dict[str, Any]:
    """The VAE that takes the place of the base's, if there is to be one."""
    source = options.pretrained_vae_model_name_or_path
    if not source:
        return {}
    wanted = vae_class(pipeline_class)
    option = f"--pretrained_vae_model_name_or_path {source}"
    try:
        found = wanted.load_config(source, cache_dir=options.cache_dir).get("_class_name")
        if found not in (wanted.__name__, None):
            raise ConfigError([f"{option} is {found}; the base needs {wanted.__name__}"])
        vae = wanted.from_pretrained(
            source, dtype=dtype, cache_dir=options.cache_dir, use_safetensors=True
        )
    except ConfigError:
        raise
    except Exception as error:  # libraries raise whatever they meet in what is damaged
        problem = offline_problem(error, source, cache_dir=options.cache_dir)
        raise ConfigError([f"{option} cannot be used: {problem or error}"]) from error
    return {"vae": vae}
