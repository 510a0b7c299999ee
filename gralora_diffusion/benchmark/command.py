"""``gralora benchmark``, with an exit code and error messages instead of tracebacks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from gralora_diffusion.base_models.optional_libraries import LIBRARIES, leave_out_unused
from gralora_diffusion.io.errors import ConfigError, DataError
from gralora_diffusion.io.process import log_to_terminal, print_safely
from gralora_diffusion.io.staging import OutputError
from gralora_diffusion.training.config.training_config import TrainingConfig

from .run_config import parse_settings


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with the options of the command line.

    The exit code is 2 for wrong options or data, and 1 if a trial, the disk or the device failed.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of processes that are refused
    log_to_terminal()
    logging.getLogger("gralora_diffusion").setLevel(logging.INFO if first else logging.ERROR)
    try:
        settings = parse_settings(argv)
        settings.check()  # before imports, which take seconds
    except ConfigError as error:
        if first:
            print_safely(f"error: {error}", error=True)
        sys.exit(2)
    leave_out_unused_by(settings.training)
    from .main import DeviceBroken, benchmark

    try:
        failed = benchmark(settings)
    except (ConfigError, DataError, OutputError) as error:
        if first:
            print_safely(f"error: {error}", error=True)
        sys.exit(2)
    except OSError as error:
        print_safely(f"error: {error}. Run the same command again to resume.", error=True)
        sys.exit(1)
    except DeviceBroken as error:
        print_safely(f"error: {error}.", error=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print_safely("interrupted. Run the same command again to resume.", error=True)
        sys.exit(130)
    if failed:
        if first:
            advice = "The report says why. Give --retry_failed to repeat them"
            print_safely(f"error: failed trials: {failed}. {advice}", error=True)
        sys.exit(1)


def leave_out_unused_by(training: TrainingConfig) -> None:
    """Keep libraries from being imported that these options do not need."""
    needed = {"bitsandbytes"} if training.optimizer == "adamw8bit" else set()
    if training.quantizes:
        needed |= {*LIBRARIES}
    leave_out_unused([training.pretrained_model_name_or_path], needed)
