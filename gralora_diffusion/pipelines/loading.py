"""GraLoRA on diffusers' pipelines: load, save, fuse, unfuse, unload.

``pipelines.methods`` makes these functions methods of ``DiffusionPipeline``. While an adapter is
attached, diffusers' own methods (``set_adapters``, ``fuse_lora``, ``delete_adapters``, ...) work on
it too.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from diffusers import DiffusionPipeline
from peft import GraloraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.integrations import peft as transformers_peft

from gralora_diffusion.adapters.adapter_file import (
    WEIGHTS_NAME,
    Adapter,
    ComponentAdapter,
    adapter_from_state_dict,
    read_adapter,
    save_adapter,
    save_peft_folders,
)
from gralora_diffusion.adapters.compatibility import (
    Fit,
    adapter_tensors,
    check_fit,
    component_models,
    component_names,
    gralora_layers,
    set_adapter_tensors,
)
from gralora_diffusion.adapters.injection import eject, inject, unchanged_on_error
from gralora_diffusion.adapters.placement.fused_projections import replaced_projections
from gralora_diffusion.families import find_family
from gralora_diffusion.io.safe_text import first_few

from .diffusers_registry import register_components, register_fused
from .offloading import without_offloading


@dataclass(frozen=True)
class LoadReport:
    """How many layers and tensors of each component an adapter file matched."""

    adapter_name: str
    source: str
    family: str | None
    layers: dict[str, int]
    tensors: dict[str, int]

    def __str__(self) -> str:
        parts = ", ".join(f"{n} layers of {name}" for name, n in self.layers.items())
        return f"adapter {self.adapter_name!r} from {self.source}: {parts}"


def load_gralora_weights(
    pipe: DiffusionPipeline,
    source: str | os.PathLike[str] | Mapping[str, Tensor] | Adapter,
    adapter_name: str | None = None,
    *,
    config: GraloraConfig | Mapping[str, GraloraConfig] | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
    adapter_dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> LoadReport:
    """Attach a GraLoRA adapter to the pipeline and make it the only active one.

    Earlier adapters, including LoRAs, stay attached. They become inactive in every component, even
    where the new adapter has no layers: as after ``pipe.set_adapters(adapter_name)``.

    Args:
        source: a file, a folder, a PEFT folder, a repository on the Hub, a state dict, or an
            ``Adapter`` in memory.
        adapter_name: name of the adapter in the pipeline; a free one is chosen if None.
        config: for a state dict: its config, or a config per component.
        weight_name: which file in a folder or repository.
        subfolder: which folder in a folder or repository.
        adapter_dtype: dtype of the factors; the component's own by default.
        revision: branch, tag or commit of a repository.
        token: access token for a private repository; True uses the one from ``hf auth login``.
        cache_dir: folder for downloads.
        force_download: download files again even if they are in the cache.
        local_files_only: do not use the network.

    Returns:
        Matched layers and tensors per component. The call uses every tensor of the file, or raises.

    Raises:
        AdapterFileError: the file is incomplete, has no config, was trained for another family, or
            has missing, unexpected, misshapen or non-finite tensors. The pipeline is unchanged.
        ValueError: the adapter name is taken, or a model is offloaded to disk.
    """
    names = component_names(pipe)
    if isinstance(source, Mapping):
        adapter = adapter_from_state_dict(source, config, names)
    elif config is not None:
        raise ValueError(
            "`config` is only allowed with a state dict, because a file contains its own config. "
            "Leave `config` out."
        )
    elif isinstance(source, Adapter):
        adapter = source
    else:
        adapter = read_adapter(
            source,
            weight_name=weight_name,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
    if adapter_name is None:
        adapter_name = _free_name(component_models(pipe).values())
    fits = check_fit(pipe, adapter, adapter_name)
    models, every_model = [fit.model for fit in fits.values()], component_models(pipe).values()
    with without_offloading(pipe, models), unchanged_on_error(every_model, adapter_name):
        for fit in fits.values():
            _attach(fit, adapter_name, adapter_dtype)
        for model in every_model:
            _activate(model, adapter_name)
    register_components(pipe)
    _warn_of_old_peft(models)
    return LoadReport(
        adapter_name,
        adapter.source,
        adapter.family,
        {name: len(fit.layers) for name, fit in fits.items()},
        {name: len(fit.tensors) for name, fit in fits.items()},
    )


def save_gralora_weights(
    pipe: DiffusionPipeline,
    save_directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    weight_name: str = WEIGHTS_NAME,
    peft_format: bool = False,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write one adapter of the pipeline, with all its components in one file.

    Args:
        save_directory: folder; it is created if it does not exist.
        adapter_name: which adapter; may be left out if only one is attached.
        weight_name: name of the file.
        peft_format: write a PEFT folder per component instead, for ``PeftModel.from_pretrained``.
        dtype: dtype to store, the adapter's own by default.
        metadata: further strings for the file's metadata.

    Returns:
        Path of the file, or of the folder for ``peft_format``.

    Raises:
        ValueError: no adapter has this name, or several are attached and none was named.
    """
    if Path(save_directory).is_file():
        raise ValueError(f"{save_directory} is a file; `save_directory` must be a folder.")
    models = component_models(pipe)
    name = _one_adapter(models.values(), adapter_name)
    models = {c: m for c, m in models.items() if name in _adapter_names([m])}
    parts = {}
    with without_offloading(pipe, models.values()):
        for component, model in models.items():
            tensors = adapter_tensors(model, name)
            if dtype is not None:
                tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
            parts[component] = ComponentAdapter(model.peft_config[name], tensors)
    family = find_family(pipe)
    adapter = Adapter(parts, family.name if family else None, dict(metadata or {}))
    if peft_format:
        save_peft_folders(adapter, save_directory)
        return Path(save_directory)
    return save_adapter(adapter, Path(save_directory) / weight_name)


