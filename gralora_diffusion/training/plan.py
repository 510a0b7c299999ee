"""``--dry_run``: what a run would train, and the memory it would take, without its weights.

Nothing here knows a model or a family: the trainer's own step, forward and backward, runs on fake
tensors under the run's own precision, and what it makes is counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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
from .batches import Batches
from .caching import PromptCache
from .config import TrainingConfig
from .config_checks import ConfigError
from .data import Example
from .empty_base import empty_base
from .loop import checkpoint_gradients
from .memory import MemoryMeter, bytes_of, materialize, optimizer_state_bytes, tensors_of
from .objectives import DDPM
from .pictures import CropPlan
from .plan_text import plan_text
from .prior import class_pictures_there
from .step import DenoisingStep, RowMaker


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

    @property
    def trained_parameters(self) -> int:
        return sum(adapter.parameters for adapter in self.adapters)

    @property
    def base(self) -> int:
        """Bytes of the base that stay on the device during the steps."""
        return sum(part.bytes for part in self.components if part.in_steps)

    @property
    def peak_of_encoding(self) -> int:
        return sum(part.bytes for part in self.components) + self.adapter + self.encoding

    @property
    def peak_of_steps(self) -> int:
        made = self.activations + self.gradients_then
        return self.base + self.adapter + self.optimizer + self.ema + self.buckets + made

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

    data = _Imagined(config, family, pipe, [*pictures, *class_pictures], accelerator)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for model in models.values():
                materialize(model, device)
            encoding = data.encode(pipe)
            activations, gradients_then = _measure_step(config, family, pipe, trained, data)
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
    )


class _Imagined(Batches):
    """The data of a run as far as a step sees it, of the right shapes and without content."""

    def __init__(
        self,
        config: TrainingConfig,
        family: ModelFamily,
        pipe: Any,
        pictures: Sequence[Example],
        accelerator: Accelerator,
    ) -> None:
        self.config, self.family, self.vae, self.accelerator = config, family, pipe.vae, accelerator
        self.prompts = None if config.train_text_encoder else PromptCache()
        self.teacher = None
        assert config.resolution is not None
        #: height and width of the largest picture
        self.picture_size = (config.resolution, config.resolution)
        plan = CropPlan(config.resolution, config.center_crop, config.random_flip)
        crops = [
            len(plan.kept(p.size, p.content_key, config.cached_crops, config.seed))
            for p in pictures
        ]
        #: how many crops of a picture the latent cache encodes together
        self.crops_at_once = min(4, max(crops))
        captions = {picture.caption for picture in pictures}
        captions |= {""} if config.caption_dropout else set()
        captions |= {str(config.class_prompt)} if config.with_prior_preservation else set()
        self.captions = len(captions)

    def encode(self, pipe: Any) -> int:
        """Encode as a run does before its first step; returns the bytes that it makes at most."""
        config = self.config
        meter = _meter(pipe, self.accelerator.device)
        with torch.no_grad(), meter:
            if config.cache_latents:
                latents = self.encode_images(self._pixels(self.crops_at_once))
                self.latents = [part[:1].cpu() for part in latents]
                del latents

            def encode(prompts: list[str]) -> Any:
                return self.family.encode_prompts(pipe, prompts)

            if self.prompts is not None:
                self.prompts.fill([_prompt(number) for number in range(self.captions)], encode)
            if config.with_prior_preservation and config.prior_source == "teacher":
                self.teacher = {key: value.cpu() for key, value in encode([_prompt(0)]).items()}
        return meter.peak

    def batch(self) -> dict[str, Any]:
        """As ``samples.collate`` makes it."""
        count = self.config.train_batch_size
        batch: dict[str, Any] = {
            "positions": list(range(count)),
            "prompts": [_prompt(0)] * count,
            "content_keys": [""] * count,
            "original_sizes": torch.tensor([self.picture_size] * count),
            "crop_top_lefts": torch.zeros(count, 2, dtype=torch.long),
        }
        if not self.config.cache_latents:
            return {**batch, "pixel_values": self._pixels(count)}
        mean, std = (part.expand(count, *part.shape[1:]) for part in self.latents)
        return {**batch, "mean": mean, "std": std}

    def _pixels(self, count: int) -> torch.Tensor:
        return torch.empty(count, 3, *self.picture_size)


def _measure_step(
    config: TrainingConfig,
    family: ModelFamily,
    pipe: Any,
    trained: Sequence[str],
    data: _Imagined,
) -> tuple[int, int]:
    """Bytes of activations at the peak of a step, and of gradients that are there by then."""
    accelerator = data.accelerator
    objective = DDPM(
        pipe.scheduler.config, config.prediction_type, config.snr_gamma, config.noise_offset
    )
    step = DenoisingStep(pipe, family, objective, trained)
    step.train()
    dtype = DTYPES[accelerator.mixed_precision]
    imagined = replace(config, class_prompt=_prompt(0))
    rows_of = RowMaker(step, data, imagined, accelerator.device, dtype)
    with_classes = config.with_prior_preservation and config.prior_source == "images"
    meter = _meter(pipe, accelerator.device)
    for parameter in step.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(meter.note)
    # from the second pass on, the gradients of the first are there
    for _ in range(min(2, config.gradient_accumulation_steps)):
        with meter:
            rows = rows_of.rows(data.batch(), data.batch() if with_classes else None)
            with accelerator.autocast():
                losses = step(rows)
            loss = (losses * rows.weights).sum() / rows.instances
            loss.backward()
            del rows, losses, loss
    return meter.peak - meter.noted_at_peak, meter.noted_at_peak


def _prompt(number: int) -> str:
    """Stands for a caption: encoded, all have one shape, but what is cut off is compared first."""
    return str(number)


def _meter(pipe: Any, device: torch.device) -> MemoryMeter:
    models = [model for model in pipe.components.values() if isinstance(model, nn.Module)]
    return MemoryMeter(device, (t for model in models for t in tensors_of(model)))


def _component_plan(name: str, model: nn.Module, in_steps: bool) -> ComponentPlan:
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        counts[parameter.dtype] += parameter.numel()
    dtype = str(counts.most_common(1)[0][0]).removeprefix("torch.")
    return ComponentPlan(name, dtype, counts.total(), bytes_of(tensors_of(model)), in_steps)


def _adapter_plan(component: str, model: nn.Module) -> AdapterPlan:
    layers: dict[str, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, GraloraLayer):
            rank, hybrid = layer.r[ADAPTER_NAME], layer.hybrid_r[ADAPTER_NAME]
            kind = f"rank {rank}" + (f" + {hybrid}" if hybrid else "")
            kind += f", k {layer.gralora_k[ADAPTER_NAME]}"
            kind += f", scaling {layer.scaling[ADAPTER_NAME]:g}"
            layers.setdefault(kind, []).append(name)
    layers = dict(sorted(layers.items(), key=lambda entry: -len(entry[1])))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return AdapterPlan(component, trained, layers)
