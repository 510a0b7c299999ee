"""What a command does to its process while it works: quiet libraries, and an orderly end."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from .unfinished import tidy_all

#: Loggers that warn of what is not used here, such as kernels for other machines and torchvision,
#: or of what was asked for, such as a LoRA that leaves the text encoder alone.
_OF_NO_USE = (
    "bitsandbytes.backends.cpu.ops",
    "torchao",
    "torch.utils._pytree",
    "diffusers.quantizers.torchao.torchao_quantizer",
    "diffusers.loaders.lora_base",
    "diffusers.loaders.peft",
    "transformers.utils.import_utils",
)
#: Signals by which others end a process; Windows has not all of them.
_ENDS = ("SIGTERM", "SIGHUP")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, they show no bars for loading and say nothing of ``_OF_NO_USE``; errors are shown.

    Bars of downloads stay. Afterwards all is as it was.
    """
    with ExitStack() as stack:
        for name in _OF_NO_USE:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        # only now, for to import them is to hear from them
        from diffusers.utils import logging as of_diffusers
        from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
        from transformers.utils import logging as of_transformers

        downloads_are_shown = not are_progress_bars_disabled()
        for library in (of_diffusers, of_transformers):
            if library.is_progress_bar_enabled():
                stack.callback(library.enable_progress_bar)
                library.disable_progress_bar()
        if downloads_are_shown:  # transformers' bars and those of downloads go together
            enable_progress_bars()
        yield


@contextmanager
def tidied_when_ended() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP take away what is unfinished before they end the process.

    That is done where they are met, and nothing is raised: an exception between any two steps of
    the main thread may leave a lock held, for which the threads that write would wait for ever.
    Ctrl-C raises KeyboardInterrupt as ever.
    """

    def end(number: int, frame: FrameType | None) -> None:
        tidy_all()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    handlers = {}
    if threading.current_thread() is threading.main_thread():  # no other one has handlers
        numbers = [getattr(signal, name) for name in _ENDS if hasattr(signal, name)]
        # what nohup has ignored stays ignored
        numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        handlers = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
