"""A folder of images as a run will read it: captions, problems, crops and buckets."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.io.image_files import (
    MAX_BYTES,
    ImageError,
    image_suffix,
    read_image,
)
from gralora_diffusion.io.regular_files import read_regular
from gralora_diffusion.io.tensor_files import replacing
from gralora_diffusion.training.data.captions import CAPTION_ENDINGS, caption_files
from gralora_diffusion.training.data.controls import ControlPlaces
from gralora_diffusion.training.data.own_captions import WRITTEN, write_text

from .imports import import_diffusers
from .workspace import file_name

if TYPE_CHECKING:  # the module imports torch
    from gralora_diffusion.training.data.masks import MaskPlaces


def add_images(folder: Path, files: Iterable[Path]) -> tuple[int, list[str]]:
    """Copy uploaded images into a folder; return how many, and a problem for each other file.

    Each is decoded first. No two images have the same name without its ending, so that each has
    captions of its own. Captions are copied under the new names of their images. No file that is
    there already is replaced.
    """
    problems: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    images: list[Path] = []
    captions: list[Path] = []
    for file in files:
        (captions if file.suffix.lower() in WRITTEN else images).append(file)
    entries = [Path(entry.name.lower()) for entry in folder.iterdir()]
    taken = {entry.stem for entry in entries if entry.suffix not in CAPTION_ENDINGS}
    copied: list[tuple[Path, Path]] = []
    for file in images:
        try:
            data = read_regular(file, MAX_BYTES)
            read_image(data)
            stem = _free_stem(file_name(file.stem, "image"), taken)
            path = folder / f"{stem}{_suffix(file, data)}"
            with replacing(path) as temporary:
                temporary.write_bytes(data)
            taken.add(stem.lower())
            copied.append((file, path))
        except ImageError as error:
            problems.append(f"{file.name} cannot be decoded: {error}")
        except OSError as error:
            problems.append(f"{file.name} cannot be copied: {error}")
    there = {str(entry) for entry in entries}
    for caption, names in _named_captions(images, captions, copied, problems):
        for name in names:
            if name.lower() in there:
                problems.append(f"{caption.name} is not copied, because there is a {name} already")
                continue
            try:
                write_text(folder / name, read_regular(caption, MAX_BYTES).decode("utf-8-sig"))
                there.add(name.lower())
            except UnicodeDecodeError:
                problems.append(f"{caption.name} is not text in UTF-8")
            except (OSError, ValueError) as error:
                problems.append(f"{caption.name} cannot be copied: {error}")
    return len(copied), problems


def keep_image(image: Path, folder: Path) -> str:
    """Copy an image of a comparison or a run, with its settings; return the copy's name.

    An image that has been copied is not copied again.

    Raises:
        OSError: it cannot be copied.
    """
    data = read_regular(image, MAX_BYTES)
    folder.mkdir(parents=True, exist_ok=True)
    number = hashlib.sha256(data).hexdigest()[:8]
    name = f"{file_name(image.parent.name, 'image')}-{image.stem}-{number}{image.suffix}"
    if not (folder / name).exists():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(data)
    return name


def _named_captions(
    images: list[Path],
    captions: list[Path],
    copied: list[tuple[Path, Path]],
    problems: list[str],
) -> Iterator[tuple[Path, list[str]]]:
    """Yield (uploaded caption, its new names): one for each of its images that was copied."""
    names = [caption.name for caption in captions]
    owners: dict[str, set[str]] = {}  # caption -> images that it was beside
    for image, found in caption_files([image.name for image in images], names).items():
        for name in found:
            owners.setdefault(name, set()).add(image)
    counts, of_images = Counter(names), Counter(image.name for image in images)
    for caption in captions:
        own, ending = owners.get(caption.name, set()), caption.suffix.lower()
        new = [(old.name, path) for old, path in copied if old.name in own] if own else []
        if counts[caption.name] > 1:
            problems.append(f"{caption.name} is not copied, because another has the same name")
        elif twice := sorted(name for name in own if of_images[name] > 1):
            problems.append(
                f"{caption.name} is not copied, because several images are called {twice[0]}"
            )
        elif own and not new:
            problems.append(f"{caption.name} is not copied, because its image is not")
        elif not own:
            yield caption, [f"{file_name(caption.stem, 'image')}{ending}"]
        else:
            yield (
                caption,
                [
                    f"{path.name if caption.stem.lower() == old.lower() else path.stem}{ending}"
                    for old, path in new
                ],
            )


def _free_stem(stem: str, taken: set[str]) -> str:
    """Return ``stem``, or the first of ``stem-2``, ``stem-3``, ... that is not taken."""
    found, number = stem, 1
    while found.lower() in taken:
        number += 1
        found = f"{stem}-{number}"
    return found


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
        masks: image -> the file with its mask, which is the image itself if its opacity is one.
        controls: image -> its control images, in their order.
        problems: why a run would refuse the folder.
        warnings: what it would leave out or change.
    """

    crops: dict[Path, Crop]
    problems: list[str]
    warnings: list[str]
    masks: dict[Path, Path] = field(default_factory=dict)
    controls: dict[Path, list[Path]] = field(default_factory=dict)

    @property
    def buckets(self) -> list[tuple[tuple[int, int], int]]:
        """((height, width), number of images), the most common first."""
        return Counter(crop.bucket for crop in self.crops.values()).most_common()


def check_folder(
    folder: Path,
    prompt: str | None,
    resolution: int,
    use_buckets: bool,
    divisor: int = 8,
    *,
    masks: MaskPlaces | None = None,
    controls: Sequence[Path] = (),
) -> CheckedFolder:
    """Decode all images as a run does before it starts, and say how they would be cropped.

    Args:
        prompt: of images without a caption.
        masks: where their masks are; None to train on whole images.
        controls: folders of control images; those that a metadata file names are found anyway.
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
            places = ControlPlaces(tuple(controls))
            examples = find_examples(folder, prompt, masks=masks, controls=places)
        except DataError as error:
            return CheckedFolder({}, list(error.problems), warnings)
    found = CheckedFolder({}, [], warnings)
    if masks is not None and not any(example.mask for example in examples):
        found.problems.append("no image has a mask. Put masks beside the images, or leave them out")
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
        found.crops[example.source] = Crop(target, shown, enlarged, box)
        if example.mask is not None and isinstance(example.mask.source, Path):
            found.masks[example.source] = example.mask.source
        sources = [control.source for control in example.controls]
        if sources:
            found.controls[example.source] = [s for s in sources if isinstance(s, Path)]
    return found


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
