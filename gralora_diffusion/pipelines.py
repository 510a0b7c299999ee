"""GraLoRA on diffusers' pipelines: load, save, fuse, unfuse, unload.

:func:`install` makes these functions methods of ``DiffusionPipeline``. While an adapter is attached,
diffusers' own methods (``set_adapters``, ``fuse_lora``, ``delete_adapters``, ...) work on it too.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from peft import GraloraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from .families import find_family
from .injection import TargetError, adaptable_modules, check_targets, eject, inject
from .layers import GraloraLayer, layer_shape
from .state import (
    DENOISER,
    WEIGHTS_NAME,
    Adapter,
    AdapterFileError,
    ComponentAdapter,
    adapter_from_state_dict,
    not_finite,
    read_adapter,
    save_adapter,
    save_peft_folders,
)


@dataclass(frozen=True)
class LoadReport:
    """What a file matched: layers and tensors per component."""

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
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    adapter_name: str | None = None,
    *,
    config: GraloraConfig | Mapping[str, GraloraConfig] | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
    adapter_dtype: torch.dtype | None = None,
    **hub_options: Any,
) -> LoadReport:
    """Attach a GraLoRA adapter to the pipeline and make it the active one.

    Args:
        source: a file, a folder, a PEFT folder, a repository on the Hub, or a state dict.
        adapter_name: name to address it by; chosen if None.
        config: for a state dict: its config, or a config per component.
        weight_name, subfolder: which file in a folder or repository.
        adapter_dtype: dtype of the factors; the component's own by default.
        hub_options: ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only``.

    Returns:
        What was matched, per component. Every tensor of the file was used, or the call raises.

    Raises:
        AdapterFileError: the file is not whole, has no config, was trained for another family, has
            missing, unexpected, misshapen or non-finite tensors. The pipeline is left as it was.
        ValueError: the adapter name is taken.
    """
    names = _component_names(pipe)
    if isinstance(source, Mapping):
        adapter = adapter_from_state_dict(source, config, names)
    else:
        if config is not None:
            raise ValueError("`config` goes with a state dict; a file brings its own.")
        adapter = read_adapter(source, weight_name=weight_name, subfolder=subfolder, **hub_options)
    adapter_name = adapter_name or _free_name(pipe, names)
    models = _check(pipe, adapter, adapter_name, names)

    attached: list[nn.Module] = []
    before = {name: _activity(model) for name, model in models.items()}
    with _without_offloading(pipe, models.values()):
        try:
            for name, model in models.items():
                attached.append(model)
                _attach(model, adapter.components[name], adapter_name, adapter_dtype)
        except BaseException:
            for model in attached:
                eject(model, adapter_name)
            for name in models:
                _restore_activity(before[name])
            raise
    return LoadReport(
        adapter_name,
        adapter.source,
        adapter.family,
        {n: len(_layer_paths(p.tensors)) for n, p in adapter.components.items()},
        {n: len(p.tensors) for n, p in adapter.components.items()},
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
    """Write one adapter of the pipeline, all components in one file.

    Args:
        save_directory: folder, made if missing.
        adapter_name: which adapter; may be left out when there is only one.
        weight_name: name of the file.
        peft_format: write a PEFT folder per component instead, for ``PeftModel.from_pretrained``.
        dtype: dtype to store, the adapter's own by default.
        metadata: further strings for the file's metadata.

    Returns:
        Path of the file, or of the folder for ``peft_format``.

    Raises:
        ValueError: no such adapter, or several and none was named.
    """
    if Path(save_directory).is_file():
        raise ValueError(f"{save_directory} is a file; `save_directory` must be a folder.")
    name = _one_adapter(pipe, adapter_name)
    components = {}
    for component in _component_names(pipe):
        model = getattr(pipe, component, None)
        if model is None or not _has_adapter(model, name):
            continue
        tensors = get_peft_model_state_dict(model, adapter_name=name)
        if dtype is not None:
            tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        components[component] = ComponentAdapter(model.peft_config[name], tensors)
    family = find_family(pipe)
    adapter = Adapter(components, family.name if family else None, dict(metadata or {}))
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
        adapter_names: the active ones if None.
        components: all that hold the adapters if None.

    Returns:
        Names of the components that were fused.

    Raises:
        ValueError: nothing to fuse, already fused, not finite, or a quantized or fp8 base weight.
    """
    wanted = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    models = _models_with_layers(pipe, components)
    known = {
        name for model in models.values() for layer in _layers(model) for name in layer.gralora_A
    }
    if missing := sorted(set(wanted or ()) - known):
        raise ValueError(
            f"no adapter named {', '.join(missing)}; attached: {', '.join(sorted(known))}."
        )
    layers = [layer for model in models.values() for layer in _layers(model)]
    if any(set(wanted or layer.active_adapters) & set(layer.merged_adapters) for layer in layers):
        raise ValueError("already fused. Call `unfuse_gralora()` before fusing at another scale.")
    done: list[GraloraLayer] = []
    with _without_offloading(pipe, models.values()):
        try:
            for layer in layers:
                names = [n for n in wanted or layer.active_adapters if n in layer.gralora_A]
                done.append(layer)
                layer.merge(safe_merge=True, adapter_names=names, scale=scale)
        except BaseException:
            for layer in done:
                if layer.merged:
                    layer.unmerge()
            raise
    return list(models)


