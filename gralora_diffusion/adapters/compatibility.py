"""Whether an adapter fits a pipeline, and the names of its tensors in the pipeline's models."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from diffusers import DiffusionPipeline
from peft import GraloraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from gralora_diffusion.adapters.placement.layer_config import layer_settings, rename_layers
from gralora_diffusion.adapters.placement.path_patterns import PatternError
from gralora_diffusion.adapters.placement.targets import (
    adaptable_modules,
    find_targets,
    layer_of,
    layer_shape,
    misfits,
)
from gralora_diffusion.families import find_family
from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.io.tensor_files import is_finite, is_real

from .adapter_file import DENOISER, Adapter, AdapterFileError, ComponentAdapter
from .injection import check_adapter_name
from .layers import GraloraLayer

#: transformers 5 removed this level from CLIPTextModel; files of transformers 4 have it.
_CLIP_LEVEL = "text_model."
#: Parts that AnimateDiff, IP-Adapter and GLIGEN add to a denoiser; some contain a to_q.
_ADDED = re.compile(r"(^|\.)(motion_modules|encoder_hid_proj|image_proj|processor|fuser)\.")


@dataclass(frozen=True)
class Fit:
    """A model of a pipeline, and the part of an adapter for it under the model's names."""

    model: Any
    config: GraloraConfig
    tensors: dict[str, Tensor]

    @property
    def layers(self) -> set[str]:
        """Paths of the layers that the adapter has factors for."""
        return {layer_of(key) for key in self.tensors if ".gralora_" in key}


