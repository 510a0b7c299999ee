"""The adapter of a run: attached to the base, extracted, restored, averaged."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from gralora_diffusion.adapters.adapter_file import (
    Adapter,
    ComponentAdapter,
    config_to_dict,
    read_adapter,
)
from gralora_diffusion.adapters.compatibility import adapter_tensors, set_adapter_tensors
from gralora_diffusion.adapters.config import GraloraConfig
from gralora_diffusion.adapters.injection import inject
from gralora_diffusion.adapters.layers import GraloraLayer
from gralora_diffusion.adapters.placement.layer_config import (
    describe_unused,
    exact_pattern,
    pattern_key,
    unused_patterns,
)
from gralora_diffusion.adapters.placement.targets import find_targets, is_named, lowered_k
from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import CheckpointError, ConfigError
from gralora_diffusion.training.config.layer_patterns import given_patterns, layer_patterns
from gralora_diffusion.training.config.options import AdapterOptions
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.seeds import seed_from

from .optimizers import evaluating

logger = logging.getLogger(__name__)

ADAPTER_NAME = "default"
#: Fields of an adapter's config -> the options that they follow from.
_FLAGS = {
    "r": "--rank",
    "gralora_k": "--gralora_k",
    "hybrid_r": "--hybrid_rank",
    "alpha": "--lora_alpha",
    "gralora_dropout": "--lora_dropout",
    "target_modules": "--lora_layers or --target_preset",
    "exclude_modules": "--exclude_modules",
    "rank_pattern": "--rank_pattern",
    "k_pattern": "--k_pattern",
    "alpha_pattern": "--alpha_pattern",
}
#: Characters of a value in a message.
_LONGEST_VALUE = 200
#: Name of a lowered k in a model card.
LOWERED_K = "k lowered"


def trained_components(options: AdapterOptions, family: ModelFamily) -> tuple[str, ...]:
    """Return the attributes of the pipeline that get an adapter, the denoiser first."""
    if not options.train_text_encoder:
        return (family.denoiser,)
    chosen = options.text_encoders or family.usual_text_encoders or family.text_encoders
    return (family.denoiser, *(name for name in family.text_encoders if name in chosen))


def add_adapters(pipe: Any, family: ModelFamily, config: TrainingConfig) -> tuple[str, ...]:
    """Inject new adapters in fp32, which depend on the seed alone. Returns the components' names.

    Raises:
        ConfigError: rank, k, targets or patterns do not fit the base. The error names every layer
            that does not fit.
    """
    components = trained_components(config, family)
    models = {component: getattr(pipe, component) for component in components}
    if missing := [component for component, model in models.items() if model is None]:
        raise ConfigError(
            [f"--text_encoders names {', '.join(missing)}, which this base does not have"]
        )
    for component, adapter_config in adapter_configs(models, family, config).items():
        torch.manual_seed(seed_from(config.seed, "adapter", component))
        try:
            inject(models[component], adapter_config, ADAPTER_NAME)
        except ValueError as error:
            raise _misfit(error) from error
        for layer in models[component].modules():
            if isinstance(layer, GraloraLayer):
                # in half precision, small optimizer steps would be lost
                layer.cast_adapter(ADAPTER_NAME, torch.float32)
                layer.set_adapter(ADAPTER_NAME)
    return components


def adapter_configs(
    models: Mapping[str, nn.Module], family: ModelFamily, options: AdapterOptions
) -> dict[str, GraloraConfig]:
    """Return the config of each component's adapter, with k lowered where a width requires it.

    Each config has the patterns that apply to its layers. Lowered values of k are logged.

    Args:
        models: the bare models by component; their weights are not used.

    Raises:
        ConfigError: a model has none of the preset's layers, or a pattern or an exclusion applies
            to no layer.
    """
    try:
        configs = {
            component: _adapter_config(model, component, family, options)
            for component, model in models.items()
        }
    except ValueError as error:
        raise _misfit(error) from error
    if options.excluded_modules is not None:
        _exclude(options.excluded_modules, configs, models)
    targets = {component: find_targets(models[component], c) for component, c in configs.items()}
    if all(targets.values()):  # otherwise there is a bigger problem to report
        _check_patterns_used(options, configs, targets)
    for component, adapter_config in configs.items():
        lowered = lowered_k(models[component], adapter_config)
        _log_lowered(component, lowered, len(targets[component]))
        ks = exact_pattern(lowered, targets[component])
        adapter_config.k_pattern = {**ks, **adapter_config.k_pattern}
        for name, unused in unused_patterns(adapter_config, targets[component]).items():
            pattern = getattr(adapter_config, name)
            setattr(adapter_config, name, {k: v for k, v in pattern.items() if k not in unused})
    return configs


def _adapter_config(
    model: nn.Module, component: str, family: ModelFamily, options: AdapterOptions
) -> GraloraConfig:
    is_denoiser = component == family.denoiser
    targets = options.target_modules if is_denoiser else None
    if targets is None:
        preset = options.target_preset if is_denoiser else options.text_encoder_target_preset
        targets = family.resolve_preset(component, preset, model)
    patterns: dict[str, Any] = layer_patterns(options)
    return GraloraConfig(
        r=options.rank,
        gralora_k=options.gralora_k,
        hybrid_r=options.hybrid_rank,
        alpha=options.alpha,
        gralora_dropout=options.lora_dropout,
        target_modules=targets,
        **patterns,
    )


def _exclude(
    wanted: Sequence[str] | str,
    configs: Mapping[str, GraloraConfig],
    models: Mapping[str, nn.Module],
) -> None:
    """Give each config the exclusions that match its targets; reject those that match none."""
    is_regex = isinstance(wanted, str)
    entries = [wanted] if isinstance(wanted, str) else wanted
    used: set[str] = set()
    paths: list[str] = []
    for component, adapter_config in configs.items():
        targets = list(find_targets(models[component], adapter_config))
        mine = {e for e in entries if any(is_named(path, e, is_regex) for path in targets)}
        if mine:
            adapter_config.exclude_modules = wanted if isinstance(wanted, str) else mine
        used |= mine
        paths += targets
    if idle := [entry for entry in entries if entry not in used]:
        some = paths[0] if paths else "none"
        raise ConfigError(
            [
                f"--exclude_modules {entry} matches none of the {len(paths)} layers to adapt, such "
                f"as {some}. Leave it out"
                for entry in idle
            ]
        )


def _check_patterns_used(
    options: AdapterOptions,
    configs: Mapping[str, GraloraConfig],
    targets: Mapping[str, Mapping[str, nn.Module]],
) -> None:
    """Reject the user's patterns that apply to no layer of any component."""
    unused = [unused_patterns(configs[name], targets[name]) for name in configs]
    idle = {
        name: [key for key in given if all(key in part[name] for part in unused)]
        for name, given in given_patterns(options).items()
    }
    paths = [path for part in targets.values() for path in part]
    if problems := describe_unused(idle, paths):
        raise ConfigError([f"--{problem}" for problem in problems])


