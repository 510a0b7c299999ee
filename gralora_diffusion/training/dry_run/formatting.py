"""A plan as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.training.optimization.masked_loss import MaskedLoss

from .plan import AdapterPlan, Plan

#: Bytes that a GPU reads from the CPU's memory in a second, of the 31.5e9 of PCIe 4.0 x16.
BANDWIDTH = 20 * 2**30
#: Up to this many layers that differ from most are named.
MAX_NAMES = 5


def format_plan(plan: Plan) -> str:
    """Return the plan as it is printed."""
    config = plan.config
    height, width = plan.image_size
    samples = config.train_batch_size * config.gradient_accumulation_steps * plan.processes
    facts = [
        ("base", f"{config.pretrained_model_name_or_path} ({plan.family})"),
        ("device", f"{plan.device}, mixed precision {config.mixed_precision}"),
        ("images", f"{plan.images}, trained at up to {width} x {height} pixels"),
        *((f"set {number}", text) for number, text in enumerate(plan.sets, 1)),
        ("steps", f"{plan.steps} of {samples} samples, {_passes(plan)}"),
    ]
    if config.gralora_k > 1 and config.learning_rate and config.optimizer != "prodigy":
        # the norm of the update grows about sqrt(k) times slower than a LoRA's
        lora = config.learning_rate / math.sqrt(config.gralora_k)
        text = f"{config.learning_rate:g}, about as fast as a LoRA of this rank at {lora:.2g}"
        facts.append(("rate", text))
    if config.masked_loss:
        facts.insert(3, ("masks", f"for {plan.masks} images; {MaskedLoss.of(config)}"))
    if plan.controls:
        shapes = ", ".join(f"{across} x {down}" for down, across in plan.controls)
        facts.insert(3, ("edits", f"control images of up to {shapes} pixels"))
    if config.with_prior_preservation and config.prior_source == "images":
        missing = max(0, config.num_class_images - plan.class_images)
        text = f"{plan.class_images} found" + (f", {missing} to generate" if missing else "")
        facts.insert(3, ("class images", text))
    if plan.held_out:
        facts.append(("held out", _measurements(plan)))
    layers = [line for adapter in plan.adapters for line in _adapter_lines(adapter)]
    return "\n".join(
        [
            "Plan of the run. No weights were loaded and nothing was written.",
            "",
            *_columns(facts, "ll"),
            "",
            "Layers to adapt",
            *layers,
            f"  trained parameters: {plan.trained_parameters:,}; "
            f"adapter file: {plan.file / 1e6:,.{3 if plan.file < 1e6 else 1}f} MB",
            "",
            *_memory(plan),
        ]
    )


def _passes(plan: Plan) -> str:
    config = plan.config
    text = f"{plan.rows} rows per pass"
    if config.with_prior_preservation:
        text += " including the prior's"
    if config.gradient_accumulation_steps > 1:
        text += f", {config.gradient_accumulation_steps} passes per step"
    if plan.processes > 1:
        text += f", {plan.processes} processes"
    return text + (", gradient checkpointing" if config.gradient_checkpointing else "")


def _measurements(plan: Plan) -> str:
    config = plan.config
    trained = plan.steps * plan.rows * config.gradient_accumulation_steps * plan.processes
    return (
        f"{plan.held_out} images, measured {plan.measurements} times: "
        f"{plan.measurements * plan.measured_rows:,} rows forward, beside {trained:,} rows forward "
        "and backward in the steps"
    )


def _adapter_lines(adapter: AdapterPlan) -> list[str]:
    count = sum(len(names) for names in adapter.layers.values())
    (usual, _), *others = adapter.layers.items()
    numbers = f"{count} layers, {adapter.parameters:,} parameters"
    lines = [f"  {adapter.component}: {numbers}; {usual}"]
    for kind, names in others:
        lines.append(f"    but {kind} in {len(names)}: {first_few(names, MAX_NAMES)}")
    return lines


def _memory(plan: Plan) -> list[str]:
    peaks = [plan.peak(phase) for phase in plan.phases]
    unit, divisor = ("GiB", 2**30) if max(peaks) >= 2**30 else ("MiB", 2**20)

    def shown(count: int | None) -> str:
        return "" if count is None else f"{count / divisor:,.2f}"

    where = f"{plan.device} of each process" if plan.processes > 1 else plan.device
    heads = {"pictures": "encoding images", "prompts": "encoding prompts", "steps": "steps"}
    table = [(f"Memory in {unit} ({where})", *(heads[phase] for phase in plan.phases))]
    for row in plan.memory:
        label = f"  {row.label}"
        if row.name == "gradients":
            label += f" ({shown(plan.gradients)} at the end)"
        table.append((label, *(shown(row.bytes.get(phase)) for phase in plan.phases)))
    table.append(("  peak", *map(shown, peaks)))
    lines = _columns(table, "l" + "r" * len(peaks))
    if plan.copied:
        seconds = plan.copied / BANDWIDTH
        lines.append(
            f"blocks copied to the device: {shown(plan.copied)} per step, at least "
            f"{seconds:,.1f} s at {BANDWIDTH // 2**30} GiB/s, which is assumed (PCIe 4.0 x16)"
        )
    if plan.apart:
        lines.append(f"plus encoded images and prompts on the cpu: {shown(plan.cached)}")
    return lines


def _columns(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(alignment))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(row, widths, alignment, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
