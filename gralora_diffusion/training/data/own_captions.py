"""The captions of a folder's images as they are edited: one file beside each image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gralora_diffusion.io.image_files import folder_images
from gralora_diffusion.io.tensor_files import replacing

from .captions import (
    caption_files,
    concept_folders,
    one_line,
    read_caption,
    read_captions,
    read_metadata,
)
from .controls import CONTROL_COLUMNS

#: Characters of a caption, at most.
MOST_CAPTION = 1 << 16
#: Endings of the caption files that are written.
WRITTEN = (".txt", ".caption")


@dataclass(frozen=True)
class CaptionedImage:
    """An image of a folder and its own caption.

    Attributes:
        caption: "" if it has none of its own.
        source: name of the file with the caption; "" if there is none.
        problem: why the caption is not edited here; "" if it is.
    """

    path: Path
    caption: str
    source: str
    problem: str = ""

    @property
    def is_editable(self) -> bool:
        """Whether its caption is, or would be, in a text file of this image alone."""
        return not self.problem


def list_images(folder: Path) -> tuple[list[CaptionedImage], list[str]]:
    """Return the images of a folder, or of its concepts' folders, and problems with captions.

    No image is opened.

    Raises:
        OSError: the folder cannot be read.
    """
    problems: list[str] = []
    images = _images_in(folder, problems)
    if not images:
        for concept in concept_folders(folder):
            images += _images_in(concept.path, problems)
    return images, problems


def find_image(path: Path) -> CaptionedImage:
    """Return one image as :func:`list_images` does.

    Raises:
        OSError: its folder cannot be read, or it is not there.
    """
    found = _images_in(path.parent, [], path.name)
    if not found:
        raise FileNotFoundError(f"{path.name} is no longer in its folder")
    return found[0]


def _images_in(folder: Path, problems: list[str], only: str | None = None) -> list[CaptionedImage]:
    """Return the images of one folder; with ``only``, just the one of this name."""
    files = [entry.name for entry in folder.iterdir() if not entry.is_dir()]
    listed = read_metadata(folder, files, None, problems, None, CONTROL_COLUMNS)
    parts = {name for entry in listed.values() for name in (entry.mask, *entry.controls)}
    images = folder_images(files).images
    names = [name for name in images if name in listed or name not in parts]
    beside, sharing = caption_files(names, files), _sharing(names, files)
    found = []
    for name in [name for name in names if only in (None, name)]:
        caption, source = listed[name].caption if name in listed else "", ""
        unread: list[str] = []
        if caption:
            source = "the metadata file"
        for file in () if caption else beside[name]:
            text = read_caption(folder / file, None, unread)
            if text is not None and not caption:
                caption, source = text, file if text else source or file
        problems += unread
        reason = "; ".join(unread)
        if source and not source.lower().endswith(WRITTEN):
            reason = f"the caption is in {source}; edit it there"
        elif source and len(read_captions(folder / source, None, [], per_line=True) or ()) > 1:
            reason = f"{source} has several lines, which may be a caption each; edit them there"
        target = source or _new_caption(name)
        others = [other for other in sharing.get(target, ()) if other != name]
        if others and not reason:
            reason = f"{target} is shared with {', '.join(others)}"
        found.append(CaptionedImage(folder / name, caption, source, reason))
    return found


def _new_caption(image: str) -> str:
    """Return the name of the file into which the first caption of an image is written."""
    return f"{Path(image).stem}.txt"


def _sharing(names: list[str], files: list[str]) -> dict[str, list[str]]:
    """Return caption file -> the images that read it, also of files that are not there yet."""
    found: dict[str, list[str]] = {}
    for image, captions in caption_files(names, {*files, *map(_new_caption, names)}).items():
        for caption in captions:
            found.setdefault(caption, []).append(image)
    return found


def write_caption(image: CaptionedImage, text: str) -> str:
    """Write the caption of an image beside it, as one line; return what was written.

    It goes into the text file that has the caption already, or into a new ``.txt``.

    Raises:
        OSError: it cannot be written.
        ValueError: the caption is in a file that is not edited here, or is too long.
    """
    if image.problem:
        raise ValueError(image.problem)
    return write_text(image.path.with_name(image.source or _new_caption(image.path.name)), text)


def write_text(path: Path, text: str) -> str:
    """Write a caption into a file as one line, whole or not at all; return what was written.

    Raises:
        OSError: it cannot be written.
        ValueError: it is too long.
    """
    caption = one_line(text)
    if len(caption) > MOST_CAPTION:
        raise ValueError(f"the caption has more than {MOST_CAPTION:,} characters")
    with replacing(path) as temporary:
        temporary.write_text(caption + "\n" if caption else "", encoding="utf-8")
    return caption
