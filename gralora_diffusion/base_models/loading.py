"""Load the frozen base: a diffusers folder, a Hub id, or one original .safetensors file."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

import diffusers
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from gralora_diffusion.families import ModelFamily, get_family, list_families
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.hub import check_cache, offline_problem
from gralora_diffusion.io.process import quiet_libraries
from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.io.tensor_files import read_header

from .folder import check_depth, check_weight_files, weight_files
from .options import BaseModelOptions
from .pipeline_index import PipelineIndex
from .quantization import check_computing_dtype, loading_arguments
from .single_file import SingleFile, left_out_parts

logger = logging.getLogger(__name__)

#: More letters than a chat template has.
_MOST_TEMPLATE = 100_000
#: All bytes of UTF-8 texts. A vocabulary without one of them needs a token for unknown ones.
_LETTERS = "".join(
    map(chr, [*range(32, 0x800), *range(0x800, 0xD800, 0x800), *range(0xE000, 0x110000, 0x1000)])
)


def find_base_family(options: BaseModelOptions) -> ModelFamily:
    """Find the family of the base from its index or its keys, before any weight is loaded.

    Raises:
        ConfigError: the base does not exist, is not readable, or its family is not supported.
    """
    base = options.pretrained_model_name_or_path
    if options.family and options.family not in list_families():
        raise ConfigError(
            [f"--family is {options.family!r}; it must be one of {', '.join(list_families())}"]
        )
    index = base_index(options)
    if index is not None:
        index.check_libraries()
    family = _named_family(options, index)
    if index is not None and family is not None:
        _check_settings(index, family)
    if Path(base).is_file():
        family = SingleFile(Path(base)).check_family(family)
    assert family is not None
    return family


def base_index(options: BaseModelOptions) -> PipelineIndex | None:
    """Return the index of the base, or of a single file's ``base_config``, if there is one.

    Raises:
        ConfigError: it does not exist or cannot be read.
    """
    base = options.pretrained_model_name_or_path
    if not Path(base).is_file():
        return PipelineIndex(
            "pretrained_model_name_or_path", base, options.cache_dir, options.revision
        )
    if options.base_config:
        return PipelineIndex("base_config", options.base_config, options.cache_dir)
    return None


def _check_settings(index: PipelineIndex, family: ModelFamily) -> None:
    problems = [
        f"--{index.option} {index.source}: a base with {name} in its index cannot be trained, "
        f"because {why}. Give another base of {family.name}"
        for name, why in family.refused_settings.items()
        if name in index.settings
    ]
    if problems:
        raise ConfigError(problems)


def find_pipeline_class(options: BaseModelOptions, family: ModelFamily) -> str | None:
    """Return the class of the base's own pipeline: what the base was made to do.

    Its index says so, or that of ``base_config``. Without either, a single file shows by its shapes
    whether it fills, and mostly whether it edits.

    Returns:
        None for a single file that may be a base for editing or for text-to-image.

    Raises:
        ConfigError: as :func:`find_base_family` does.
    """
    if index := base_index(options):
        return index.pipeline_class
    kind = SingleFile(Path(options.pretrained_model_name_or_path)).kind
    if kind in family.inpainting_file_types:
        return family.inpainting_pipeline
    if kind in family.editing_file_types:
        return next(iter(family.edit_pipelines))
    if family.ambiguous_file_types and kind not in family.ambiguous_file_types:
        return family.pipeline_classes[0]
    return None


def _named_family(options: BaseModelOptions, index: PipelineIndex | None) -> ModelFamily | None:
    """Return the family in ``--family`` and in the index, if there is one; they must agree."""
    chosen = get_family(options.family) if options.family else None
    if index is None:
        return chosen
    if chosen and index.family and index.family is not chosen:
        raise ConfigError(
            [
                f"--family {options.family}, but --{index.option} is {index.family.name} "
                f"({index.pipeline_class}). Leave out --family, or pass a base of {options.family}"
            ]
        )
    if not (chosen or index.family):
        raise ConfigError(
            [
                f"--{index.option} {index.source}: {index.pipeline_class} does not belong to a "
                f"supported family ({', '.join(list_families())}). If its models do, pass --family"
            ]
        )
    return chosen or index.family


def load_base(
    options: BaseModelOptions,
    family: ModelFamily,
    dtype: torch.dtype,
    vae_dtype: torch.dtype = torch.float32,
    models: Mapping[str, nn.Module] = MappingProxyType({}),
) -> Any:
    """Load the base as a text-to-image pipeline on the CPU, with all its weights frozen.

    bitsandbytes quantizes on the GPU. Models in 4 bits are moved back, so that only models in use
    are on the GPU. Models in 8 bits are not, because a copy would remain there.

    The denoiser and the text encoders have ``dtype``. The VAE of a training is fp32, because some
    bases give wrong latents in half precision, and it encodes each image only once.

    Args:
        models: component -> a model that takes its place, which is not loaded; see
            ``unread_weights``.

    Raises:
        ConfigError: the base cannot be loaded or cannot be trained.
    """
    base: str | Path = options.pretrained_model_name_or_path
    pipeline_class = getattr(diffusers, family.pipeline_classes[0])
    # components that are passed are not loaded from the base
    given = left_out_parts(options, family) | _vae(options, pipeline_class, vae_dtype)
    given |= models
    try:
        if Path(base).is_file():
            file = SingleFile(Path(base))
            base, parts = file.load(options, family, dtype, vae_dtype, given)
            given = {**parts, **given}
        else:
            base = pipeline_folder(options, family, given)
            check_weight_files(base, options.variant, given)
        pipe = pipeline_class.from_pretrained(
            base,
            dtype={"default": dtype, "vae": vae_dtype},
            variant=options.variant,
            cache_dir=options.cache_dir,
            use_safetensors=True,
            **given,
            **loading_arguments(options, family, dtype),
        )
        check_complete(pipe, given, options.variant)
        check_computing_dtype(pipe, dtype)
        check_tokenizers(pipe, family)
        family.check_base(pipe)
    except ConfigError:
        raise
    except Exception as error:  # libraries may raise anything on damaged files
        base = options.pretrained_model_name_or_path
        problem = offline_problem(
            error, base, revision=options.revision, cache_dir=options.cache_dir
        ) or str(error)
        if Path(base).is_file() and options.base_config is None:
            problem += (
                ". Models that a single file does not contain come from the Hub. Offline, pass a "
                "folder with a pipeline of the same kind as --base_config"
            )
        raise ConfigError(
            [f"--pretrained_model_name_or_path {base} cannot be used: {problem}"]
        ) from error
    freeze(pipe)
    for component in pipe.components.values():
        if getattr(component, "is_loaded_in_4bit", False):
            component.to("cpu")
    return pipe


def pipeline_folder(
    options: BaseModelOptions, family: ModelFamily, given: Mapping[str, Any]
) -> Path:
    """Return the folder of a base in diffusers' layout, downloaded if need be.

    What is downloaded is all that :func:`load_base` reads.

    Args:
        given: components that are passed to the pipeline, not read by it.

    Raises:
        Exception: whatever diffusers raises if there is no such base.
    """
    base = options.pretrained_model_name_or_path
    if Path(base).is_dir():
        return Path(base)
    pipeline_class: Any = getattr(diffusers, family.pipeline_classes[0])
    check_cache(base, options.cache_dir)
    return Path(
        pipeline_class.download(
            base,
            variant=options.variant,
            revision=options.revision,
            cache_dir=options.cache_dir,
            use_safetensors=True,
            **given,
        )
    )


def check_tokenizers(pipe: Any, family: ModelFamily) -> None:
    """Check that the text encoders embed whatever their tokenizers return.

    Raises:
        ValueError: a tokenizer has more tokens than its text encoder, or does not cut prompts off
            where CLIP's positions end.
        Exception: whatever its library raises if it cannot tokenize at all.
    """
    for name in family.all_text_encoders:
        encoder = getattr(pipe, name, None)
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"), None)
        if encoder is None or tokenizer is None:
            continue
        if len(str(getattr(tokenizer, "chat_template", None))) > _MOST_TEMPLATE:
            raise ValueError(f"the chat template of its {name} has over {_MOST_TEMPLATE:,} letters")
        family.count_tokens(tokenizer, [""])  # by its chat template, if it has one
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one
        tokenizer([_LETTERS], padding="max_length", max_length=2, truncation=True)
        embedded = encoder.get_input_embeddings().num_embeddings
        last = max(tokenizer.get_vocab().values(), default=-1)
        if last >= embedded:
            raise ValueError(
                f"the tokenizer of its {name} has a token {last}, and {name} only knows "
                f"{embedded}. Download both again, from the same base"
            )
        positions = getattr(encoder.config, "max_position_embeddings", math.inf)
        limit = tokenizer.model_max_length
        fits = type(limit) is int and 2 <= limit <= positions
        if str(encoder.config.model_type).startswith("clip") and not fits:
            raise ValueError(
                f"the tokenizer of its {name} gives up to {limit} tokens, and {name} reads from 2 "
                f"to {positions}. Download tokenizer_config.json again"
            )


def check_complete(pipe: Any, given: Collection[str] = (), variant: str | None = None) -> None:
    """Check that a pipeline's models were read whole from its folder.

    diffusers leaves missing weights on the meta device, and transformers fills them with random
    numbers. Both only warn.

    Args:
        given: components that were passed to ``from_pretrained``, not read by it.
        variant: variant of the weight files, such as fp16.

    Raises:
        ValueError: weights of a model are not in its files. The message names some.
    """
    for name, model in pipe.components.items():
        if not isinstance(model, nn.Module):
            continue
        missing = [key for key, tensor in model.state_dict().items() if tensor.is_meta]
        if isinstance(model, PreTrainedModel) and name not in given:
            missing += _never_read(model, variant)
        if missing:
            raise ValueError(f"the files of its {name} do not contain {first_few(missing)}")


def _never_read(model: PreTrainedModel, variant: str | None) -> list[str]:
    """Return weights of a text encoder that its files do not contain, as transformers finds them.

    Only the headers of the files are read. Empty for an encoder that is quantized on disk.
    """
    folder = Path(str(model.config.name_or_path))
    if getattr(model.config, "quantization_config", None) or not folder.is_dir():
        return []
    if variant is not None and not weight_files(folder, variant):
        variant = None  # diffusers reads the usual files where a component has no such variant
    files = [path for path in weight_files(folder, variant) if path.suffix == ".safetensors"]
    stored = {key for path in files for key in read_header(path)[0]}
    if stored >= model.state_dict().keys():  # transformers need not be asked
        return []
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report was logged when the model was read
    try:
        with quiet_libraries():
            loaded: Any = type(model).from_pretrained(
                folder,
                variant=variant,
                use_safetensors=True,
                device_map="meta",
                output_loading_info=True,
            )
    finally:
        transformers_logging.set_verbosity(verbosity)
    return sorted(loaded[1]["missing_keys"])


def freeze(pipe: Any) -> None:
    """Freeze all weights of the base, in evaluation mode and without dropout."""
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
            _remove_dropout(component)


def existing_models(pipe: Any, names: Iterable[str]) -> list[nn.Module]:
    """Return the pipeline's models that exist: a text encoder may be missing."""
    return [model for name in names if (model := getattr(pipe, name)) is not None]