def fuse_gralora(
    pipe: DiffusionPipeline,
    scale: float = 1.0,
    adapter_names: str | Sequence[str] | None = None,
    components: Sequence[str] | None = None,
) -> list[str]:
    """Merge adapters into the base weights, all layers or none.

    Args:
        scale: multiplies each adapter's own scale (see ``set_adapters``) for this fusion.
        adapter_names: adapters to fuse; the active ones if None.
        components: components to fuse; all that hold the adapters if None.

    Returns:
        Names of the components that were fused.

    Raises:
        ValueError: no such adapter is active, it is fused already, the result would not be finite,
            a base weight is quantized or fp8, or a model is offloaded to disk.
    """
    wanted = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    models = _models_with_layers(pipe, components)
    known = _adapter_names(models.values())
    if missing := sorted(set(wanted or ()) - set(known)):
        raise ValueError(
            f"no adapter is named {', '.join(missing)}; attached adapters: {', '.join(known)}."
        )
    names = {
        layer: chosen
        for model in models.values()
        for layer in gralora_layers(model)
        if (chosen := [n for n in wanted or layer.active_adapters if n in layer.gralora_A])
    }
    if not names:
        raise ValueError(
            f"no adapter is active; attached adapters: {', '.join(known)}. Pass `adapter_names`."
        )
    if fused := sorted(
        {n for layer, ns in names.items() for n in ns if n in layer.merged_adapters}
    ):
        raise ValueError(
            f"already fused: {', '.join(fused)}. Call `unfuse_gralora()` before you fuse at "
            "another scale, or choose other adapters with `adapter_names`."
        )
    _check_projections(models.values(), names)
    with without_offloading(pipe, models.values()):
        for layer, chosen in names.items():
            layer.check_merge(chosen, scale)
        try:
            for layer, chosen in names.items():
                layer.merge(adapter_names=chosen, scale=scale)
        except BaseException:
            for layer, chosen in names.items():
                if set(chosen) & set(layer.merged_adapters):  # a layer merges all of them or none
                    layer.unmerge(chosen)
            raise
    register_fused(pipe)
    return [name for name, model in models.items() if names.keys() & set(gralora_layers(model))]


def unfuse_gralora(pipe: DiffusionPipeline, components: Sequence[str] | None = None) -> list[str]:
    """Subtract fused adapters from the base weights again; the adapters stay attached.

    The weights return to within one rounding of their dtype. Returns the components' names.

    Raises:
        ValueError: no component holds an adapter, or its projections were fused meanwhile.
    """
    models = _models_with_layers(pipe, components)
    merged = [layer for m in models.values() for layer in gralora_layers(m) if layer.merged]
    _check_projections(models.values(), merged)
    with without_offloading(pipe, models.values()):
        for layer in merged:
            layer.unmerge()
    register_fused(pipe)
    return list(models)


def unload_gralora_weights(pipe: DiffusionPipeline) -> list[str]:
    """Remove every GraLoRA adapter; other adapters, such as LoRAs, stay.

    As with diffusers' ``unload_lora_weights``, fused weights stay fused; unfuse first to get the
    base back. Biases of an adapter with ``bias`` other than "none" stay as well.
    Returns the names of the removed adapters.
    """
    models = component_models(pipe).values()
    # model by model, because the same name may belong to a LoRA on another model
    attached = {model: _adapter_names([model]) for model in models if gralora_layers(model)}
    register_fused(pipe)
    with without_offloading(pipe, attached):
        for model, names in attached.items():
            eject(model, *names)
    register_components(pipe)
    return sorted({name for names in attached.values() for name in names})


