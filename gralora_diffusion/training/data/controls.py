"""Control images: the images before an edit, of which a training image shows what comes out.

They are in folders, under the names of their training images, or are named by a metadata file or a
dataset. An image may have none, and may be the control image of several.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from gralora_diffusion.io.image_files import is_image, read_image
from gralora_diffusion.io.safe_text import first_few

from .checked_files import CheckedFiles
from .sources import Source, shared_files, unchanged_bytes

#: Columns of a metadata file with control images, unless others are named. Hugging Face's
#: imagefolder reads the last two.
CONTROL_COLUMNS = ("control", "control_file_name", "control_file_names")


@dataclass(frozen=True)
class ControlPlaces:
    """Where control images are.

    Attributes:
        folders: with one control image for each training image.
        columns: of a metadata file or dataset; None for the first of ``CONTROL_COLUMNS``.
        option: the flag of the folders, for messages.
    """

    folders: tuple[Path, ...] = ()
    columns: tuple[str, ...] | None = None
    option: str = "--control_data_dir"


class FoundControl(NamedTuple):
    """A control image that has not been opened yet; ``name`` is for messages."""

    name: str
    source: Source


@dataclass(frozen=True)
class ControlImage:
    """A control image that can be decoded. It stays where it is until it is loaded.

    Attributes:
        content_key: SHA-256 of the image's bytes.
        size: width and height in pixels, upright.
    """

    source: Source
    content_key: str
    size: tuple[int, int]

    def load(self) -> Image.Image:
        """Return the image, upright, RGB and in the colors of sRGB.

        Raises:
            DataError: it no longer exists, or has changed since it was found.
        """
        return read_image(unchanged_bytes(self.source, self.content_key))


@dataclass
class ControlFolder:
    """A folder with control images under the names of their training images.

    The extension may differ, as in ``1.png`` for ``1.jpg``, if no other file has that name and the
    file belongs to no other training image.
    """

    path: Path
    option: str = "--control_data_dir"
    wanted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)
    images_of: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def find(self, name: str) -> FoundControl | None:
        """Return the control image of a training image by its path, or None, which is noted."""
        self.wanted.append(name)
        alike = self._by_stem.get(_stem(name), [])
        exact = [path for path in alike if path == name]
        found = exact or alike
        if len(found) == 1:
            self.images_of[found[0]].append(name)
            return FoundControl(f"{self.path.name}/{found[0]}", self.path / found[0])
        if found:
            self.doubtful.append(f"{name} ({', '.join(found)})")
        else:
            self.missing.append(name)
        return None

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the folder, after all images have been looked for."""
        where = f"{self.option} {str(self.path)!r}"
        if self.doubtful:
            yield (
                f"{where} has several files for {first_few(self.doubtful)}. Keep the one that "
                "belongs to the training image"
            )
        if shared := shared_files(self.images_of):
            yield (
                f"{where} has one file for several training images: {shared}. Give each the "
                "control image of its own name and extension"
            )
        if self.missing == self.wanted and self.wanted:
            there = first_few(self._names) if self._names else "none"
            yield (
                f"{where} has no control image for any of the {len(self.wanted)} training images. "
                f"Training images: {first_few(self.wanted)}. Images there: {there}. Give each "
                "control image the name of its training image"
            )
        elif self.missing:
            yield (
                f"{where} has no control image for {first_few(self.missing)}. Put it there under "
                "the same name. For images without one, name control images in the column "
                "'control' of metadata.jsonl instead, where a line may have none"
            )

    def unused(self) -> list[str]:
        """Return images in the folder that belong to no training image."""
        return [name for name in self._names if name not in self.images_of]

    @cached_property
    def _names(self) -> list[str]:
        files = (path for path in self.path.rglob("*") if is_image(path))
        return sorted(path.relative_to(self.path).as_posix() for path in files)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        found = defaultdict(list)
        for name in self._names:
            found[_stem(name)].append(name)
        return found


def _stem(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def check_control(found: FoundControl, checked: CheckedFiles) -> ControlImage | str:
    """Decode a control image; a text says why that is not possible."""
    try:
        seen = checked.decode("image", found.source)
        return ControlImage(found.source, seen.content_key, seen.size)
    except Exception as error:  # a dataset may raise any kind
        return f"{found.name} cannot be decoded: {str(error) or type(error).__name__}"
