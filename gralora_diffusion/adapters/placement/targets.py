"""The layers of a model that a config targets, and why GraLoRA refuses one."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from peft import GraloraConfig, PeftConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .fused_projections import adapted_joints, replaced_projections
from .layer_config import describe_unused, layer_settings, unused_patterns
from .path_patterns import path_pattern

#: The base layers that GraLoRA can adapt, for error messages.
SUPPORTED_LAYERS = "torch.nn.Linear, transformers' Conv1D, torch.nn.Conv2d with groups=1"


class TargetError(ValueError):
    """The targets of a config do not fit the model. The message lists every layer and pattern."""


def layer_shape(layer: nn.Module) -> tuple[int, int, tuple[int, ...]]:
    """Return in features, out features and kernel size (empty unless a convolution) of a layer."""
    if isinstance(layer, Conv1D):
        in_features, out_features = getattr(layer.weight, "ds_shape", layer.weight.shape)
        return in_features, out_features, ()
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels, tuple(layer.kernel_size)
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features, ()
    raise TypeError(f"a {type(layer).__name__} is not supported ({SUPPORTED_LAYERS})")


def unsupported(layer: nn.Module) -> str | None:
    """Return why this base layer cannot have any GraLoRA; None if it can."""
    if not isinstance(layer, (nn.Linear, Conv1D, nn.Conv2d)):
        return f"a {type(layer).__name__}, which is not supported ({SUPPORTED_LAYERS})"
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"a convolution with groups={layer.groups}, not supported ({SUPPORTED_LAYERS})"
    return None


def unsuitable(layer: nn.Module, r: int, k: int) -> str | None:
    """Return why this base layer cannot have GraLoRA of rank r with k blocks; None if it can."""
    problem = unsupported(layer)
    if problem:
        return problem
    in_features, out_features, _ = layer_shape(layer)
    numbers = {"in_features": in_features, "out_features": out_features, "r": r}
    wrong = [f"{name}={number}" for name, number in numbers.items() if number % k]
    if wrong:
        smaller = [fit for fit in fitting_k([layer], [r]) if fit < k]
        return (
            f"{' and '.join(wrong)} not divisible by gralora_k={k} "
            f"(largest k below that fits this layer and r={r}: {max(smaller, default=1)})"
        )
    return None


def fitting_k(layers: Iterable[nn.Module], ranks: Collection[int]) -> list[int]:
    """Return every k that divides these ranks and the widths of all these layers; 1 always does."""
    return common_divisors({*ranks, *(w for layer in layers for w in layer_shape(layer)[:2])})


def common_divisors(numbers: Collection[int]) -> list[int]:
    """Return every number that divides all of these, the smallest first."""
    return [d for d in range(1, min(numbers) + 1) if not any(number % d for number in numbers)]


def lowered_k(model: nn.Module, config: GraloraConfig) -> dict[str, int]:
    """Return path -> k of the target layers whose widths the config's k does not divide.

    It is the largest divisor of the layer's rank and of both its widths below the config's k.
    :func:`check_targets` reports layers that no k fits, or whose rank k does not divide.
    """
    lowered = {}
    for path, layer in find_targets(model, config).items():
        r, k, _ = layer_settings(config, path)
        if unsupported(layer) is None and r % k == 0 and unsuitable(layer, r, k):
            lowered[path] = max(fit for fit in fitting_k([layer], [r]) if fit < k)
    return lowered


def quantization_of(layer: nn.Module) -> str | None:
    """Return how a layer's weight is stored if an update cannot be added to it; None if it can.

    This depends on the class of the weight, because each library that quantizes has its own. The
    dtype does not show it: torchao's tensors have the dtype that they compute in, and bitsandbytes
    packs 4 bits into any dtype. A weight of torch's own class is plain unless its dtype is an
    integer or fp8.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    library = type(weight).__module__.partition(".")[0]
    if library != "torch":
        return f"{library} {type(weight).__name__}"
    plain = weight.is_floating_point() and weight.dtype.itemsize >= 2
    return None if plain else str(weight.dtype)