def unfuse_gralora(pipe: DiffusionPipeline, components: Sequence[str] | None = None) -> list[str]:
    """Take fused adapters out of the base weights again; they stay attached.

    The weights return to within one rounding of their dtype. Returns the components' names.
    """
    models = _models_with_layers(pipe, components)
    with _without_offloading(pipe, models.values()):
        for model in models.values():
            for layer in _layers(model):
                if layer.merged:
                    layer.unmerge()
    return list(models)


def unload_gralora_weights(pipe: DiffusionPipeline) -> list[str]:
    """Remove every GraLoRA adapter; other adapters (LoRA) stay.

    As with diffusers' ``unload_lora_weights``, weights that were fused stay fused: unfuse first to have
    the base back. Returns the names of the adapters removed.
    """
    removed: dict[str, None] = {}
    models = _models_with_layers(pipe, None, none_is_fine=True)
    with _without_offloading(pipe, models.values()):
        for model in models.values():
            for name in {n for layer in _layers(model) for n in layer.gralora_A}:
                eject(model, name)
                removed[name] = None
    return sorted(removed)


def install() -> None:
    """Make the functions above methods of every diffusers pipeline."""
    for function in (
        load_gralora_weights,
        save_gralora_weights,
        fuse_gralora,
        unfuse_gralora,
        unload_gralora_weights,
    ):
        setattr(DiffusionPipeline, function.__name__, function)


# -- checking --------------------------------------------------------------------------------------


def _check(
    pipe: DiffusionPipeline, adapter: Adapter, adapter_name: str, names: Sequence[str]
) -> dict[str, nn.Module]:
    """Find every reason to refuse before the pipeline is touched; return the models by component."""
    family = find_family(pipe)
    if adapter.family and family and adapter.family != family.name:
        raise AdapterFileError(
            f"{adapter.source}: trained for {adapter.family}, but {type(pipe).__name__} is "
            f"{family.name}. Load it into a pipeline of {adapter.family}."
        )
    if DENOISER in adapter.components:
        adapter.components[names[0]] = adapter.components.pop(DENOISER)
    models = {}
    problems = []
    for component, part in adapter.components.items():
        model = getattr(pipe, component, None)
        if component not in names or not isinstance(model, nn.Module):
            problems.append(
                f"weights for {component!r}, which this {type(pipe).__name__} does not have "
                f"(it has {', '.join(n for n in names if getattr(pipe, n, None) is not None)})"
            )
            continue
        if adapter_name in (getattr(model, "peft_config", None) or {}):
            raise ValueError(
                f"{component} already has an adapter named {adapter_name!r}. Choose another "
                "`adapter_name`, or delete that one with `pipe.delete_adapters`."
            )
        part.tensors = _match_clip_prefix(model, part.tensors)
        problems += [f"{component}: {problem}" for problem in _problems(model, part)]
        models[component] = model
    if not adapter.components:
        problems.append("no weights at all")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise AdapterFileError(f"{adapter.source} does not fit {type(pipe).__name__}:\n{lines}")
    return models


def _problems(model: nn.Module, part: ComponentAdapter) -> list[str]:
    try:
        expected = _expected_shapes(model, part.config)
    except TargetError as error:
        return [str(error)]
    missing = sorted(set(expected) - set(part.tensors))
    unexpected = sorted(set(part.tensors) - set(expected))
    problems = []
    for kind, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            problems.append(f"{len(keys)} {kind} keys: {_some(keys)}")
    problems += [
        f"{key} has shape {tuple(tensor.shape)}, this base needs {expected[key]}"
        for key, tensor in part.tensors.items()
        if key in expected and tuple(tensor.shape) != expected[key]
    ][:10]
    if broken := not_finite(part.tensors):
        problems.append(f"{len(broken)} tensors with NaN or infinite values: {_some(broken)}")
    return problems