def component_names(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """Return the attributes that may hold adapters, the denoiser first.

    They come from the family, or from diffusers' list.
    """
    family = find_family(pipe)
    if family:
        return family.components
    names = list(getattr(pipe, "_lora_loadable_modules", ()))
    names = names or [n for n, c in pipe.components.items() if isinstance(c, nn.Module)]
    return tuple(sorted(names, key=lambda name: name not in ("unet", "transformer")))


def component_models(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return the models that may hold adapters by attribute, the denoiser first.

    Compiled models are returned without their wrapper.
    """
    models = {name: getattr(pipe, name, None) for name in component_names(pipe)}
    return {
        name: getattr(model, "_orig_mod", model)
        for name, model in models.items()
        if isinstance(model, nn.Module)
    }


def gralora_layers(model: nn.Module) -> list[GraloraLayer]:
    """Return all GraLoRA layers of a model."""
    return [module for module in model.modules() if isinstance(module, GraloraLayer)]


def check_fit(pipe: DiffusionPipeline, adapter: Adapter, adapter_name: str) -> dict[str, Fit]:
    """Find every reason to refuse an adapter. Nothing is changed.

    Raises:
        AdapterFileError: the adapter is for another family or for a component that the pipeline
            does not have, or tensors are missing, unexpected, misshapen or non-finite. The message
            lists all of them.
        ValueError: the adapter name is taken or invalid.
    """
    family, where = find_family(pipe), type(pipe).__name__
    if adapter.family and family and adapter.family != family.name:
        raise AdapterFileError(
            f"{adapter.source}: this adapter was trained for {adapter.family}, but {where} is "
            f"{family.name}. Load it into a pipeline of {adapter.family}."
        )
    models = component_models(pipe)
    fits: dict[str, Fit] = {}
    problems = [] if adapter.components else ["it has no weights"]
    for component, part in adapter.components.items():
        name = component_of(component, adapter, tuple(models))
        if name not in models:
            left_out = getattr(pipe, name, models) is None
            remedy = f" Load the pipeline with its {name}." if left_out else ""
            problems.append(
                f"it has weights for {name!r}, which this {where} does not have (it has "
                f"{', '.join(models)}).{remedy}"
            )
            continue
        check_adapter_name(models[name], adapter_name)
        try:
            fit = fits[name] = _in_names_of(models[name], part)
            _pass_over_added(fit)
            found = _problems(fit)
        except PatternError as error:
            found = [f"a pattern of its config is {error}"]
        problems += [f"{name}: {problem}" for problem in found]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise AdapterFileError(f"{adapter.source} does not fit {where}:\n{lines}")
    return {name: fits[name] for name in models if name in fits}


def component_of(component: str, adapter: Adapter, names: Sequence[str]) -> str:
    """Return the component that a part belongs to.

    For a single PEFT folder this is the folder's name if a component has that name, and the
    denoiser otherwise.

    Args:
        names: the pipeline's components, the denoiser first.
    """
    if component != DENOISER:
        return component
    folder = PurePath(adapter.source).name
    return folder if folder in names else names[0]


def _in_names_of(model: nn.Module, part: ComponentAdapter) -> Fit:
    config: Any = copy.deepcopy(part.config)
    tensors = part.tensors
    level = ""
    if tensors and not hasattr(model, _CLIP_LEVEL.rstrip(".")):
        level = _CLIP_LEVEL if all(key.startswith(_CLIP_LEVEL) for key in tensors) else ""
    tensors = {key.removeprefix(level): t for key, t in tensors.items() if not _is_copy(key)}
    # only a config passed with a state dict has no targets; they follow from the keys
    if config.target_modules is None:
        config.target_modules = {layer_of(key) for key in tensors if ".gralora_" in key}
    elif level:
        config.target_modules = set(find_targets(model, config, level))
        config.layers_to_transform = config.layers_pattern = None
        if getattr(config, "exclude_modules", None):
            config.exclude_modules = None  # the targets no longer contain them
    if level:
        rename_layers(config, {path: level + path for path in sorted(config.target_modules)})
    if level and config.modules_to_save:
        config.modules_to_save = [name.removeprefix(level) for name in config.modules_to_save]
    return Fit(model, config, tensors)


def _pass_over_added(fit: Fit) -> None:
    """Remove layers that another network added to the model from the config's targets.

    The base that the adapter was trained on did not have them, although the config may match them.
    """
    targets = find_targets(fit.model, fit.config)
    added = {name for name in targets if _ADDED.search(name)}
    if added and not added & fit.layers:
        config: Any = fit.config  # PEFT's type names a list, and its code makes a set of that
        config.target_modules = set(targets) - added


def _problems(fit: Fit) -> list[str]:
    targets = find_targets(fit.model, fit.config)
    if problems := misfits(targets, fit.config):
        return problems
    expected = _expected_shapes(fit.model, fit.config, targets)
    missing = sorted(set(expected) - set(fit.tensors))
    unexpected = sorted(set(fit.tensors) - set(expected))
    for kind, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            problems.append(f"{kind} keys ({len(keys)}): {first_few(keys)}")
    misshapen = [
        f"{key} has shape {tuple(tensor.shape)}, but this base needs {expected[key]}"
        for key, tensor in fit.tensors.items()
        if key in expected and tuple(tensor.shape) != expected[key]
    ]
    if misshapen:
        problems.append(f"tensors of another shape ({len(misshapen)}): {first_few(misshapen)}")
    odd = [
        f"{key} is {tensor.dtype}"
        for key, tensor in fit.tensors.items()
        if not is_real(tensor, factor=".gralora_" in key)
    ]
    if odd:
        return [*problems, f"tensors without real numbers ({len(odd)}): {first_few(odd)}"]
    broken = [key for key, tensor in fit.tensors.items() if not is_finite(tensor)]
    if broken:
        problems.append(f"NaN or infinite values in tensors ({len(broken)}): {first_few(broken)}")
    return problems


def _expected_shapes(
    model: nn.Module, config: GraloraConfig, targets: Mapping[str, nn.Module]
) -> dict[str, tuple[int, ...]]:
    """Return every key that an adapter with this config has on this model, with its shape."""
    hybrid_r = config.hybrid_r
    expected: dict[str, tuple[int, ...]] = {}
    for name, layer in targets.items():
        r, k, _ = layer_settings(config, name)
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
    for name, module in model.named_modules():
        if any(name == end or name.endswith(f".{end}") for end in config.modules_to_save or ()):
            state = getattr(module, "original_module", module).state_dict()
            expected |= {f"{name}.{key}": tuple(t.shape) for key, t in state.items()}
    return {key: shape for key, shape in expected.items() if not _is_copy(key)}


def _is_copy(key: str) -> bool:
    """Whether PEFT found the key inside a wrapper of modules_to_save when it collected biases."""
    return ".original_module." in key or ".modules_to_save." in key


def adapter_tensors(model: Any, adapter_name: str) -> dict[str, Tensor]:
    """Return the adapter's tensors as the model holds them, by their keys in a file."""
    places = _places(model, adapter_name)
    tensors = {key: getattr(holder, name).detach() for key, (_, holder, name) in places.items()}
    config = model.peft_config[adapter_name]
    if config.bias != "none" or config.modules_to_save:
        tensors |= {key: tensor for key, (_, tensor) in _tensors(model, adapter_name).items()}
    return tensors


def set_adapter_tensors(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors, by their keys in a file, into an adapter of the model.

    Factors that :func:`inject` left on the meta device move to the device of their base layer.

    Raises:
        AdapterFileError: the adapter does not have one of the keys.
    """
    places = _places(model, adapter_name)
    rest = {key: tensor for key, tensor in tensors.items() if key not in places}
    for key, place in places.items():
        if key in tensors:
            _fill(*place, tensors[key])
    if not rest:
        return
    here = _tensors(model, adapter_name)
    named = {here[key][0] if key in here else key: tensor for key, tensor in rest.items()}
    result: Any = set_peft_model_state_dict(model, named, adapter_name)
    if result.unexpected_keys:
        unexpected = first_few(result.unexpected_keys)
        raise AdapterFileError(f"the adapter in the model does not have these keys: {unexpected}")


def _places(model: nn.Module, adapter_name: str) -> dict[str, tuple[GraloraLayer, nn.Module, str]]:
    """Return key in a file -> the layer, the module that holds the factor, and its name there.

    PEFT makes a state dict of the whole model instead, which takes several times as long.
    """
    places: dict[str, tuple[GraloraLayer, nn.Module, str]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, GraloraLayer) and not _is_copy(f"{path}."):
            path = path.replace(".base_layer", "")
            for name in layer.adapter_layer_names:
                factors = getattr(layer, name)
                if adapter_name not in factors:
                    continue
                if isinstance(factors, nn.ParameterDict):
                    places[f"{path}.{name}"] = layer, factors, adapter_name
                else:
                    places[f"{path}.{name}.weight"] = layer, factors[adapter_name], "weight"
    return places


def _fill(layer: GraloraLayer, holder: nn.Module, name: str, tensor: Tensor) -> None:
    factor = getattr(holder, name)
    if not factor.is_meta:
        factor.detach().copy_(tensor)
        return
    device, _ = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
    if device is None or device.type == "meta":
        device = tensor.device
    values = tensor.detach().to(device, factor.dtype, copy=True)
    setattr(holder, name, nn.Parameter(values, requires_grad=factor.requires_grad))


def _tensors(model: Any, adapter_name: str) -> dict[str, tuple[str, Tensor]]:
    """Return key in a file -> (PEFT's key in this model, tensor).

    The keys differ where another tuner's layer wraps a GraLoRA layer or is wrapped by one. PEFT
    also returns biases of other tuners' layers; "gralora_only" leaves those out.
    """
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    plain = {key: key.replace(".base_layer", "") for key in state if not _is_copy(key)}
    layers = {layer_of(name) for name in plain.values() if ".gralora_" in name}
    for key, name in list(plain.items()):
        path, _, leaf = name.rpartition(".")
        if leaf == "bias" and ".base_layer." in key:
            if path in layers:
                plain[key] = f"{path}.base_layer.bias"
            elif model.peft_config[adapter_name].bias != "all":
                del plain[key]
    return {name: (key, state[key]) for key, name in plain.items()}