def _remove_dropout(model: nn.Module) -> None:
    """Remove dropout from frozen layers, such as T5's, so that training does not change them."""
    for module in model.modules():
        attribute = "p" if isinstance(module, nn.Dropout) else "dropout"
        if isinstance(vars(module).get(attribute), float):
            setattr(module, attribute, 0.0)


def vae_class(pipeline_class: type) -> Any:
    """Return the class of VAE that a pipeline needs, according to its annotation."""
    return get_type_hints(pipeline_class.__init__)["vae"]  # type: ignore[misc]


def _vae(options: BaseModelOptions, pipeline_class: type, dtype: torch.dtype) -> dict[str, Any]:
    """Return the VAE that replaces the base's, if the options name one."""
    source = options.pretrained_vae_model_name_or_path
    if not source:
        return {}
    wanted = vae_class(pipeline_class)
    option = f"--pretrained_vae_model_name_or_path {source}"
    try:
        if not Path(source).exists():
            check_cache(source, options.cache_dir)
        settings = wanted.load_config(source, cache_dir=options.cache_dir)
        check_depth(settings, source)
        found = settings.get("_class_name")
        if found not in (wanted.__name__, None):
            raise ConfigError([f"{option} is {found}; the base needs {wanted.__name__}"])
        vae = wanted.from_pretrained(
            source, dtype=dtype, cache_dir=options.cache_dir, use_safetensors=True
        )
    except ConfigError:
        raise
    except Exception as error:  # libraries may raise anything on damaged files
        problem = offline_problem(error, source, cache_dir=options.cache_dir)
        raise ConfigError([f"{option} cannot be used: {problem or error}"]) from error
    return {"vae": vae}