def _some(keys: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + rest


def _expected_shapes(model: nn.Module, config: GraloraConfig) -> dict[str, tuple[int, ...]]:
    """Every key that an adapter of this config has on this model, with its shape."""
    r, k, hybrid_r = config.r, config.gralora_k, config.hybrid_r
    targets = check_targets(model, copy.copy(config))
    expected: dict[str, tuple[int, ...]] = {}
    for name, layer in targets.items():
        in_features, out_features, kernel = layer_shape(layer)
        expected[f"{name}.gralora_A"] = (k, in_features // k, r, *kernel)
        expected[f"{name}.gralora_B"] = (k, r, out_features // k)
        if hybrid_r:
            expected[f"{name}.gralora_A_general.weight"] = (hybrid_r, in_features, *kernel)
            ones = (1,) * len(kernel)
            expected[f"{name}.gralora_B_general.weight"] = (out_features, hybrid_r, *ones)
    for name, layer in adaptable_modules(model):
        bias = getattr(layer, "bias", None)
        if not isinstance(bias, Tensor) or config.bias == "none":
            continue
        if name in targets:
            expected[f"{name}.base_layer.bias"] = tuple(bias.shape)
        elif config.bias == "all":
            expected[f"{name}.bias"] = tuple(bias.shape)
    for ending in config.modules_to_save or ():
        for name, module in model.named_modules():
            if name == ending or name.endswith(f".{ending}"):
                expected |= {
                    f"{name}.{key}": tuple(t.shape) for key, t in module.state_dict().items()
                }
    return expected


def _match_clip_prefix(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 took the ``text_model.`` level out of CLIPTextModel: read files of either form."""
    prefix = "text_model."
    has_level = hasattr(model, "text_model")
    if has_level and not any(key.startswith(prefix) for key in tensors):
        return {prefix + key: tensor for key, tensor in tensors.items()}
    if not has_level and all(key.startswith(prefix) for key in tensors):
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


# -- attaching -------------------------------------------------------------------------------------


def _attach(
    model: nn.Module, part: ComponentAdapter, adapter_name: str, dtype: torch.dtype | None
) -> None:
    config = copy.deepcopy(part.config)
    config.inference_mode = True
    inject(model, config, adapter_name, low_cpu_mem_usage=True)
    set_peft_model_state_dict(model, part.tensors, adapter_name, low_cpu_mem_usage=True)
    dtype = dtype or model.dtype
    for layer in _layers(model):
        if adapter_name in layer.gralora_A:
            layer.cast_adapter(adapter_name, dtype)


def _activity(model: nn.Module) -> list[tuple[GraloraLayer, list[str]]]:
    return [(layer, list(layer.active_adapters)) for layer in _layers(model)]


def _restore_activity(activity: list[tuple[GraloraLayer, list[str]]]) -> None:
    for layer, active in activity:
        layer.set_adapter(active, inference_mode=True)


@contextmanager
def _without_offloading(pipe: DiffusionPipeline, models: Any) -> Iterator[None]:
    """Take accelerate's offloading hooks off while layers change, and put them back afterwards."""
    model_offload, sequential_offload, group_offload = _func_optionally_disable_offloading(pipe)
    device = getattr(pipe, "_offload_device", None)
    try:
        yield
    finally:
        if model_offload:
            pipe.enable_model_cpu_offload(device=device)
        elif sequential_offload:
            pipe.enable_sequential_cpu_offload(device=device)
        elif group_offload:
            for model in models:
                _maybe_remove_and_reapply_group_offloading(model)


# -- small things ----------------------------------------------------------------------------------


def _component_names(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """Attributes that may hold adapters, the denoiser first. Families we know, then diffusers' list."""
    family = find_family(pipe)
    if family:
        return family.components
    names = list(getattr(pipe, "_lora_loadable_modules", ()))
    names = names or [n for n, c in pipe.components.items() if isinstance(c, nn.Module)]
    return tuple(sorted(names, key=lambda name: name not in ("unet", "transformer")))


def _layers(model: nn.Module) -> list[GraloraLayer]:
    return [module for module in model.modules() if isinstance(module, GraloraLayer)]


def _has_adapter(model: nn.Module, name: str) -> bool:
    return any(name in layer.gralora_A for layer in _layers(model))


def _models_with_layers(
    pipe: DiffusionPipeline, components: Sequence[str] | None, none_is_fine: bool = False
) -> dict[str, nn.Module]:
    names = _component_names(pipe)
    if wrong := sorted(set(components or ()) - set(names)):
        raise ValueError(f"no component {', '.join(wrong)}; choose from {', '.join(names)}.")
    models = {
        name: model
        for name in components or names
        if isinstance(model := getattr(pipe, name, None), nn.Module) and _layers(model)
    }
    if not models and not none_is_fine:
        raise ValueError("no GraLoRA adapter is attached. Call `load_gralora_weights` first.")
    return models


def _adapter_names(pipe: DiffusionPipeline) -> list[str]:
    models = _models_with_layers(pipe, None, none_is_fine=True).values()
    return sorted(
        {name for model in models for layer in _layers(model) for name in layer.gralora_A}
    )


def _one_adapter(pipe: DiffusionPipeline, adapter_name: str | None) -> str:
    names = _adapter_names(pipe)
    if adapter_name is None and len(names) == 1:
        return names[0]
    if adapter_name in names:
        return str(adapter_name)
    attached = ", ".join(names) or "none"
    asked = (
        f"no adapter named {adapter_name!r}" if adapter_name else "say which: `adapter_name=...`"
    )
    raise ValueError(f"{asked}; GraLoRA adapters attached: {attached}.")


def _free_name(pipe: DiffusionPipeline, names: Sequence[str]) -> str:
    taken = {
        adapter
        for name in names
        for adapter in getattr(getattr(pipe, name, None), "peft_config", None) or {}
    }
    candidates = ("default" if n == 0 else f"default_{n}" for n in range(len(taken) + 1))
    return next(name for name in candidates if name not in taken)


def _layer_paths(tensors: Mapping[str, Tensor]) -> set[str]:
    return {key.rsplit(".gralora_", 1)[0] for key in tensors if ".gralora_" in key}