def _log_lowered(component: str, lowered: Mapping[str, int], count: int) -> None:
    for k in sorted(set(lowered.values())):
        paths = [path for path, lower in lowered.items() if lower == k]
        some = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
        logger.info(
            "%s: k is lowered to %d on %d of %d layers, as their widths require: %s",
            *(component, k, len(paths), count, some),
        )


def _misfit(error: ValueError) -> ConfigError:
    flags = "--rank, --gralora_k, --lora_layers or --target_preset"
    return ConfigError([f"{flags} do not fit the base: {error}"])


def lowered_ks(models: Iterable[nn.Module], options: AdapterOptions) -> dict[int, int]:
    """Return k -> number of GraLoRA layers of these models whose k was lowered to it."""
    wanted, lowered = given_patterns(options)["k_pattern"], Counter[int]()
    for model in models:
        for path, layer in model.named_modules():
            if isinstance(layer, GraloraLayer):
                k = layer.gralora_k[ADAPTER_NAME]
                if k < wanted.get(pattern_key(wanted, path), options.gralora_k):
                    lowered[k] += 1
    return dict(sorted(lowered.items()))


def adapter_facts(models: Sequence[nn.Module], options: AdapterOptions) -> dict[str, Any]:
    """Return facts on the adapter on these models for a model card: layers and lowered k."""
    count = sum(isinstance(m, GraloraLayer) for model in models for m in model.modules())
    where = ", ".join(f"{k} on {n}" for k, n in lowered_ks(models, options).items())
    lowered = f"to {where} of these layers, because their widths allow no larger one"
    return {"adapted layers": count, **({LOWERED_K: lowered} if where else {})}


