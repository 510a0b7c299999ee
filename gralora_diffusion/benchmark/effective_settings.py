"""How a trial was made, for its result: settings, adapted layers, versions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import yaml
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from gralora_diffusion.io.file_names import public_name
from gralora_diffusion.options.fields import AlwaysReported, options_with
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.optimization.adapters import lowered_ks
from gralora_diffusion.training.runtime.acceleration import device_name

from .methods import Method
from .settings import BenchmarkSettings


def effective_settings(
    settings: BenchmarkSettings,
    method: Method,
    config: TrainingConfig,
    pipe: Any,
    device: torch.device,
) -> dict[str, Any]:
    """Return the settings of a trial with the values that were used.

    Files and folders are given by name only. Settings that a method does not have are None.
    """
    always = {name: getattr(config, name) for name in options_with(TrainingConfig, AlwaysReported)}
    given = yaml.safe_load(config.to_yaml(public=True))
    training = {
        name: value
        for name, value in (always | given | method.reported_options(config)).items()
        if name not in ("output_dir", "class_data_dir", "report_to")
    }
    names = "images_per_prompt inference_steps drawing_guidance_scale drawing_batch_size"
    drawing = {name: getattr(settings, name) for name in names.split()}
    if settings.drawing_guidance_scale is None:
        own = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
        drawing["drawing_guidance_scale"] = own.default if own else None
    return {
        "training": training,
        "drawing": drawing,
        "judges": {name: public_name(source) for name, source in settings.encoder_sources.items()},
        "device": device_name(device),
    }


def named_layers(config: TrainingConfig, models: Sequence[nn.Module]) -> dict[str, Any]:
    """Return the result's ``layers`` and ``lowered_k`` for models with an attached method."""
    layers = sum(isinstance(m, BaseTunerLayer) for model in models for m in model.modules())
    return {"layers": layers or None, "lowered_k": lowered_ks(models, config)}
