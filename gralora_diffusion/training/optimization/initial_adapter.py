"""The adapter with a run's initial values, in place of random ones: ``--initial_adapter``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gralora_diffusion.adapters.adapter_file import AdapterFileError, read_adapter
from gralora_diffusion.adapters.compatibility import Fit, check_fit, set_adapter_tensors
from gralora_diffusion.adapters.config import GraloraConfig
from gralora_diffusion.adapters.placement.layer_config import exact_pattern, layer_settings
from gralora_diffusion.adapters.placement.targets import adaptable_modules, find_targets
from gralora_diffusion.base_models.meta_base import empty_base
from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.config.training_config import TrainingConfig

from .adapters import ADAPTER_NAME, adapter_configs, trained_components

#: Component -> its tensors, by the keys that they have in a file and the model's own paths.
InitialValues = dict[str, dict[str, Tensor]]
#: Errors list the endings of targets if they are at most this long, and give a pattern otherwise.
_LONGEST_ENDINGS = 200


def find_initial_values(
    config: TrainingConfig, family: ModelFamily, dtype: torch.dtype
) -> InitialValues:
    """Read the adapter that the run starts from, and compare it with the run's options.

    No weights of the base are loaded, since its layers follow from its configuration.

    Raises:
        ConfigError: it cannot be read, or does not match the options. The error says what to give.
    """
    if not config.initial_adapter:
        return {}
    pipe = empty_base(config, family, dtype)
    try:
        fits = check_fit(pipe, read_adapter(config.initial_adapter), "initial")
    except AdapterFileError as error:
        raise ConfigError([f"--initial_adapter: {error}"]) from error
    wanted = trained_components(config, family)
    problems = list(_components(tuple(fits), wanted, family))
    if not problems:
        models = {name: getattr(pipe, name) for name in wanted}
        ours = adapter_configs(models, family, config)
        problems = [p for name in wanted for p in _differences(name, fits[name], ours, family)]
    if problems:
        head = f"--initial_adapter {config.initial_adapter} does not match the options"
        raise ConfigError([f"{head}: {problem}" for problem in dict.fromkeys(problems)])
    return {name: fits[name].tensors for name in wanted}


def set_initial_values(pipe: Any, values: InitialValues) -> None:
    """Put values that :func:`find_initial_values` returned into the run's adapter."""
    for component, tensors in values.items():
        set_adapter_tensors(getattr(pipe, component), ADAPTER_NAME, tensors)


def _components(
    found: tuple[str, ...], wanted: tuple[str, ...], family: ModelFamily
) -> Iterator[str]:
    if set(found) == set(wanted):
        return
    encoders = " ".join(name for name in found if name != family.denoiser)
    if family.denoiser not in found:
        advice = f"A run always trains the {family.denoiser}. Leave out --initial_adapter"
    elif encoders:
        advice = f"Give --train_text_encoder --text_encoders {encoders}"
    else:
        advice = "Leave out --train_text_encoder"
    yield f"it adapts {', '.join(found)}, but the run adapts {', '.join(wanted)}. {advice}"


def _differences(
    component: str, fit: Fit, configs: Mapping[str, GraloraConfig], family: ModelFamily
) -> Iterator[str]:
    ours, theirs = configs[component], fit.config
    if more := [key for key in fit.tensors if ".gralora_" not in key]:
        yield f"it contains {more[0]}, but a run trains only factors"
        return
    flags = {
        "--rank": (theirs.r, ours.r),
        "--gralora_k": (theirs.gralora_k, ours.gralora_k),
        "--hybrid_rank": (theirs.hybrid_r, ours.hybrid_r),
        "--lora_alpha": (theirs.alpha, ours.alpha),
    }
    if differing := {flag: pair for flag, pair in flags.items() if pair[0] != pair[1]}:
        what = ", ".join(f"{flag[2:]} {a} there and {b} here" for flag, (a, b) in differing.items())
        advice = " ".join(f"{flag} {a:g}" for flag, (a, _) in differing.items())
        yield f"{component} has {what}. Give {advice}"
        return
    targets = set(find_targets(fit.model, ours))
    if targets != fit.layers:
        only = {"there": fit.layers - targets, "here": targets - fit.layers}
        what = " and ".join(
            f"{len(paths)} only {where}, such as {min(paths)}"
            for where, paths in only.items()
            if paths
        )
        yield f"{component} has other layers: {what}. {_advice(component, fit, family)}"
        return
    for path in sorted(targets):
        if (a := layer_settings(theirs, path)) != (b := layer_settings(ours, path)):
            values = ", ".join(
                f"{name} {x:g} there and {y:g} here"
                for name, x, y in zip(("rank", "k", "alpha"), a, b, strict=True)
                if x != y
            )
            yield (
                f"{path} of {component} has {values}. Give the --rank_pattern, --k_pattern and "
                "--alpha_pattern of that adapter"
            )
            return


def _advice(component: str, fit: Fit, family: ModelFamily) -> str:
    """Return the advice to give the option that names the layers of an adapter."""
    is_denoiser = component == family.denoiser
    flag = "--target_preset" if is_denoiser else "--text_encoder_target_preset"
    for preset in family.target_presets[component]:
        if _resolved(fit.model, family.resolve_preset(component, preset, fit.model)) == fit.layers:
            return f"Give {flag} {preset}"
    if not is_denoiser:
        return f"No {flag} has those layers. Leave out --initial_adapter"
    named = fit.config.target_modules
    endings = "" if named is None or isinstance(named, str) else ",".join(sorted(named))
    if 0 < len(endings) <= _LONGEST_ENDINGS:
        return f"Give --lora_layers {endings}"
    paths = [path for path, _ in adaptable_modules(fit.model)]
    (pattern,) = exact_pattern(dict.fromkeys(sorted(fit.layers), 1), paths)
    return f"Give --lora_layers 're:{pattern}'"


def _resolved(model: nn.Module, targets: list[str]) -> set[str]:
    return set(find_targets(model, GraloraConfig(target_modules=targets)))