def adapter_parameters(pipe: Any, component: str) -> list[nn.Parameter]:
    """Return the trained parameters of one component, in the model's order."""
    return [p for p in getattr(pipe, component).parameters() if p.requires_grad]


def second_factors(pipe: Any, component: str) -> list[nn.Parameter]:
    """Return those of ``adapter_parameters`` that are second factors, of GraLoRA or PEFT's LoRA."""
    named = getattr(pipe, component).named_parameters()
    ours = (".gralora_B", ".lora_B.")
    return [p for name, p in named if p.requires_grad and any(part in name for part in ours)]


def extract(pipe: Any, family: ModelFamily, components: Sequence[str]) -> Adapter:
    """Copy the adapter's current weights out of the models."""
    return Adapter(
        {
            component: ComponentAdapter(
                model.peft_config[ADAPTER_NAME],
                {
                    key: tensor.detach().clone()
                    for key, tensor in adapter_tensors(model, ADAPTER_NAME).items()
                },
            )
            for component in components
            for model in [getattr(pipe, component)]
        },
        family.name,
    )


def restore(pipe: Any, components: Sequence[str], path: Path) -> None:
    """Load weights into the models that :func:`extract` and ``save_adapter`` wrote.

    Raises:
        CheckpointError: the checkpoint's adapter has another configuration than this run's.
    """
    adapter = read_adapter(path)
    models = {component: getattr(pipe, component) for component in components}
    ours = {component: model.peft_config[ADAPTER_NAME] for component, model in models.items()}
    if differences := adapter_differences(adapter, ours):
        raise CheckpointError(
            f"{path} belongs to another run ({'; '.join(differences)}). Resume with the options of "
            "that run."
        )
    for component, model in models.items():
        set_adapter_tensors(model, ADAPTER_NAME, adapter.components[component].tensors)


def adapter_differences(there: Adapter, here: Mapping[str, GraloraConfig]) -> list[str]:
    """Return in which components or options a checkpoint's adapter differs from this run's.

    Args:
        here: component -> the config of its adapter.
    """
    if set(there.components) != set(here):
        return [f"it adapts {', '.join(there.components)}, not {', '.join(here)}"]
    found = []
    for component, config in here.items():
        ours, theirs = config_to_dict(config), config_to_dict(there.components[component].config)
        for key in {**_FLAGS, **ours, **theirs}:
            # as JSON, because the order of patterns matters
            if json.dumps(ours.get(key)) != json.dumps(theirs.get(key)):
                values = f"{_shown(theirs.get(key))} there, {_shown(ours.get(key))} here"
                found.append(f"{_FLAGS.get(key, key)} {values}")
    return list(dict.fromkeys(found))  # the same for several components


def _shown(value: Any) -> str:
    """Return a value of a config in a length for a message: a pattern may name every layer."""
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


@contextmanager
def inference_weights(
    parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, ema: EMAModel | None
) -> Iterator[None]:
    """Give the parameters the weights for inference inside: EMA's or schedule-free's average.

    Afterwards they have their old values, bit for bit.
    """
    with evaluating(optimizer):
        if ema is None:
            yield
            return
        ema.store(parameters)
        ema.copy_to(parameters)
        try:
            yield
        finally:
            ema.restore(parameters)
