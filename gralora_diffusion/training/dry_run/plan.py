"""``--dry_run``: what a run would train and how much memory it would need, without weights.

The base consists of shapes only, and its step runs on fake tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from gralora_diffusion.adapters.layers import GraloraLayer
from gralora_diffusion.base_models.meta_base import empty_base
from gralora_diffusion.base_models.quantization import quantize_empty
from gralora_diffusion.base_models.streaming import Streaming, block_bytes, can_be_streamed
from gralora_diffusion.base_models.unread_weights import unread_models
from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.pipelines.placement import bytes_of, tensors_of
from gralora_diffusion.training.checks.base import resolve_defaults
from gralora_diffusion.training.checks.controls import check_controls_of_base
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.class_images import existing_class_images
from gralora_diffusion.training.data.dataset import TrainingSet
from gralora_diffusion.training.data.held_out import held_out_config
from gralora_diffusion.training.data.image_folder import Example
from gralora_diffusion.training.data.sets import (
    SampledSet,
    crop_plans,
    described_sets,
    largest_size,
    sampled_sets,
)
from gralora_diffusion.training.optimization.adapters import ADAPTER_NAME, add_adapters
from gralora_diffusion.training.optimization.objectives import LEVELS
from gralora_diffusion.training.optimization.optimizers import optimizer_state_bytes
from gralora_diffusion.training.runtime.acceleration import DTYPES, checkpoint_gradients
from gralora_diffusion.training.runtime.memory import materialize
from gralora_diffusion.training.runtime.offloading import NOTHING, Offloading
from gralora_diffusion.training.runtime.sharding import Sharding, parts_to_shard

from .fake_step import FakeData, FakeObjective, measure_step

_OPTIMIZERS = {
    "adamw": "AdamW",
    "adamw8bit": "8-bit AdamW",
    "prodigy": "Prodigy",
    "adafactor": "Adafactor",
    "schedulefree": "schedule-free AdamW",
}


class CannotPlan(ConfigError):
    """A run cannot be planned, which does not keep it from running."""


@dataclass(frozen=True)
class AdapterPlan:
    """The adapter of a component."""

    component: str
    parameters: int
    bytes: int
    #: "rank 16, k 2" -> paths of the layers that have it; the most common first
    layers: dict[str, list[str]]


@dataclass(frozen=True)
class MemoryRow:
    """Something that takes memory on the device.

    Attributes:
        name: attribute of the pipeline, or another name; ``label`` is the text for users.
        bytes: phase -> bytes at the phase's peak; phases without it are left out.
    """

    name: str
    label: str
    bytes: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """What a run would do, and the bytes it would need on its device.

    Attributes:
        config: with the family's defaults.
        processes: number of processes; each needs the memory in ``memory``.
        sets: a line for each set of a data file.
        held_out: number of images whose loss is measured.
        rows: of a forward pass.
        phases: those that exist of encoding "pictures", encoding "prompts", and "steps".
        gradients: bytes at the end of a step; there are fewer at the peak of memory.
        cached: bytes of encoded images and prompts, which stay in the machine's memory.
        denoiser: the denoiser's attribute of the pipeline.
        blocks: denoiser and text encoders -> bytes of each of their blocks, for those that can be
            streamed.
        apart: the device has memory of its own, and models leave it for the CPU's.
        offloading: what is streamed.
        controls: height and width of the control images of a sample, of one that has the most
            pixels of them.
        reduces_controls: whether ``--control_resolution`` makes them smaller.
    """

    config: TrainingConfig
    family: str
    device: str
    processes: int
    images: int
    sets: tuple[str, ...]
    masks: int
    class_images: int
    held_out: int
    image_size: tuple[int, int]  # height, width of the largest
    rows: int
    steps: int
    adapters: tuple[AdapterPlan, ...]
    phases: tuple[str, ...]
    memory: tuple[MemoryRow, ...]
    gradients: int
    cached: int
    denoiser: str
    blocks: dict[str, list[int]]
    apart: bool
    offloading: Offloading = NOTHING
    controls: tuple[tuple[int, int], ...] = ()
    reduces_controls: bool = False

    @property
    def trained_parameters(self) -> int:
        return sum(adapter.parameters for adapter in self.adapters)

    @property
    def file(self) -> int:
        """Bytes of the tensors in the adapter's file."""
        return sum(adapter.bytes for adapter in self.adapters)

    @property
    def measurements(self) -> int:
        """How often the loss of the held-out images is measured, the frozen base's included."""
        return 2 + self.steps // self.config.held_out_steps if self.held_out else 0

    @property
    def measured_rows(self) -> int:
        """Rows of a measurement: each held-out image at each noise level, with each noise."""
        return self.held_out * len(LEVELS) * self.config.held_out_noises

    @property
    def copied(self) -> int:
        """Bytes that a step copies to the device."""
        streaming, config = self.offloading.denoiser, self.config
        if streaming is None:
            return 0
        teaches = config.with_prior_preservation and config.prior_source == "teacher"
        keeps = config.masked_loss and self.masks > 0 and config.mask_outside == "base"
        # forward, backward, and a forward of the bare base for each target that it gives
        passes = config.gradient_accumulation_steps * (2 + teaches + keeps)
        return passes * streaming.bytes_needed(self.blocks.get(self.denoiser, [])).streamed

    def offloaded(self, offloading: Offloading) -> Plan:
        """Return the plan of the same run with parts of its base streamed, where nothing was."""
        rings: dict[str, int] = {}
        rows = []
        for row in self.memory:
            streaming = self._streaming(row.name, offloading)
            if streaming is not None:
                needed = streaming.bytes_needed(self.blocks[row.name])
                phase = "steps" if row.name == self.denoiser else "prompts"
                rings[phase] = rings.get(phase, 0) + needed.ring
                of = len(self.blocks[row.name])
                label = f"{row.label}, {needed.blocks} of {of} blocks streamed"
                less = needed.streamed if self.apart else 0
                row = MemoryRow(row.name, label, {p: n - less for p, n in row.bytes.items()})
            rows.append(row)
        there = {phase: size for phase, size in rings.items() if phase in self.phases}
        rows.insert(len(rows) - 2, MemoryRow("ring", "blocks on the way", there))
        return replace(self, memory=tuple(rows), offloading=offloading)

    def _streaming(self, name: str, offloading: Offloading) -> Streaming | None:
        if name not in self.blocks:
            return None
        if name == self.denoiser:
            return offloading.denoiser
        return Streaming() if offloading.encoders else None

    def peak(self, phase: str) -> int:
        """Return the bytes on the device at the peak of a phase."""
        return sum(row.bytes.get(phase, 0) for row in self.memory)


