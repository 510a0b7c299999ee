"""Named tensors by key, in memory or in a folder that several processes fill and read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.io.tensor_files import write_safetensors

logger = logging.getLogger(__name__)


class TensorStore:
    """Named tensors by key, on the CPU.

    Without a folder, each process keeps everything in its memory. With a folder, each key has a
    file, which is read on demand. Several processes may fill and read one folder, since a file
    appears under its name only when it is complete.

    Args:
        folder: created if it does not exist.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder else None
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._damaged: list[Path] = []

    def __contains__(self, key: str) -> bool:
        """Return whether the tensors are there and complete; see :meth:`tell_damaged`."""
        if self.folder is None:
            return key in self._memory
        path = self._path(key)
        if not path.is_file():
            return False
        try:
            with safe_open(path, "pt"):  # compares the header with the file's length
                return True
        except (OSError, SafetensorError):
            self._damaged.append(path)
            return False

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        """Return the tensors by name.

        Raises:
            KeyError: they were never stored.
            DataError: their file has been removed or damaged.
        """
        if self.folder is None:
            return self._memory[key]
        try:
            return load(self._path(key).read_bytes())
        except (OSError, SafetensorError) as error:
            advice = "Start again; whatever is missing will be encoded again"
            raise DataError(f"cache {self._path(key)}", [f"{error}. {advice}"]) from error

    def __setitem__(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors, which must be on the CPU and must not share memory.

        Raises:
            DataError: the folder cannot be written.
        """
        if self.folder is None:
            self._memory[key] = dict(tensors)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_safetensors(tensors, self._path(key), {"format": "pt"})
        except (OSError, SafetensorError) as error:
            problem = (
                f"cannot be written: {error}. Free some space, give another folder, or leave it "
                "out to keep everything in memory"
            )
            raise DataError(f"--latent_cache_dir {str(self.folder)!r}", [problem]) from error

    def tell_damaged(self) -> None:
        """Warn of incomplete files that were found since the last call."""
        if self._damaged:
            logger.warning(
                "cache %s: %d damaged files, which are encoded again: %s%s",
                self.folder,
                len(self._damaged),
                ", ".join(path.name for path in self._damaged[:3]),
                ", ..." if len(self._damaged) > 3 else "",
            )
        self._damaged.clear()

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"
