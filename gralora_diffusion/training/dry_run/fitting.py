"""Which options make a run fit into a given memory: ``--dry_run --device_memory 8GiB``.

Each trial is a plan. Options that only cost time come first: checkpointing, smaller passes and
streamed blocks. Those that store optimizer states and the base in 8 bits come next. Smaller images
come last, because the adapter learns something else from them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Collection, Iterator
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
#: Pixels per side of images, and of control images as an area, that are tried.
_SIDES, _CONTROL_SIDES = (768, 640, 512, 384, 256), (768, 512, 384, 256)


@dataclass(frozen=True)
class Fit:
    """A run that needs less memory.

    Attributes:
        options: what to give besides the run's own options; empty if nothing is needed.
        plan: the run's plan with them.
        smaller: those of the options that make images smaller, which changes the result.
    """

    options: tuple[str, ...]
    plan: Plan
    smaller: tuple[str, ...] = ()

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
    eight_bits: Collection[str] | None = None,
) -> tuple[Fit | None, Fit]:
    """Return the first options with which a run fits into a card, and those for the smallest one.

    The smallest card is the one for images of the same size.

    Args:
        plan_of: plans a run with nothing streamed.
        size: bytes of the card.
        streams: whether the denoiser can be streamed in this run.
        eight_bits: libraries for 8 bits that may be used, of bitsandbytes and torchao; by default
            those that are installed.
    """
    if eight_bits is None:
        names = ("bitsandbytes", "torchao")
        eight_bits = {name for name in names if importlib.util.find_spec(name)}
    most = int(WARN * size)
    tried: list[Fit] = []
    changes: list[dict[str, Any]] = [{}]  # of those that were tried
    rounding = _rounding_stages(config, eight_bits)
    for stages in (_neutral_stages(config), rounding):
        for more, options in stages:
            changes.append(changes[-1] | more)
            before = tried[-1].options if tried else ()
            fit = Fit((*before, *options), plan_of(replace(config, **changes[-1])))
            # what is stored in 8 bits is only worth its rounding if streaming is not enough
            if fit.peak <= most and stages is not rounding:
                return fit, _smallest([fit], streams)
            tried.append(fit)
    for fit in tried:
        if (streamed := _streamed(fit, most, streams)).peak <= most:
            return streamed, _smallest(tried, streams)
    peaks = [_streamed(fit, 0, streams).peak for fit in tried]
    best = peaks.index(min(peaks))
    smaller = _smaller(config, changes[best + 1], tried[best], plan_of, most, streams)
    return smaller, _smallest(tried, streams)


def _smaller(
    config: TrainingConfig,
    changes: dict[str, Any],
    fit: Fit,
    plan_of: Callable[[TrainingConfig], Plan],
    most: int,
    streams: bool,
) -> Fit | None:
    """Return the first fit with smaller images, besides the other changes."""
    for name, side in _smaller_sides(fit.plan):
        changes = changes | {name: side}
        kept = tuple(option for option in fit.smaller if not option.startswith(f"--{name} "))
        smaller = (*kept, f"--{name} {side}")
        others = fit.options[: len(fit.options) - len(fit.smaller)]
        fit = Fit((*others, *smaller), plan_of(replace(config, **changes)), smaller)
        if (streamed := _streamed(fit, most, streams)).peak <= most:
            return streamed
    return None


def _smaller_sides(plan: Plan) -> Iterator[tuple[str, int]]:
    """Yield options for sizes of images and their values, in the order in which they are tried."""
    config = plan.config
    if plan.controls and plan.reduces_controls:
        largest = math.sqrt(max(height * width for height, width in plan.controls))
        for side in _CONTROL_SIDES:
            if side < min(largest, config.control_resolution or largest):
                yield "control_resolution", side
    if config.resolution and not config.aspect_ratio_buckets:
        for side in _SIDES:
            if side < config.resolution:
                yield "resolution", side


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
            f"No options make this run fit into {card}, since {names[when]} takes too much. Fewer "
            "adapted layers or a smaller base need less."
        )
    elif found.options:
        text = f"To fit into {card}, give {' '.join(found.options)}. {_costs(found)}"
        if found.smaller:
            text += (
                f" This changes the result: with {' '.join(found.smaller)}, the adapter learns "
                "from smaller images. No other options suffice."
            )
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


Stage = tuple[dict[str, Any], tuple[str, ...]]


def _neutral_stages(config: TrainingConfig) -> Iterator[Stage]:
    """Yield changes of the config, and their flags, that only cost time; each adds to the last."""
    yield {}, ()
    if not (config.gradient_checkpointing and config.cache_latents):
        flags = [] if config.gradient_checkpointing else ["--gradient_checkpointing"]
        flags += [] if config.cache_latents else ["--cache_latents true"]
        yield {"gradient_checkpointing": True, "cache_latents": True}, tuple(flags)
    if config.train_batch_size > 1:
        steps = config.train_batch_size * config.gradient_accumulation_steps
        yield (
            {"train_batch_size": 1, "gradient_accumulation_steps": steps},
            (f"--train_batch_size 1 --gradient_accumulation_steps {steps}",),
        )


def _rounding_stages(config: TrainingConfig, libraries: Collection[str]) -> Iterator[Stage]:
    """Yield those that round what is stored to 8 bits."""
    if config.optimizer == "adamw" and "bitsandbytes" in libraries:
        yield {"optimizer": "adamw8bit"}, ("--optimizer adamw8bit",)
    base = Path(config.pretrained_model_name_or_path)
    if not config.quantizes and not base.is_file() and "torchao" in libraries:
        yield {"quantization": "torchao-int8"}, ("--quantization torchao-int8",)


def _streamed(fit: Fit, most: int, streams: bool) -> Fit:
    """Return a fit with as little streamed as brings it below ``most`` bytes, if that can be."""
    plan = fitted(fit.plan, most, denoiser=streams)
    streaming = plan.offloading.denoiser
    if streaming is None:
        given = ("--offload_base auto",) if plan.offloading.encoders else ()
    else:
        kept = ceil(streaming.kept * 1000) / 1000
        given = (f"--offload_base {kept:g}" if kept else "--offload_base blocks",)
    return Fit((*fit.options, *given), plan, fit.smaller)


def _smallest(fits: list[Fit], streams: bool) -> Fit:
    fits = [*fits, *(_streamed(fit, 0, streams) for fit in fits)]
    return min(fits, key=smallest_card)  # of those for one card, the one with fewest options
