"""Keep libraries for quantization from being imported by a command that does not quantize.

diffusers, transformers and PEFT import bitsandbytes and torchao wherever they are installed, which
takes seconds and prints warnings about kernels for other machines.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gralora_diffusion.io import process
from gralora_diffusion.io.regular_files import read_regular

LIBRARIES = ("bitsandbytes", "torchao")
#: Bytes of a model's config at most.
_MOST_BYTES = 1 << 20


def leave_out_unused(
    bases: Iterable[str | None],
    needed: Iterable[str] = (),
    revision: str | None = None,
    cache_dir: str | None = None,
) -> None:
    """Make the rest of the process behave as if ``LIBRARIES`` were not installed.

    Nothing happens if a base may be quantized, or if the process is not that of a command.

    Args:
        bases: folders, files and Hub ids of what is loaded.
        needed: the libraries that the options need.
    """
    sources = [base for base in bases if base]
    if not process.is_a_command or any(
        _may_be_quantized(base, revision, cache_dir) for base in sources
    ):
        return
    modules: dict[str, Any] = sys.modules
    for name in LIBRARIES:
        if name not in needed:
            modules.setdefault(name, None)  # Python's own mark of a module that is not there


@contextmanager
def left_out() -> Iterator[None]:
    """Inside, ``LIBRARIES`` that are not imported yet behave as if they were not installed.

    For imports of libraries that would import them, in a process that never quantizes itself.
    """
    modules: dict[str, Any] = sys.modules
    added = [name for name in LIBRARIES if name not in modules]
    modules.update(dict.fromkeys(added))
    try:
        yield
    finally:
        for name in added:
            del modules[name]


def _may_be_quantized(source: str, revision: str | None, cache_dir: str | None) -> bool:
    """Whether a model in a folder or in the Hub's cache has a quantization, or is not known yet."""
    path = Path(source).expanduser()
    if path.is_file():
        return False  # single files that are quantized are refused
    if not path.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(source, "model_index.json", cache_dir, revision)
        except (HFValidationError, OSError):
            return True
        if not isinstance(found, str):
            return True  # its configs will be downloaded
        path = Path(found).parent
    try:
        configs = [read_regular(file, _MOST_BYTES) for file in path.glob("*/config.json")]
    except OSError:
        return True
    return any(b'"quantization_config"' in config for config in configs)
