"""``gralora benchmark``, with an exit code and error messages instead of tracebacks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from gralora_diffusion.io.errors import ConfigError, DataError
from gralora_diffusion.io.process import lasting_imports, log_to_terminal, print_safely
from gralora_diffusion.io.staging import OutputError

from .run_config import parse_settings
from .settings import leave_out_unused_by


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
    leave_out_unused_by(settings)
    with lasting_imports():
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
