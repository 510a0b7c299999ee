"""Whether a run fits into the memory that there is, before anything is loaded."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from gralora_diffusion.base_models.folder import native_side
from gralora_diffusion.base_models.streaming import RING, Streaming
from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.buckets import listed_buckets
from gralora_diffusion.training.data.image_folder import Example
from gralora_diffusion.training.data.sets import by_set, sides
from gralora_diffusion.training.runtime.memory import DeviceMemory, device_memory
from gralora_diffusion.training.runtime.offloading import (
    NOTHING,
    Offloading,
    obstacles,
    requested_offloading,
)
from gralora_diffusion.training.runtime.sharding import Sharding

from .plan import CannotPlan, Plan, plan_run

logger = logging.getLogger(__name__)

#: Parts of the free memory above which a run is warned of, and of all memory above which it stops.
WARN, STOP = 0.9, 1.5
#: Bytes of activations per pixel of a batch that no supported model reaches without an adapter on
#: its VAE: FLUX.1 in fp32 without gradient checkpointing takes about this many.
_MOST_PER_PIXEL = 64 * 1024
#: A run whose upper bound is below this part of the free memory is not planned, to save the time.
_SURELY = 0.5
_GIB = 2**30


def check_memory(
    config: TrainingConfig,
    family: ModelFamily,
    images: Sequence[Example],
    class_images: Sequence[Example],
    accelerator: Accelerator,
    sharding: Sharding | None = None,
    *,
    held_out: Sequence[Example] = (),
) -> tuple[str, Offloading]:
    """Compare what a run needs at its peak with the memory that there is.

    Warns if little is left. A run that certainly fits is not planned.

    Returns:
        The comparison as text, and what is to be streamed: what the options ask for, or with
        ``auto`` no more than must be.

    Raises:
        ConfigError: the run needs far more memory than there is.
    """
    there, offloading = device_memory(accelerator.device), requested_offloading(config)
    if _upper_bound(config, family, images) < _SURELY * there.free:
        return f"far below the {_gib(there.free)} of free memory", offloading
    try:
        plan = plan_run(
            config, family, images, class_images, accelerator, sharding, held_out=held_out
        )
    except Exception as error:  # an estimate must not end a run that may well fit
        if isinstance(error, ConfigError) and not isinstance(error, CannotPlan):
            raise
        cause = error.__cause__ or error
        logger.warning("the memory that this run needs could not be estimated: %s", cause)
        return f"not estimated; {_gib(there.free)} free", offloading
    plan = with_offloading(plan, config, sharding, there.free)
    if problem := memory_problem(plan, there):
        raise ConfigError([problem])
    peak = max(map(plan.peak, plan.phases))
    if peak > WARN * there.free:
        logger.warning(
            "this run needs about %s of memory, but only %s is free. %s",
            _gib(peak),
            _gib(there.free),
            memory_advice(config),
        )
    text = f"about {_gib(peak)} at the peak; {_gib(there.free)} free"
    if plan.offloading != NOTHING:
        text += f"; {_streamed(plan)}"
    return text, plan.offloading


def with_offloading(
    plan: Plan, config: TrainingConfig, sharding: Sharding | None, free: int
) -> Plan:
    """Return a plan with what the options ask to stream, or with ``auto`` no more than must be."""
    if config.kept_blocks is not None:
        return plan.offloaded(requested_offloading(config))
    if config.offload_base != "auto" or not plan.apart:
        return plan
    return fitted(plan, int(WARN * free), denoiser=not any(obstacles(config, sharding)))


def fitted(plan: Plan, most: int, *, denoiser: bool = True) -> Plan:
    """Return a plan with as little streamed as brings each phase below ``most`` bytes.

    If it cannot be, everything is streamed that can be.

    Args:
        denoiser: whether the denoiser can be streamed; otherwise only text encoders are.
    """
    encoders = plan.peak("prompts") > most and not plan.config.train_text_encoder
    encoders = encoders and bool(plan.blocks.keys() - {plan.denoiser})
    candidates = [plan.offloaded(Offloading(None, encoders)) if encoders else plan]
    if denoiser and plan.denoiser in plan.blocks:
        count = len(plan.blocks[plan.denoiser])
        candidates += [
            plan.offloaded(Offloading(Streaming((count - streamed) / count), encoders))
            for streamed in range(RING + 1, count + 1)
        ]
    return next((c for c in candidates if c.peak("steps") <= most), candidates[-1])


def _streamed(plan: Plan) -> str:
    """Describe what is streamed."""
    parts = []
    if streaming := plan.offloading.denoiser:
        blocks = plan.blocks.get(plan.denoiser, [])
        count = streaming.bytes_needed(blocks).blocks
        parts.append(f"{count} of {len(blocks)} blocks of the {plan.denoiser}")
    if plan.offloading.encoders:
        parts.append("text encoders")
    return " and ".join(parts) + " streamed from the CPU's memory"


def memory_problem(plan: Plan, there: DeviceMemory) -> str | None:
    """Return why a run cannot fit into the memory of its device, or None if it may fit."""
    phase = max(plan.phases, key=plan.peak)
    peak = plan.peak(phase)
    if peak <= STOP * there.total:
        return None
    when = {"pictures": "encoding images", "prompts": "encoding prompts"}.get(phase, "a step")
    return (
        f"this run needs about {_gib(peak)} of memory for {when}, but {plan.device} has "
        f"{_gib(there.total)}. {memory_advice(plan.config)}"
    )


def memory_advice(config: TrainingConfig) -> str:
    """Return the options that would save memory and are not used yet, the best ones first."""
    ways = []
    if config.resolution:
        ways.append(f"a lower --resolution (it is {config.resolution})")
    if not config.gradient_checkpointing:
        ways.append("--gradient_checkpointing")
    if config.offload_base == "none" or config.kept_blocks:
        ways.append(f"--offload_base {'blocks' if config.kept_blocks else 'auto'}")
    if config.train_batch_size > 1:
        ways.append(
            f"--train_batch_size 1 --gradient_accumulation_steps "
            f"{config.train_batch_size * config.gradient_accumulation_steps}"
        )
    if config.mixed_precision in (None, "no"):
        ways.append("--mixed_precision bf16")
    if not config.quantizes:
        ways.append("--quantization")
    if config.train_text_encoder:
        ways.append("no --train_text_encoder")
    if not config.cache_latents:
        ways.append("--cache_latents true")
    if not ways:
        return "See --dry_run for what takes it"
    return f"To need less, give {', '.join(ways[:-1])}{' or ' * (len(ways) > 1)}{ways[-1]}. " + (
        "--dry_run shows what takes it"
    )


def _upper_bound(config: TrainingConfig, family: ModelFamily, images: Sequence[Example]) -> float:
    """Return bytes that the run certainly does not exceed; infinite if they are not known."""
    folder = Path(config.base_config or config.pretrained_model_name_or_path).expanduser()
    native = config.resolution or native_side(folder, family)
    if native is None:
        return math.inf
    rows = config.train_batch_size * (2 if config.with_prior_preservation else 1)
    sets = [own for _, own, _ in by_set(config, images)]
    most = max(_most_pixels(own, max(sides(own), default=native)) for own in [config, *sets])
    pixels = most * max(rows, 4)  # a margin for what does not grow with rows
    # weights of 8 bits may be loaded as 32
    return 4 * _bytes_of_weights(config) + pixels * _MOST_PER_PIXEL


def _most_pixels(config: TrainingConfig, side: int) -> int:
    """Return pixels that no image exceeds after it has been cropped."""
    if not config.use_aspect_ratio_buckets:
        return side * side
    sizes = listed_buckets(config.aspect_ratio_buckets)
    # the buckets that are not listed have about as many pixels as the square
    return max((height * width for height, width in sizes), default=2 * side * side)


def _bytes_of_weights(config: TrainingConfig) -> float:
    """Return bytes of all files that the base may be read from; infinite if one is not known."""
    base, rest = config.pretrained_model_name_or_path, config.base_config
    if Path(base).expanduser().is_file() and rest is None:
        return math.inf  # the rest is from the Hub
    total = 0
    for name in filter(None, (base, rest, config.pretrained_vae_model_name_or_path)):
        path = Path(name).expanduser()
        files = [path] if path.is_file() else list(path.rglob("*.safetensors"))
        if not files:
            return math.inf
        total += sum(file.stat().st_size for file in files)
    return total


def _gib(count: float) -> str:
    return f"{count / _GIB:,.1f} GiB" if count >= _GIB / 10 else f"{count / 2**20:,.0f} MiB"
