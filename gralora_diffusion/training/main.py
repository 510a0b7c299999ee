"""The trainer as a program, with an exit code and error messages instead of tracebacks."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Sequence

from safetensors import SafetensorError

from gralora_diffusion.base_models.optional_libraries import LIBRARIES, leave_out_unused
from gralora_diffusion.io.errors import CheckpointError, ConfigError
from gralora_diffusion.io.process import (
    are_several,
    lasting_imports,
    log_to_terminal,
    own_process,
    print_safely,
    quiet_libraries,
)
from gralora_diffusion.io.stop_signals import StopSignals
from gralora_diffusion.training.checkpoints.store import CheckpointStore
from gralora_diffusion.training.checks.options import read_and_check
from gralora_diffusion.training.config.training_config import TrainingConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Train with the options of the command line.

    The exit code is 2 for wrong options and 1 for a failed training. Once the steps have begun, the
    first Ctrl-C, SIGTERM or SIGHUP saves the run and ends it with exit code 0.
    """
    if argv is None:
        own_process()
    first_process = os.environ.get("RANK", "0") == "0"
    log_to_terminal()
    # the first process reports for all
    level = logging.INFO if first_process else logging.ERROR
    logging.getLogger("gralora_diffusion").setLevel(level)
    try:
        # before imports, which take seconds
        config, parsed = read_and_check(argv, together=are_several())
    except ConfigError as error:
        _exit(str(error) if first_process else "", 2)
    _leave_out_unused(config)
    try:
        with quiet_libraries(), StopSignals() as signals:
            _train(config, first_process, signals)
    except ConfigError as error:
        problems = parsed.located(error.problems)
        _exit(str(ConfigError(problems)) if first_process else "", 2)
    except KeyboardInterrupt:
        _exit(f"interrupted. {_how_to_go_on(config)}", 130)


def _leave_out_unused(config: TrainingConfig) -> None:
    needed = {"bitsandbytes"} if config.optimizer == "adamw8bit" else set()
    if config.quantizes:
        needed |= {*LIBRARIES}
    if config.device_memory:  # whose answer may be a quantized base
        needed.add("torchao")
    bases = (config.pretrained_model_name_or_path, config.base_config)
    leave_out_unused(bases, needed, config.revision, config.cache_dir)


def _how_to_go_on(config: TrainingConfig) -> str:
    if CheckpointStore(config.output_dir).list():
        return "Resume with --resume_from_checkpoint latest."
    return (
        f"No checkpoint was written yet (--checkpointing_steps is {config.checkpointing_steps}), "
        "so the same command starts from the beginning."
    )


def _train(config: TrainingConfig, first_process: bool, signals: StopSignals) -> None:
    with lasting_imports():
        from gralora_diffusion.io.errors import DataError
        from gralora_diffusion.training.optimization.step import TrainingDiverged
        from gralora_diffusion.training.runtime.agreement import OtherProcessFailed

        from .run import train

    try:
        train(config, signals)
    except DataError as error:
        _exit(str(error) if first_process else "", 2)
    except OtherProcessFailed as error:
        # once on each machine
        _exit(str(error) if os.environ.get("LOCAL_RANK", "0") == "0" else "", 1)
    except (CheckpointError, TrainingDiverged) as error:
        _exit(str(error), 1)
    except (OSError, SafetensorError) as error:
        if not _disk_is_full(error):
            raise
        _exit(
            f"{error}. The training since the last checkpoint is lost. Free some space. "
            f"{_how_to_go_on(config)}",
            1,
        )
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        from .dry_run.memory_check import memory_advice

        first_line = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        _exit(f"out of memory: {first_line}. {memory_advice(config)}. {_how_to_go_on(config)}", 1)


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    # the CPU's allocator raises a plain RuntimeError
    texts = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        text in str(error).lower() for text in texts
    )


def _disk_is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return os.strerror(errno.ENOSPC) in str(error)


def _exit(message: str, code: int) -> None:
    if message:
        print_safely(f"error: {message}", error=True)
    sys.exit(code)
