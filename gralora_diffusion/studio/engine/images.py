"""A folder of images as a run will read it: captions, problems, crops and buckets."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.io.image_files import (
    MAX_BYTES,
    ImageError,
    folder_images,
    image_suffix,
    read_image,
)
from gralora_diffusion.io.regular_files import read_regular
from gralora_diffusion.io.tensor_files import replacing
from gralora_diffusion.training.data.captions import (
    caption_files,
    concept_folders,
    one_line,
    read_caption,
    read_metadata,
)

from .imports import import_diffusers
from .workspace import file_name, free_path

#: Characters of a caption, at most.
MOST_CAPTION = 1 << 16


@dataclass(frozen=True)
class CaptionedImage:
    """An image of a folder and its own caption.

    Attributes:
        caption: "" if it has none of its own.
        source: name of the file with the caption; "" if there is none.
    """

    path: Path
    caption: str
    source: str

    @property
    def is_editable(self) -> bool:
        """Whether its caption is, or would be, in a text file beside it."""
        return not self.source or self.source.lower().endswith((".txt", ".caption"))


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
    names = folder_images(files).images
    listed = read_metadata(folder, files, None, problems)
    beside = caption_files(names, files)
    found = []
    for name in [name for name in names if only in (None, name)]:
        caption, source = listed[name].caption if name in listed else "", ""
        if caption:
            source = "the metadata file"
        for file in () if caption else beside[name]:
            text = read_caption(folder / file, None, problems)
            if text is not None and not caption:
                caption, source = text, file if text else source or file
        found.append(CaptionedImage(folder / name, caption, source))
    return found


def write_caption(image: CaptionedImage, text: str) -> str:
    """Write the caption of an image beside it, as one line; return what was written.

    It goes into the text file that has the caption already, or into a new ``.txt``.

    Raises:
        OSError: it cannot be written.
        ValueError: the caption is in a file that is not edited here, or is too long.
    """
    if not image.is_editable:
        raise ValueError(f"the caption is in {image.source}; edit it there")
    caption = one_line(text)
    if len(caption) > MOST_CAPTION:
        raise ValueError(f"the caption has more than {MOST_CAPTION:,} characters")
    name = image.source or f"{image.path.stem}.txt"
    with replacing(image.path.with_name(name)) as temporary:
        temporary.write_text(caption + "\n" if caption else "", encoding="utf-8")
    return caption


def add_images(folder: Path, files: Iterable[Path]) -> tuple[int, list[str]]:
    """Copy uploaded images into a folder; return how many, and a problem for each other file.

    Each is decoded first. Caption files are copied beside the images of their names.
    """
    count, problems = 0, []
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        try:
            data = read_regular(file, MAX_BYTES)
            if file.suffix.lower() in (".txt", ".caption"):
                name = f"{file_name(file.stem, 'image')}{file.suffix.lower()}"
                text = one_line(data[: 4 * MOST_CAPTION].decode("utf-8-sig"))
                (folder / name).write_text(text + "\n", encoding="utf-8")
                continue
            read_image(data)
            path = free_path(folder, f"{file_name(file.stem, 'image')}{_suffix(file, data)}")
            with replacing(path) as temporary:
                temporary.write_bytes(data)
            count += 1
        except UnicodeDecodeError:
            problems.append(f"{file.name} is not text in UTF-8")
        except ImageError as error:
            problems.append(f"{file.name} cannot be decoded: {error}")
        except OSError as error:
            problems.append(f"{file.name} cannot be copied: {error}")
    return count, problems


def _suffix(file: Path, data: bytes) -> str:
    """Return the file's own extension if it fits the content, or one that does."""
    formats, own, fitting = Image.registered_extensions(), file.suffix.lower(), image_suffix(data)
    return own if formats.get(own) == formats.get(fitting) else fitting


@dataclass(frozen=True)
class Crop:
    """How a run crops an image.

    Attributes:
        bucket: height and width that it is trained at.
        shown: the fraction of the image that a crop shows.
        enlarged: whether the image is enlarged.
        box: left, top, right and bottom of the central crop, as fractions of the image.
    """

    bucket: tuple[int, int]
    shown: float
    enlarged: bool
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class CheckedFolder:
    """A folder as a run reads it.

    Attributes:
        crops: image -> how it is cropped.
        problems: why a run would refuse the folder.
        warnings: what it would leave out or change.
    """

    crops: dict[Path, Crop]
    problems: list[str]
    warnings: list[str]

    @property
    def buckets(self) -> list[tuple[tuple[int, int], int]]:
        """((height, width), number of images), the most common first."""
        return Counter(crop.bucket for crop in self.crops.values()).most_common()


def check_folder(
    folder: Path, prompt: str | None, resolution: int, use_buckets: bool, divisor: int = 8
) -> CheckedFolder:
    """Decode all images as a run does before it starts, and say how they would be cropped.

    Args:
        prompt: of images without a caption.
    """
    if use_buckets:
        import_diffusers()
    from gralora_diffusion.training.data.buckets import Buckets
    from gralora_diffusion.training.data.image_folder import find_examples
    from gralora_diffusion.training.data.transforms import CropPlan

    buckets = Buckets(resolution, divisor) if use_buckets else None
    plan = CropPlan(resolution, center_crop=True, buckets=buckets)
    with _collected_warnings() as warnings:
        try:
            examples = find_examples(folder, prompt)
        except DataError as error:
            return CheckedFolder({}, list(error.problems), warnings)
    crops = {}
    for example in examples:
        assert isinstance(example.source, Path)
        height, width = target = plan.target_size(example.size)
        resized_width, resized_height = plan.resized(example.size)
        left, top = (resized_width - width) / 2, (resized_height - height) / 2
        box = (
            left / resized_width,
            top / resized_height,
            (left + width) / resized_width,
            (top + height) / resized_height,
        )
        enlarged, shown = plan.enlarges(example.size), plan.shown(example.size)
        crops[example.source] = Crop(target, shown, enlarged, box)
    return CheckedFolder(crops, [], warnings)


class _collected_warnings(logging.Handler):
    """Inside, warnings of the reader of folders are collected; entering returns their list."""

    def __enter__(self) -> list[str]:
        self.texts: list[str] = []
        self._logger = logging.getLogger("gralora_diffusion.training.data.image_folder")
        self._logger.addHandler(self)
        return self.texts

    def __exit__(self, *error: object) -> None:
        self._logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
