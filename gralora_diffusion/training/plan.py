"""``--dry_run``: what a run would train, and the memory it would take, without its weights.

The base is there in its shapes alone, and its step is rehearsed on fake tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from ..families import ModelFamily
from ..layers import GraloraLayer
from .acceleration import DTYPES
from .adapters import ADAPTER_NAME, add_adapters, trained_components
from .config import TrainingConfig
from .config_checks import ConfigError
from .data import Example
from .empty_base import empty_base
from .loop import checkpoint_gradients
from .memory import bytes_of, materialize, optimizer_state_bytes, tensors_of
from .plan_text import plan_text
from .prior import class_pictures_there
from .rehearsal import ImaginedData, measure_step


@dataclass(frozen=True)
class ComponentPlan:
    """A model of the base."""

    name: str
    dtype: str  # of most of its parameters
    parameters: int
    bytes: int
    in_steps: bool  # whether it stays on the device when all is encoded


@dataclass(frozen=True)
class AdapterPlan:
    """The adapter of a component."""

    component: str
    parameters: int
    #: "rank 16, k 2" -> paths of the layers that have it; the most usual first
    layers: dict[str, list[str]]


@dataclass(frozen=True)
class Plan:
    """What a run would do, and the bytes it would take on its device. ``str`` of it is for people.

    Attributes:
        encoding: most that encoding makes beside base and adapter.
        cached: latents and prompts that are kept encoded, in the machine's memory.
        activations: most that a step makes beside all others, when ``gradients_then`` are there.
        processes: each takes as much.
    """

    config: TrainingConfig  # with the family's defaults
    family: str
    device: str
    processes: int
    pictures: int
    class_pictures: int
    picture_size: tuple[int, int]
    rows: int
    steps: int
    components: tuple[ComponentPlan, ...]
    adapters: tuple[AdapterPlan, ...]
    adapter: int
    gradients: int
    gradients_then: int
    buckets: int
    optimizer: int
    ema: int
    activations: int
    encoding: int
    cached: int

    @property
    def trained_parameters(self) -> int:
        return sum(adapter.parameters for adapter in self.adapters)

    @property
    def base(self) -> int:
        """Bytes of the base that stay on the device during the steps."""
        return sum(part.bytes for part in self.components if part.in_steps)

    @property
    def cached_here(self) -> int:
        """Of ``cached`` what lies on the device."""
        return self.cached if self.device == "cpu" else 0

    @property
    def peak_of_encoding(self) -> int:
        whole = sum(part.bytes for part in self.components)
        return whole + self.adapter + self.cached_here + self.encoding

    @property
    def peak_of_steps(self) -> int:
        kept = self.base + self.adapter + self.optimizer + self.ema + self.buckets
        return kept + self.cached_here + self.activations + self.gradients_then

    @property
    def peak(self) -> int:
        return max(self.peak_of_encoding, self.peak_of_steps)

    def __str__(self) -> str:
        return plan_text(self)


def plan_run(
    config: TrainingConfig,
    family: ModelFamily,
    pictures: Sequence[Example],
    class_pictures: Sequence[Example],
    accelerator: Accelerator,
) -> Plan:
    """Plan the run that ``loop.train`` would make of the same arguments.

    Raises:
        ConfigError: as the run would before it loads weights.
    """
    device, dtype = accelerator.device, DTYPES[accelerator.mixed_precision]
    pipe = empty_base(config, family, dtype)
    config = config.with_defaults(
        {
            **family.training_defaults,
            "resolution": family.native_resolution(pipe),
            "mixed_precision": accelerator.mixed_precision,
        }
    )
    models = {name: m for name, m in pipe.components.items() if isinstance(m, nn.Module)}
    stays = {*trained_components(config, family), *(() if config.cache_latents else ("vae",))}
    if device.type == "cpu":  # where all goes that leaves another device
        stays = set(models)
    components = tuple(_component_plan(name, m, name in stays) for name, m in models.items())
    with torch.device("meta"):
        trained = add_adapters(pipe, family, config)
    if config.gradient_checkpointing:
        for name in trained:
            checkpoint_gradients(models[name])
    named = [[(n, p) for n, p in models[c].named_parameters() if p.requires_grad] for c in trained]
    denoiser, encoders = named[0], [entry for group in named[1:] for entry in group]
    adapter = bytes_of(p for _, p in (*denoiser, *encoders))

    data = ImaginedData(config, family, pipe, [*pictures, *class_pictures], accelerator)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for model in models.values():
                materialize(model, device)
            encoding, cached = data.encode(pipe)
            activations, gradients_then = measure_step(config, family, pipe, trained, data)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ConfigError(
            [
                f"--dry_run: a model of this base decides by values that only weights give "
                f"({error}), so it cannot be planned. Leave out --dry_run"
            ]
        ) from error

    processes = accelerator.num_processes
    samples = config.train_batch_size * config.gradient_accumulation_steps * processes
    epoch = math.ceil(len(pictures) * config.repeats / samples)
    return Plan(
        config=config,
        family=family.name,
        device=device.type,
        processes=processes,
        pictures=len(pictures),
        class_pictures=class_pictures_there(config),
        picture_size=data.picture_size,
        rows=config.train_batch_size * (2 if config.with_prior_preservation else 1),
        steps=config.max_train_steps or config.num_train_epochs * epoch,
        components=components,
        adapters=tuple(_adapter_plan(name, models[name]) for name in trained),
        adapter=adapter,
        gradients=adapter,
        gradients_then=gradients_then,
        buckets=adapter if processes > 1 else 0,  # DDP gathers gradients in buckets of its own
        optimizer=optimizer_state_bytes(config, denoiser, encoders, device),
        ema=adapter if config.use_ema else 0,
        activations=activations,
        encoding=encoding,
        cached=cached,
    )


def _component_plan(name: str, model: nn.Module, in_steps: bool) -> ComponentPlan:
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        counts[parameter.dtype] += parameter.numel()
    dtype = str(counts.most_common(1)[0][0]).removeprefix("torch.")
    return ComponentPlan(name, dtype, counts.total(), bytes_of(tensors_of(model)), in_steps)


def _adapter_plan(
    component: str, model: nn.Module, adapter_name: str = ADAPTER_NAME
) -> AdapterPlan:
    layers: dict[str, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, GraloraLayer):
            rank, hybrid = layer.r[adapter_name], layer.hybrid_r[adapter_name]
            kind = f"rank {rank}" + (f" + {hybrid}" if hybrid else "")
            kind += f", k {layer.gralora_k[adapter_name]}"
            kind += f", scaling {layer.scaling[adapter_name]:g}"
            layers.setdefault(kind, []).append(name)
    layers = dict(sorted(layers.items(), key=lambda entry: -len(entry[1])))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return AdapterPlan(component, trained, layers)
