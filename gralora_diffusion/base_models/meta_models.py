"""Build models of a pipeline from their configuration alone: weights on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from transformers import PreTrainedModel

from .folder import check_depth


def empty_model(
    library: str, class_name: str, source: str, name: str, hub: Mapping[str, Any]
) -> Any:
    """Return a component of a pipeline without its weights; None if it is not a model.

    Args:
        library, class_name: of the component, as in ``model_index.json``.
        source: folder or Hub id of the pipeline.
        name: the component.
        hub: ``revision``, ``cache_dir`` and similar options for downloads.

    Raises:
        OSError, ValueError: its configuration is missing or cannot be used.
    """
    cls = simple_get_class_obj(library, class_name)
    if issubclass(cls, ModelMixin):
        settings = cls.load_config(source, subfolder=name, **hub)
        check_depth(settings, f"{source}, {name}")
        with init_empty_weights():
            return cls.from_config(settings)
    if issubclass(cls, PreTrainedModel):
        settings = cls.config_class.from_pretrained(source, subfolder=name, **hub)
        check_depth(settings.to_dict(), f"{source}, {name}")
        with init_empty_weights():
            model = cls(settings)
        model.tie_weights()  # accelerate's function has untied what is tied
        return model
    return None


def convert(model: Any, dtype: torch.dtype) -> None:
    """Convert weights to ``dtype`` as ``from_pretrained(dtype=...)`` does."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    # transformers' second list only concerns fp16
    if isinstance(model, ModelMixin) or dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            here = torch.float32 if kept & set(name.split(".")) else dtype
            tensor.data = tensor.data.to(here)