def _attach(fit: Fit, adapter_name: str, dtype: torch.dtype | None) -> None:
    fit.config.inference_mode = True
    # the file has the values, so none are initialized; PEFT would leave modules_to_save on the
    # meta device as well
    is_whole = not fit.config.modules_to_save
    inject(
        fit.model,
        fit.config,
        adapter_name,
        low_cpu_mem_usage=is_whole,
        state_dict=fit.tensors,
    )
    dtype = dtype or getattr(fit.model, "dtype", None)
    for layer in gralora_layers(fit.model):
        # after disable_lora() only the new layers would be enabled; enable_adapters is not called,
        # because it would make the factors trainable
        layer._disable_adapters = False
        # a base stored in fp8 computes in another dtype
        if adapter_name in layer.gralora_A and dtype is not None and dtype.itemsize >= 2:
            layer.cast_adapter(adapter_name, dtype)
    set_adapter_tensors(fit.model, adapter_name, fit.tensors)


def _warn_of_old_peft(models: Iterable[nn.Module]) -> None:
    """Warn of methods that transformers gives its models and refuses with the installed PEFT."""
    if not any(isinstance(model, transformers_peft.PeftAdapterMixin) for model in models):
        return
    needed = transformers_peft.MIN_PEFT_VERSION
    try:
        transformers_peft.check_peft_version(needed)
    except ValueError:
        warnings.warn(
            f"transformers {transformers.__version__} requires PEFT {needed}, and PEFT "
            f"{peft.__version__} is installed. The methods of the pipeline work, but those of a "
            "text encoder (add_adapter, set_adapter, disable_adapters, delete_adapter) raise "
            f'errors. Install "peft>={needed}" if it is released, or "transformers<5.24".',
            stacklevel=3,
        )


def _activate(model: nn.Module, adapter_name: str) -> None:
    """Make one adapter the only active one of a model, even if the model does not have it.

    As with diffusers' ``set_adapters``, a layer without that adapter computes as the base does.
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter([adapter_name], inference_mode=True)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            has_it = adapter_name in module._adapters
            module.set_adapter([adapter_name] if has_it else [], inference_mode=True)


def _models_with_layers(
    pipe: DiffusionPipeline, wanted: Sequence[str] | None
) -> dict[str, nn.Module]:
    models = component_models(pipe)
    if wrong := sorted(set(wanted or ()) - set(models)):
        raise ValueError(
            f"no component is named {', '.join(wrong)}; choose from {', '.join(models)}."
        )
    found = {n: m for n, m in models.items() if n in (wanted or models) and gralora_layers(m)}
    if not found:
        raise ValueError("no GraLoRA adapter is attached. Call `load_gralora_weights` first.")
    return found


def _check_projections(models: Iterable[nn.Module], layers: Collection[nn.Module]) -> None:
    """Raise ValueError if a layer's weight is not in use: a fused projection has its values."""
    unused = [
        path
        for model in models
        for path in sorted(replaced_projections(model))
        if model.get_submodule(path) in layers
    ]
    if unused:
        raise ValueError(
            f"fused projections have replaced {len(unused)} of the adapted layers "
            f"({first_few(unused, 3)}), so a change of their weights would have no effect. Call "
            "`unfuse_qkv_projections()` on the model first, and fuse them again afterwards."
        )


def _adapter_names(models: Iterable[nn.Module]) -> list[str]:
    """Return the names of the GraLoRA adapters attached to any of the models."""
    layers = [layer for model in models for layer in gralora_layers(model)]
    return sorted({name for layer in layers for name in layer.gralora_A})


def _one_adapter(models: Iterable[nn.Module], adapter_name: str | None) -> str:
    names = _adapter_names(models)
    if adapter_name is None and len(names) == 1:
        return names[0]
    if adapter_name in names:
        return str(adapter_name)
    attached = f"attached GraLoRA adapters: {', '.join(names) or 'none'}."
    if adapter_name:
        raise ValueError(f"no adapter is named {adapter_name!r}; {attached}")
    raise ValueError(f"pass `adapter_name` to choose an adapter; {attached}")


def _free_name(models: Iterable[nn.Module]) -> str:
    taken = {name for model in models for name in getattr(model, "peft_config", None) or {}}
    candidates = ("default" if n == 0 else f"default_{n}" for n in range(len(taken) + 1))
    return next(name for name in candidates if name not in taken)