def plan_run(
    config: TrainingConfig,
    family: ModelFamily,
    images: Sequence[Example],
    class_images: Sequence[Example],
    accelerator: Accelerator,
    sharding: Sharding | None = None,
    apart: bool = False,
    *,
    held_out: Sequence[Example] = (),
) -> Plan:
    """Plan the run that ``run.train`` would do with the same arguments, with nothing streamed.

    Args:
        apart: plan for a device with memory of its own, even if this machine has none.

    Raises:
        ConfigError: as the run would raise it before loading weights.
        CannotPlan: the plan would need the weights.
    """
    device, dtype = accelerator.device, DTYPES[accelerator.mixed_precision]
    pipe = empty_base(config, family, dtype)
    config = resolve_defaults(config, family, pipe, accelerator.mixed_precision)
    check_controls_of_base(config, family, pipe, [*images, *held_out])
    models = {name: m for name, m in pipe.components.items() if isinstance(m, nn.Module)}
    base, blocks = {}, {}
    unread = _read_in_parts(config, family, dtype) if sharding is not None else ()
    sharded = {*unread, family.denoiser} if sharding is not None else set()
    for name, model in models.items():
        surplus = quantize_empty(config, family, name, model, dtype)
        base[name] = _base_row(name, model, surplus)
        streamed = {family.denoiser, *family.all_text_encoders} - sharded
        if name in streamed and can_be_streamed(model):
            share = 1 - surplus / bytes_of(tensors_of(model))
            blocks[name] = [int(size * share) for size in block_bytes(model)]
    gathered = {"prompts": 0, "steps": 0}
    for name in models.keys() & sharded:
        assert sharding is not None
        (label, size), visits = base[name], name != family.denoiser
        parts, whole_blocks = sharding.bytes_needed(
            models[name], accelerator.num_processes, visits=visits
        )
        buffers = size - bytes_of(models[name].parameters())
        on_cpu = sharding.offload and not visits
        where = "on the CPU" if on_cpu else f"in {accelerator.num_processes} parts"
        base[name] = f"{label}, {where}", parts + buffers
        gathered["prompts" if visits else "steps"] += whole_blocks
    with torch.device("meta"):
        trained = add_adapters(pipe, family, config)
    if config.gradient_checkpointing:
        for name in trained:
            checkpoint_gradients(models[name])
    adapters = tuple(_adapter_plan(name, models[name]) for name in trained)
    named = [[(n, p) for n, p in models[c].named_parameters() if p.requires_grad] for c in trained]
    optimizer = optimizer_state_bytes(
        config, named[0], [entry for group in named[1:] for entry in group], device
    )
    objective = FakeObjective(config, family, pipe)
    divisor = family.size_divisor(pipe)
    sets = sampled_sets(config, images, divisor)
    classes = [SampledSet(class_images, crop_plans(config, divisor))] if class_images else []
    measured = sampled_sets(held_out_config(config), held_out, divisor)
    data = FakeData(config, family, pipe, [*sets, *classes, *measured], accelerator)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for model in models.values():
                materialize(model, device)
            made = data.encode(pipe)
            made["steps"], gradients = measure_step(config, family, pipe, trained, data, objective)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise CannotPlan(
            [
                f"--dry_run: a model of this base depends on values that need its weights "
                f"({error}), so the run cannot be planned. Leave out --dry_run"
            ]
        ) from error

    apart = apart or device.type != "cpu"
    on_cpu = not apart  # models that leave another device go there
    there = {p: set(models) if on_cpu else _models_there(p, config, family, trained) for p in made}
    adapter = {p: sum(a.bytes for a in adapters if a.component in there[p]) for p in made}
    whole, processes = adapter["steps"], accelerator.num_processes
    # a denoiser that is read in parts is read after everything is encoded
    late = {family.denoiser} & {*unread}
    rows = [
        *(
            MemoryRow(
                name,
                label,
                {p: size for p in made if name in there[p] - (late if p != "steps" else set())},
            )
            for name, (label, size) in base.items()
        ),
        MemoryRow("adapter", "adapter, float32", adapter),
        MemoryRow("optimizer", optimizer_label(config.optimizer), {"steps": optimizer}),
    ]
    if sharding is not None:
        there_at_once = {phase: size for phase, size in gathered.items() if phase in made}
        rows.append(MemoryRow("gathered", "blocks gathered at once", there_at_once))
    if config.use_ema:
        rows.append(MemoryRow("ema", "average of the adapter (EMA)", {"steps": whole}))
    if processes > 1:  # DDP gathers gradients in its own buckets
        label = "gradients exchanged between processes"
        rows.append(MemoryRow("exchange", label, {"steps": whole}))
    if on_cpu:
        label = "encoded images and prompts"
        rows.append(MemoryRow("cached", label, dict.fromkeys(made, data.cached)))
    rows.append(MemoryRow("activations", "activations", made))
    rows.append(MemoryRow("gradients", "gradients at the peak", {"steps": gradients}))
    samples = config.train_batch_size * config.gradient_accumulation_steps * processes
    stream = TrainingSet(sets, config.seed, batch_size=config.train_batch_size)
    epoch = math.ceil(len(stream) / samples)  # including repeats that pad aspect-ratio buckets
    return Plan(
        config=config,
        family=family.name,
        device=device.type,
        processes=processes,
        images=len(images),
        sets=tuple(described_sets(config, images)),
        masks=sum(image.mask is not None for image in images),
        class_images=existing_class_images(config),
        held_out=len(held_out),
        image_size=largest_size([*sets, *classes]),
        rows=config.train_batch_size * (2 if config.with_prior_preservation else 1),
        steps=config.max_train_steps or config.num_train_epochs * epoch,
        adapters=adapters,
        phases=tuple(made),
        memory=tuple(rows),
        gradients=whole,
        cached=data.cached,
        denoiser=family.denoiser,
        blocks=blocks,
        apart=apart,
        controls=tuple((int(height), int(width)) for _, height, width in data.controls),
        reduces_controls=not family.control_count(pipe).aligned,
    )