def base_of(module: nn.Module) -> nn.Module:
    """Return the layer beneath any tuner's layers."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def adaptable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, base layer) of every module that a target may name, except inside adapters."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (name + ".",)
        yield name, base_of(module)


def find_targets(model: nn.Module, config: GraloraConfig, prefix: str = "") -> dict[str, nn.Module]:
    """Return path -> base layer of the layers that ``config`` targets, in the model's order.

    Args:
        prefix: the prefix of the model's paths in the config.
    """
    config = copy.copy(config)
    _maybe_include_all_linear_layers(config, model)  # changes the copy
    return {
        name: layer for name, layer in adaptable_modules(model) if is_target(config, prefix + name)
    }


def is_target(config: PeftConfig, path: str) -> bool | re.Match[str] | _ExcludedModule | None:
    """As PEFT's ``check_target_module_exists``, but regular expressions take bounded time.

    Raises:
        PatternError: a regular expression cannot be matched in bounded time.
    """
    asked: Any = copy.copy(config)
    targets = asked.target_modules
    if isinstance(excluded := getattr(asked, "exclude_modules", None), str):
        if excluded and is_named(path, excluded, pattern=True):
            return _ExcludedModule()
        asked.exclude_modules = None
    if isinstance(targets, str):
        asked.target_modules = []  # so PEFT only checks whether modules_to_save has the path
        found = check_target_module_exists(asked, path)
        is_saved = isinstance(found, _ExcludedModule)
        return found if is_saved else is_named(path, targets, pattern=True)
    return check_target_module_exists(asked, path)


def check_targets(
    model: nn.Module, config: GraloraConfig, keys: Iterable[str] | None = None
) -> dict[str, nn.Module]:
    """As :func:`find_targets`, but refuse targets that cannot be adapted.

    Args:
        keys: keys of a state dict; if given, its layers are the targets instead of the config's.

    Raises:
        TargetError: with every layer and pattern at fault.
    """
    if keys is None:
        targets = find_targets(model, config)
        problems = _unmatched(model, config, targets)
    else:
        modules = dict(adaptable_modules(model))
        wanted = dict.fromkeys(layer_of(key) for key in keys if ".gralora_" in key)
        targets = {name: modules[name] for name in wanted if name in modules}
        absent = ", ".join(name for name in wanted if name not in modules)
        problems = (
            [f"these layers of the state dict are not in the model: {absent}."] if absent else []
        )
    refuse(model, [*problems, *misfits(targets, config), *_without_effect(model, targets)])
    return targets


def _without_effect(model: nn.Module, targets: Iterable[str]) -> list[str]:
    replaced = sorted(replaced_projections(model) & set(targets))
    if not replaced:
        return []
    if joints := adapted_joints(model):
        advice = (
            f"{joints[0]} has an adapter, such as that of a LoKr file, which unfusing would drop. "
            "Remove that adapter with `delete_adapters` or `unload_lora_weights()`, and then call "
            "`unfuse_qkv_projections()`, or leave these layers out of this adapter."
        )
    else:
        advice = (
            "Call `unfuse_qkv_projections()` first, or load the model again if it was fused twice."
        )
    return [
        f"{len(replaced)} of the layers, such as {replaced[0]}, are not in use because their "
        f"projections are fused, so an adapter on them would have no effect. {advice}"
    ]


def refuse(model: nn.Module, problems: Sequence[str]) -> None:
    """Raise a TargetError with all these problems, if there are any."""
    if problems:
        raise TargetError(f"{type(model).__name__}: " + "\n".join(problems))


def misfits(targets: Mapping[str, nn.Module], config: GraloraConfig) -> list[str]:
    """Describe in one text the targets that their rank and k do not fit, and values that would."""
    settings = {path: layer_settings(config, path) for path in targets}
    reasons = {path: unsuitable(layer, *settings[path][:2]) for path, layer in targets.items()}
    lines = [f"  {path}: {reason}" for path, reason in reasons.items() if reason]
    if not lines:
        return []
    adaptable = [path for path, layer in targets.items() if unsupported(layer) is None]
    advice = "Choose targets without these layers."
    if any(reasons[path] for path in adaptable):
        if getattr(config, "k_pattern", None):
            advice = "Choose another k for these layers in k_pattern, or targets without them."
        else:
            ranks = {settings[path].r for path in adaptable}
            fits = fitting_k([targets[path] for path in adaptable], ranks)
            advice = (
                f"Choose gralora_k={' or '.join(map(str, fits))}, or targets without these layers, "
                "or a smaller k for them in k_pattern."
            )
    r, k = config.r, config.gralora_k
    wanted = (
        f"r={r}, gralora_k={k}"
        if {s[:2] for s in settings.values()} == {(r, k)}
        else ("the r and gralora_k that the config gives them")
    )
    head = f"{len(lines)} of {len(targets)} target layers cannot take GraLoRA of {wanted}:"
    return ["\n".join([head, *lines, advice])]


def layer_of(key: str) -> str:
    """Return the path of the layer that a key of a factor belongs to."""
    return key.rsplit(".gralora_", 1)[0]


def _unmatched(
    model: nn.Module, config: GraloraConfig, targets: Mapping[str, nn.Module]
) -> list[str]:
    """Describe patterns that match nothing, and fields that have no effect in this config."""
    patterns = config.target_modules or ()
    if not targets:
        return [_nothing_matches(model, config)]
    problems = []
    if isinstance(patterns, str):
        if config.layers_to_transform is not None and patterns.lower() != "all-linear":
            problems.append(
                "layers_to_transform needs a list of target_modules, not a regular expression."
            )
        patterns = ()
    if config.layers_pattern and config.layers_to_transform is None:
        problems.append("layers_pattern needs layers_to_transform, which is not given.")
    # excluded or filtered layers count as matched: only a pattern that names nothing is a mistake
    names = [name for name, _ in adaptable_modules(model)]
    if absent := _naming_nothing(patterns, names):
        problems.append(
            f"these target_modules match no layer: {', '.join(absent)}. The others match "
            f"{len(targets)} layers. Layers of this model end in: {_endings(model)}."
        )
    # with a task_type, PEFT adds names, and only one of them has to exist
    saved = config.modules_to_save if config.task_type is None else ()
    if absent := _naming_nothing(saved or (), names):
        problems.append(f"these modules_to_save match no module: {', '.join(absent)}.")
    excluded = getattr(config, "exclude_modules", None) or ()
    if isinstance(excluded, str):
        absent = [] if any(is_named(name, excluded, True) for name in names) else [excluded]
    else:
        absent = _naming_nothing(excluded, names)
    if absent:
        problems.append(f"these exclude_modules match no module: {', '.join(absent)}.")
    return problems + describe_unused(unused_patterns(config, targets), targets)


def is_named(path: str, entry: str, pattern: bool = False) -> bool:
    """Whether an entry of ``target_modules`` or ``exclude_modules`` names a layer, as in PEFT.

    Args:
        pattern: the entry is a regular expression for the whole path, not an ending of it.
    """
    if pattern:
        return path_pattern(entry).matches(path)
    return path == entry or path.endswith(f".{entry}")


def _naming_nothing(endings: Iterable[str], names: Sequence[str]) -> list[str]:
    return sorted(ending for ending in endings if not any(is_named(name, ending) for name in names))


def _nothing_matches(model: nn.Module, config: GraloraConfig) -> str:
    wanted = config.target_modules or ()
    wanted = repr(wanted) if isinstance(wanted, str) else ", ".join(sorted(wanted)) or "(empty)"
    limits = "".join(
        f" with {name}={value}"
        for name in ("layers_to_transform", "layers_pattern", "modules_to_save", "exclude_modules")
        if (value := getattr(config, name, None))
    )
    return (
        f"target_modules {wanted}{limits} not found in the model: no layer matches. "
        f"Layers of this model end in: {_endings(model)}. A string must match the whole path as a "
        "regular expression; the entries of a list are endings of paths."
    )


def _endings(model: nn.Module) -> str:
    """Return the distinct ends of paths of adaptable layers, such as ``to_q`` or ``to_out.0``."""
    endings: Counter[str] = Counter()
    for name, layer in adaptable_modules(model):
        if unsupported(layer) is None:
            parts = name.split(".")
            endings[".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])] += 1
    return ", ".join(f"{ending} ({count})" for ending, count in endings.items()) or "(none)"
