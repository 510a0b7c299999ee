"""Where the bytes of an image are: in a file of its own, or in a row of a dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.io.image_files import MAX_BYTES
from gralora_diffusion.io.regular_files import read_regular
from gralora_diffusion.io.safe_text import first_few


class ImageSource(Protocol):
    """The source of an image that is not a file of its own; ``str`` names it in messages."""

    def read_bytes(self) -> bytes:
        """Return the bytes of the image's file.

        Raises:
            OSError, ValueError: there is none.
        """


#: A file, or another source.
Source: TypeAlias = Path | ImageSource


def bytes_of(source: Source) -> bytes:
    """Return the bytes of an image's file.

    Raises:
        OSError, ValueError: there is none, or it is too large.
    """
    return read_regular(source, MAX_BYTES) if isinstance(source, Path) else source.read_bytes()


def unchanged_bytes(source: Source, content_key: str) -> bytes:
    """Return the bytes of an image's file, which must have the SHA-256 ``content_key``.

    Raises:
        DataError: it no longer exists, or has changed since it was found.
    """
    try:
        data = bytes_of(source)
    except OSError as error:
        raise DataError(str(source), [f"can no longer be read: {error}"]) from error
    if hashlib.sha256(data).hexdigest() != content_key:
        raise DataError(str(source), ["was changed after the run started. Start again"])
    return data


def shared_files(images_of: Mapping[str, Sequence[str]]) -> str:
    """Return the first few files that belong to several images by their names, with these images.

    Args:
        images_of: file -> images.
    """
    shared = [f"{n} ({', '.join(images)})" for n, images in images_of.items() if len(images) > 1]
    return first_few(shared) if shared else ""
