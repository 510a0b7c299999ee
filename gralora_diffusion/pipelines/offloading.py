"""Remove offloading hooks while layers change, and put them back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry
from diffusers.hooks.group_offloading import (
    _GROUP_OFFLOADING,
    _LAYER_EXECUTION_TRACKER,
    _LAZY_PREFETCH_GROUP_OFFLOADING,
    GroupOffloadingConfig,
    _apply_group_offloading,
    _get_top_level_group_offload_hook,
)
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from torch import nn

_GROUP_HOOKS = (_GROUP_OFFLOADING, _LAYER_EXECUTION_TRACKER, _LAZY_PREFETCH_GROUP_OFFLOADING)


@contextmanager
def without_offloading(pipe: DiffusionPipeline, models: Iterable[nn.Module]) -> Iterator[None]:
    """Remove accelerate's offloading hooks of the whole pipeline, and diffusers' of these models.

    They are put back afterwards. Inside, every weight can be read and changed on the device where
    it lies.

    Raises:
        ValueError: one of these models is offloaded to disk. Nothing is changed then.
    """
    groups = {m: config for m in models if (config := _group_config(m))}
    model_offload, sequential_offload, _ = _func_optionally_disable_offloading(pipe)
    for model in groups:
        for name in _GROUP_HOOKS:
            HookRegistry.check_if_exists_or_initialize(model).remove_hook(name, recurse=True)
    device = getattr(pipe, "_offload_device", None)
    try:
        yield
    finally:
        if model_offload:
            pipe.enable_model_cpu_offload(device=device)
        elif sequential_offload:
            pipe.enable_sequential_cpu_offload(device=device)
        for model, config in groups.items():
            _apply_group_offloading(model, config)


def _group_config(model: nn.Module) -> GroupOffloadingConfig | None:
    hook = _get_top_level_group_offload_hook(model)
    if hook and (folder := hook.config.offload_to_disk_path):
        raise ValueError(
            f"{type(model).__name__} is offloaded to disk (group offloading with "
            f"offload_to_disk_path={folder!r}), so its weights are not in memory and the files in "
            "that folder would not follow a change. Load the pipeline again, load and fuse the "
            "adapters, and only then offload it, into an empty folder."
        )
    return hook.config if hook else None
