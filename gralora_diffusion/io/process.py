"""Process-wide settings of a command: quiet libraries, safe terminal output, an orderly end."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import Any

from .cleanup_on_exit import clean_up_all
from .safe_text import TerminalFormatter, for_terminal

#: Loggers that warn about unused things, such as kernels for other machines and torchvision, or
#: about intended ones, such as a LoRA without layers in the text encoder.
_OF_NO_USE = (
    "bitsandbytes.backends.cpu.ops",
    "torchao",
    "torch.utils._pytree",
    "diffusers.quantizers.torchao.torchao_quantizer",
    "diffusers.loaders.lora_base",
    "diffusers.loaders.peft",
    "transformers.utils.import_utils",
)
#: Signals that ask a process to end; Windows does not have all of them.
_ENDS = ("SIGTERM", "SIGHUP")
#: Escape sequences for colors, which transformers puts into its messages.
_COLORS = re.compile(r"\x1b\[[0-9;]*m")
#: The standard library's formatting of warnings, before anything replaces it.
_format_warning = warnings.formatwarning


#: Whether this process exists for one command, so that its settings need not be undone. Only the
#: command line's own entry points set it.
is_a_command = False


def own_process() -> None:
    """Declare that this process exists for one command."""
    global is_a_command
    is_a_command = True


def compute_in_one_thread() -> None:
    """Keep numpy from starting threads, which cost more than they save on small matrices.

    Only a process of a command, before numpy is imported, is affected. The user's own settings are
    kept.
    """
    if is_a_command:
        for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
            os.environ.setdefault(name, "1")


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Inside, a command imports what it needs until it ends.

    torch, diffusers and transformers make about a million objects. Python's garbage collector
    would look at all of them several times while they are imported, which takes a third of the
    time, and then in each full collection, which takes up to a second. It leaves them out instead.
    Only a process of a command is affected.
    """
    if not (is_a_command and gc.isenabled()):
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def guard_terminal() -> None:
    """Remove control characters from warnings, log messages and tracebacks.

    This lasts until the process ends, because a traceback is printed after the command returns.
    """

    def format_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        return for_terminal(_format_warning(message, category, filename, lineno, line))

    def print_traceback(
        kind: type[BaseException], error: BaseException, where: TracebackType | None
    ) -> None:
        text = "".join(traceback.format_exception(kind, error, where))
        sys.stderr.write(for_terminal(text))

    warnings.formatwarning = format_warning
    if logging.getLogRecordFactory() is logging.LogRecord:  # another program's own factory stays
        logging.setLogRecordFactory(_safe_record)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(TerminalFormatter("%(message)s"))
    if sys.excepthook is sys.__excepthook__:  # another program's own hook stays
        sys.excepthook = print_traceback


def _safe_record(*args: Any, **options: Any) -> logging.LogRecord:
    """Return a log record for any handler: libraries have their own, and quote names from files."""
    record = logging.LogRecord(*args, **options)
    try:
        text = record.getMessage()
    except Exception:  # a message that does not fit its arguments: the handler reports it
        return record
    record.msg, record.args = for_terminal(_COLORS.sub("", text)), None
    return record


def log_to_terminal() -> None:
    """Guard the terminal, and print log records from WARNING on unless logging is set up."""
    guard_terminal()
    handler = logging.StreamHandler()
    handler.setFormatter(TerminalFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


def print_safely(text: object, error: bool = False) -> None:
    """Print text without control characters, to the standard error if it is an ``error``."""
    print(for_terminal(text), file=sys.stderr if error else sys.stdout)


def are_several() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, libraries show no bars for loading and no warnings of ``_OF_NO_USE``.

    Errors and bars for downloads are still shown. Afterwards the settings are restored.
    """
    with ExitStack() as stack:
        for name in _OF_NO_USE:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        with lasting_imports():  # here, because these imports already log warnings
            from diffusers.utils import logging as of_diffusers
            from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
            from transformers.utils import logging as of_transformers

        downloads_are_shown = not are_progress_bars_disabled()
        for library in (of_diffusers, of_transformers):
            if library.is_progress_bar_enabled():
                stack.callback(library.enable_progress_bar)
                library.disable_progress_bar()
        if downloads_are_shown:  # transformers' switch also affects the bars of downloads
            enable_progress_bars()
        yield


def end_by(number: int) -> None:
    """Remove partial outputs and end the process by a signal, as if nothing had handled it."""
    clean_up_all()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@contextmanager
def cleanup_on_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP remove partial outputs before they end the process.

    The handler does this itself instead of raising: an exception at any point of the main thread
    may leave a lock held, and threads that write would wait for it forever. Ctrl-C raises
    KeyboardInterrupt as usual.
    """

    def end(number: int, frame: FrameType | None) -> None:
        end_by(number)

    handlers = {}
    if threading.current_thread() is threading.main_thread():  # no other thread can set handlers
        numbers = [getattr(signal, name) for name in _ENDS if hasattr(signal, name)]
        # signals that nohup ignores stay ignored
        numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        handlers = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
