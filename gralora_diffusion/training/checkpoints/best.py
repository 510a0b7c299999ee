"""The adapter of the best measurement: beside the run's own, and in each of its checkpoints.

A checkpoint has a copy, because a resumed run goes back to the best that was known at its step.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import suppress
from pathlib import Path

from gralora_diffusion.adapters.adapter_file import WEIGHTS_NAME, Adapter, save_adapter
from gralora_diffusion.io.file_names import BEST_NAME
from gralora_diffusion.io.tensor_files import replacing

logger = logging.getLogger(__name__)

#: The copy in a checkpoint.
_COPY_NAME = "best.safetensors"


def best_path(output_dir: str | Path) -> Path:
    """Return the path of the best adapter of a run."""
    return Path(output_dir) / BEST_NAME / WEIGHTS_NAME


def keep_best(output_dir: str | Path, adapter: Adapter) -> None:
    """Write the best adapter so far. One process does this for all."""
    save_adapter(adapter, best_path(output_dir))


def copy_best(output_dir: str | Path, checkpoint: Path) -> None:
    """Copy the best adapter into a checkpoint that is being written."""
    path = best_path(output_dir)
    if path.is_file():
        shutil.copyfile(path, checkpoint / _COPY_NAME)
    else:
        logger.warning("%s was removed, so that this checkpoint has no copy of it", path)


def restore_best(output_dir: str | Path, checkpoint: Path | None) -> None:
    """Go back to the best adapter of a checkpoint, or to none."""
    path, copy = best_path(output_dir), checkpoint and checkpoint / _COPY_NAME
    if copy is not None and copy.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            shutil.copyfile(copy, temporary)
    else:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # there is none, or it has other files
            path.parent.rmdir()
