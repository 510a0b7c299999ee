"""Which options make a run fit into a given memory: ``--dry_run --device_memory 8GiB``.

Each trial is a plan. Options that cost little come first, and those that change the result last.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from gralora_diffusion.training.config.training_config import TrainingConfig

from .memory_check import WARN, fitted
from .plan import Plan

_GIB = 2**30
#: Memory of cards that are sold, in GiB.
_CARDS = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 141, 180)


@dataclass(frozen=True)
class Fit:
    """A run that needs less memory.

    Attributes:
        options: what to give besides the run's own options; empty if nothing is needed.
        plan: the run's plan with them.
    """

    options: tuple[str, ...]
    plan: Plan

    @property
    def peak(self) -> int:
        """The most bytes of any phase."""
        return max(map(self.plan.peak, self.plan.phases))


def find_fit(
    config: TrainingConfig,
    plan_of: Callable[[TrainingConfig], Plan],
    size: int,
    *,
    streams: bool = True,
) -> tuple[Fit | None, Fit]:
    """Return the first options with which a run fits into a card, and those for the smallest one.

    Args:
        plan_of: plans a run with nothing streamed.
        size: bytes of the card.
        streams: whether the denoiser can be streamed in this run.
    """
    most = int(WARN * size)
    whole: list[Fit] = []
    for changes, options in _stages(config):
        fit = Fit(options, plan_of(replace(config, **changes)))
        if fit.peak <= most and not changes.get("quantization"):
            return fit, _smallest([fit], streams)
        whole.append(fit)
    tried = [_streamed(fit, most, streams) for fit in whole]
    return next((fit for fit in tried if fit.peak <= most), None), _smallest(whole, streams)


def smallest_card(fit: Fit) -> int:
    """Return the memory in GiB of the smallest card that a run fits into."""
    return next((c for c in _CARDS if fit.peak <= WARN * c * _GIB), ceil(fit.peak / WARN / _GIB))


def format_fit(size: int, found: Fit | None, smallest: Fit) -> str:
    """Return what was found as text."""
    card = f"{size / _GIB:.3g} GiB"
    if found is None:
        when = max(smallest.plan.phases, key=smallest.plan.peak)
        names = {"pictures": "encoding images", "prompts": "encoding prompts", "steps": "a step"}
        text = (
            f"No options make this run fit into {card}, since {names[when]} takes too much. A "
            f"lower --resolution (it is {smallest.plan.config.resolution}) or fewer adapted layers "
            "need less."
        )
    elif found.options:
        text = f"To fit into {card}, give {' '.join(found.options)}. {_costs(found)}"
    else:
        text = f"The run fits into {card} as it is. {_costs(found)}"
    given = " ".join(smallest.options) or "the options as they are"
    return (
        f"{text}\nThe smallest card for this run has {smallest_card(smallest)} GiB, with {given} "
        f"({smallest.peak / _GIB:,.2f} GiB)."
    )


def _costs(fit: Fit) -> str:
    text = f"It needs about {fit.peak / _GIB:,.2f} GiB at the peak"
    if fit.plan.copied:
        text += f" and copies {fit.plan.copied / _GIB:,.1f} GiB to the GPU in a step"
    return f"{text}."


def _stages(config: TrainingConfig) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """Yield options that need less and less memory, as changes of the config and as flags."""
    changes: dict[str, Any] = {}
    flags: list[str] = []
    yield changes, ()
    if not (config.gradient_checkpointing and config.cache_latents):
        if not config.gradient_checkpointing:
            flags.append("--gradient_checkpointing")
        if not config.cache_latents:
            flags.append("--cache_latents true")
        changes = {"gradient_checkpointing": True, "cache_latents": True}
        yield changes, tuple(flags)
    if config.train_batch_size > 1:
        steps = config.train_batch_size * config.gradient_accumulation_steps
        flags.append(f"--train_batch_size 1 --gradient_accumulation_steps {steps}")
        changes = changes | {"train_batch_size": 1, "gradient_accumulation_steps": steps}
        yield changes, tuple(flags)
    base = Path(config.pretrained_model_name_or_path)
    if not config.quantizes and not base.is_file() and importlib.util.find_spec("torchao"):
        flags.append("--quantization torchao-int8")
        yield changes | {"quantization": "torchao-int8"}, tuple(flags)


def _streamed(fit: Fit, most: int, streams: bool) -> Fit:
    """Return a fit with as little streamed as brings it below ``most`` bytes, if that can be."""
    plan = fitted(fit.plan, most, denoiser=streams)
    streaming = plan.offloading.denoiser
    if streaming is None:
        given = ("--offload_base auto",) if plan.offloading.encoders else ()
    else:
        kept = ceil(streaming.kept * 1000) / 1000
        given = (f"--offload_base {kept:g}" if kept else "--offload_base blocks",)
    return Fit((*fit.options, *given), plan)


def _smallest(fits: list[Fit], streams: bool) -> Fit:
    fits = [*fits, *(_streamed(fit, 0, streams) for fit in fits)]
    return min(fits, key=smallest_card)  # of those for one card, the one with fewest options
