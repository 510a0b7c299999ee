"""Which files the studio shows: images in opened folders, each by an id and not by its path."""

from __future__ import annotations

import hashlib
import secrets
import threading
from pathlib import Path

from gralora_diffusion.io.file_names import real_path
from gralora_diffusion.io.regular_files import is_regular


class OpenedFiles:
    """The files that pages may ask for, by ids that nobody can guess.

    A file has an id only after :meth:`add` was called for it. It must lie in an opened folder, both
    then and when it is asked for: a link that leads out of the folder does not count.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._folders: set[Path] = set()
        self._files: dict[str, tuple[Path, Path]] = {}  # id -> folder, file
        self._lock = threading.Lock()

    def open_folder(self, folder: Path) -> None:
        """Let the files of a folder be shown."""
        with self._lock:
            self._folders.add(real_path(folder))

    def add(self, file: Path) -> str:
        """Return the id of a file in an opened folder, always the same.

        Raises:
            PermissionError: it is in none of them.
        """
        folder = self._folder_of(file)
        if folder is None:
            raise PermissionError(f"{file} is not in an opened folder")
        name = hashlib.blake2b(str(file.absolute()).encode(), key=self._key, digest_size=16)
        with self._lock:
            self._files[name.hexdigest()] = folder, file.absolute()
        return name.hexdigest()

    def find(self, name: str) -> Path | None:
        """Return the file with an id, if it is still a regular file in its opened folder."""
        with self._lock:
            found = self._files.get(name)
        if found is None:
            return None
        folder, file = found
        inside = real_path(file).is_relative_to(folder)
        return file if inside and is_regular(file) else None

    def _folder_of(self, file: Path) -> Path | None:
        place = real_path(file.parent)  # the file itself may be a link, which ``find`` follows
        with self._lock:
            return next((f for f in self._folders if place.is_relative_to(f)), None)
