"""The trainer as a program: options in, exit code out, errors as text without a traceback."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Sequence

from safetensors import SafetensorError

from gralora_diffusion.io.errors import CheckpointError, ConfigError
from gralora_diffusion.io.process import are_several, log_to_terminal, print_safely, quiet_libraries
from gralora_diffusion.training.checks.options import validate
from gralora_diffusion.training.config.training_config import TrainingConfig, parse_config


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says; exits with 2 for wrong options, 1 for a failed training."""
    first_process = os.environ.get("RANK", "0") == "0"
    log_to_terminal()
    # what concerns all processes is told by the first
    level = logging.INFO if first_process else logging.ERROR
    logging.getLogger("gralora_diffusion").setLevel(level)
    try:
        config = parse_config(argv)
        if not are_several():  # one of several tells the others of it
            validate(config)  # before seconds go by with imports
        with quiet_libraries():
            _train(config, first_process)
    except ConfigError as error:
        _exit(str(error) if first_process else "", 2)
    except KeyboardInterrupt:
        _exit("interrupted. Go on with --resume_from_checkpoint latest.", 130)


def _train(config: TrainingConfig, first_process: bool) -> None:
    from gralora_diffusion.io.errors import DataError
    from gralora_diffusion.training.optimization.step import TrainingDiverged
    from gralora_diffusion.training.runtime.agreement import OtherProcessFailed

    from .loop import train

    try:
        train(config)
    except DataError as error:
        _exit(str(error) if first_process else "", 2)
    except OtherProcessFailed as error:
        # on each machine once, and once only if it was on this one
        _exit(str(error) if os.environ.get("LOCAL_RANK", "0") == "0" else "", 1)
    except (CheckpointError, TrainingDiverged) as error:
        _exit(str(error), 1)
    except (OSError, SafetensorError) as error:
        if not _disk_is_full(error):
            raise
        _exit(
            f"{error}. What was trained since the last checkpoint is lost. Make room, and go on "
            "with --resume_from_checkpoint latest.",
            1,
        )


def _disk_is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return os.strerror(errno.ENOSPC) in str(error)


def _exit(message: str, code: int) -> None:
    if message:
        print_safely(f"error: {message}", error=True)
    sys.exit(code)