def _read_in_parts(
    config: TrainingConfig, family: ModelFamily, dtype: torch.dtype
) -> Sequence[str]:
    """Return the components of which each process only reads its part, if the base is sharded.

    Others are loaded whole: text encoders stay so, and the denoiser is divided later.
    """
    names = parts_to_shard(config, family)
    if not Path(config.pretrained_model_name_or_path).exists():
        return names  # weights are not downloaded for a plan
    whole = unread_models(config, family, names, dtype).whole
    return [name for name in names if name not in whole]


def _models_there(
    phase: str, config: TrainingConfig, family: ModelFamily, trained: Sequence[str]
) -> set[str]:
    """Return the models that a run keeps on a device other than the CPU in a phase."""
    encoders = set(family.all_text_encoders)
    if phase != "steps":
        return {"vae"} if phase == "pictures" else encoders
    stay = encoders if config.train_text_encoder else set()
    return {*trained, *stay, *(() if config.cache_latents else ("vae",))}


def _base_row(name: str, model: nn.Module, surplus: int) -> tuple[str, int]:
    """Return a label with parameters and their most common dtype, and bytes minus ``surplus``."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        counts[parameter.dtype] += parameter.numel()
    dtype = str(counts.most_common(1)[0][0]).removeprefix("torch.")
    label = f"{name}, {counts.total() / 1e6:,.1f} M parameters, {dtype}"
    size = bytes_of(tensors_of(model)) - surplus
    if size < sum(parameter.nbytes for parameter in model.parameters()):
        label += ", quantized"
    return label, size


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
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return AdapterPlan(component, sum(p.numel() for p in trained), bytes_of(trained), layers)


def optimizer_label(optimizer: str) -> str:
    """Return the label for the state of an optimizer."""
    return f"optimizer state, {_OPTIMIZERS.get(optimizer, optimizer)}"
