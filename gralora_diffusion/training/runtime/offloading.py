"""Which parts of a frozen base are streamed from the CPU's memory: ``--offload_base``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from accelerate import Accelerator

from gralora_diffusion.base_models.streaming import Streaming
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.config.training_config import TrainingConfig

from .sharding import Sharding

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Offloading:
    """What is streamed.

    Attributes:
        denoiser: how the denoiser is, if it is.
        encoders: whether text encoders are, while they encode. Trained ones never are.
    """

    denoiser: Streaming | None = None
    encoders: bool = False


#: Everything is whole on the device.
NOTHING = Offloading()


def requested_offloading(config: TrainingConfig) -> Offloading:
    """Return what the options ask for; with ``auto``, nothing yet."""
    if config.kept_blocks is None:
        return NOTHING
    return Offloading(Streaming(config.kept_blocks), encoders=not config.train_text_encoder)


def check_offloading(
    config: TrainingConfig, accelerator: Accelerator, sharding: Sharding | None
) -> None:
    """Check that the base can be streamed in this run, if the options ask for it.

    Raises:
        ConfigError: an option does not work with it.
    """
    if config.kept_blocks is not None:
        flag = f"--offload_base {config.offload_base}"
        problems = [f"{flag} {problem}" for problem in obstacles(config, sharding)]
        if problems:
            raise ConfigError(problems)
        if accelerator.device.type == "cpu" and not config.dry_run:
            logger.warning("%s takes time and saves no memory, since there is no GPU", flag)


def obstacles(config: TrainingConfig, sharding: Sharding | None) -> Iterator[str]:
    """Yield why the base cannot be streamed, as sentences that go on after the option's name."""
    if sharding is not None:
        yield (
            "cannot be used with FSDP, which has its own option for this. Leave it out, and give "
            "`accelerate launch --fsdp_offload_params true`"
        )
    if config.torch_compile:
        yield (
            "cannot be used with --torch_compile, because compiled blocks keep the addresses of "
            "their weights. Leave out one of the two"
        )
    if (config.quantization or "bnb").startswith("bnb") and config.quantizes:
        yield (
            "cannot be used with bitsandbytes, which keeps parts of its weights on the GPU. Give "
            "--quantization torchao-int8, or leave out one of the two"
        )
