"""The base without its weights: every model in its shape, on the meta device.

Only configurations are read, and downloaded if the base is on the Hub. Tokenizers and the scheduler
are loaded as well, because they are small.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.hub import offline_problem

from .folder import check_sizes
from .loading import check_tokenizers, freeze, vae_class
from .meta_models import convert, empty_model
from .options import BaseModelOptions
from .pipeline_index import PipelineIndex
from .single_file import SingleFile, left_out_parts


def empty_base(
    options: BaseModelOptions,
    family: ModelFamily,
    dtype: torch.dtype,
    vae_dtype: torch.dtype = torch.float32,
) -> Any:
    """Return the pipeline of ``load_base``, but with its models on the meta device.

    Raises:
        ConfigError: a configuration is missing, or the base cannot be trained.
    """
    base = where = options.pretrained_model_name_or_path
    hub: dict[str, Any] = {"cache_dir": options.cache_dir}
    try:
        # components that are passed are neither downloaded nor loaded from the base
        given = left_out_parts(options, family)
        if Path(base).is_file():
            index, left_out = SingleFile(Path(base)).rest(options, family, given)
            where, given = index.source, {**left_out, **given}
        else:
            hub["revision"] = options.revision
            index = PipelineIndex("pretrained_model_name_or_path", base, **hub)
        if Path(where).is_dir():
            check_sizes(Path(where), given)
        pipeline_class = getattr(diffusers, family.pipeline_classes[0])
        taken = inspect.signature(pipeline_class.__init__).parameters
        for name, (library, class_name) in index.components.items():
            if name in taken and name not in given:
                model = empty_model(library, class_name, where, name, hub)
                if model is not None:
                    given[name] = model
        vae = options.pretrained_vae_model_name_or_path
        if vae:
            with init_empty_weights():
                wanted = vae_class(pipeline_class)
                given["vae"] = wanted.from_config(
                    wanted.load_config(vae, cache_dir=options.cache_dir)
                )
        pipe = pipeline_class.from_pretrained(where, use_safetensors=True, **hub, **given)
        check_tokenizers(pipe, family)
        family.check_base(pipe)
    except ConfigError:
        raise
    except Exception as error:  # libraries may raise anything on damaged files
        problem = offline_problem(error, where, **hub) or (
            f"{error}. This concerns the configuration of {where}; for a single file, "
            "--base_config names another one"
        )
        raise ConfigError(
            [f"--pretrained_model_name_or_path {base} cannot be planned: {problem}"]
        ) from error
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            convert(component, vae_dtype if name == "vae" else dtype)
    freeze(pipe)
    return pipe
