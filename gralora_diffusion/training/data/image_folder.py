"""Finding the pictures to train on in folders, and refusing what cannot be trained on.

A picture's caption is, in this order: its line in the metadata file, that in the ``.txt``,
``.caption`` or ``.json`` file beside it, the prompt for all pictures. All pictures are decoded once
to know that they can be; afterwards only their paths, captions and hashes are kept.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image
from tqdm.auto import tqdm

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.io.image_files import MAX_BYTES, folder_images, is_image, read_image
from gralora_diffusion.io.regular_files import read_regular
from gralora_diffusion.io.safe_text import first_few

from .captions import (
    LIKELY_CAPTIONS,
    METADATA_NAME,
    METADATA_NAMES,
    CaptionedFolder,
    caption_files,
    concept_folders,
    one_line,
    read_caption,
    read_metadata,
)
from .transforms import CropPlan

logger = logging.getLogger(__name__)

#: Images and videos that are not read, most of them for want of a reader in Pillow.
UNREAD_IMAGES = frozenset(
    {
        *(".heic", ".heif", ".hif", ".jxl", ".jxr", ".svg", ".eps", ".ps", ".ai", ".pdf", ".wmf"),
        *(".emf", ".xcf", ".exr", ".hdr", ".kra", ".fit", ".fits", ".dng", ".cr2", ".cr3", ".nef"),
        *(".arw", ".raf", ".orf", ".rw2", ".raw", ".mp4", ".mov", ".avi", ".mkv", ".webm", ".mpg"),
        *(".mpeg", ".h5", ".hdf", ".hdf5"),
    }
)
#: What other trainers keep of a picture beside it.
_CACHES = (".npz", ".npy", ".pt", ".safetensors")
_CAPTIONS = "captions of no picture or in a form that is not read, or other files, passed over"
_IMAGES = "pictures of a kind that is not read, passed over"
_OTHERS = "other files, passed over"
#: Pictures of which a crop shows less than this share are named in a warning.
_SMALL_PART = 1 / 4
MAX_NAMES = 10
#: So many pictures are decoded at once to be checked.
AT_ONCE = 8
#: Checking fewer pictures is over before a progress bar could be read.
MIN_FOR_PROGRESS = 50


class ImageSource(Protocol):
    """Where an image comes from that is no file of its own; ``str`` of it is for people."""

    def read_bytes(self) -> bytes:
        """Return the image's file.

        Raises:
            OSError, ValueError: there is none.
        """


@dataclass(frozen=True)
class Example:
    """A picture and its caption. The picture stays where it is until it is loaded.

    Attributes:
        source: where the picture is; ``str`` of it names it for people.
        content_key: SHA-256 of the picture's bytes.
        size: width and height in pixels, upright.
        repeats: how many times it counts in an epoch.
        concept: name of the sub-folder that says so.
    """

    source: Path | ImageSource
    caption: str
    content_key: str
    size: tuple[int, int]
    repeats: int = 1
    concept: str | None = None

    def load(self) -> Image.Image:
        """Return the picture, upright, RGB and in the colours of sRGB.

        Raises:
            DataError: it is not there any more, or is another one than when it was found.
        """
        return read_image(self.read_bytes())

    def read_bytes(self) -> bytes:
        """Return the picture's file.

        Raises:
            DataError: as ``load``.
        """
        try:
            data = _bytes_of(self.source)
        except OSError as error:
            raise DataError(str(self.source), [f"cannot be read any more: {error}"]) from error
        if hashlib.sha256(data).hexdigest() != self.content_key:
            raise DataError(str(self.source), ["was changed since the start. Start again"])
        return data


class Found(NamedTuple):
    """A picture that was not looked at yet; ``name`` is for people."""

    name: str
    source: Path | ImageSource
    caption: str
    repeats: int = 1
    concept: str | None = None


def find_examples(
    folder: str | Path,
    prompt: str | None = None,
    *,
    caption_column: str | None = None,
    skip_bad_images: bool = False,
    role: str = "instance",
) -> list[Example]:
    """Return the pictures in ``folder``, sorted by name.

    Sub-folders are read only where the metadata file names a picture in them, or if the folder
    holds no picture but sub-folders named as kohya's sd-scripts want them, see ``concept_folders``.
    Masks of pictures and other files are left out with a warning that names them, hidden ones
    without.

    Args:
        prompt: caption of the pictures that have none.
        caption_column: column of the metadata file, or key of a .json file; by default one of
            ``CAPTION_COLUMNS``.
        skip_bad_images: leave out what cannot be decoded, with a warning.
        role: "instance" or "class", for the flags that errors name.

    Raises:
        DataError: no folder, no picture in it, or with all that is wrong with the pictures, the
            captions, and the metadata file.
    """
    folder = Path(folder)
    place = f"--{role}_data_dir {str(folder)!r}"
    if not folder.is_dir():
        raise DataError(place, ["there is no such folder. Give the folder with the pictures"])
    problems: list[str] = []
    found = []
    try:
        for part in _image_folders(folder, one_line(prompt), role, place):
            found += _find_in(part, folder, caption_column, place, problems)
    except OSError as error:
        raise DataError(place, [f"the folder cannot be read: {error}"]) from error
    advice = (
        f"Give --{role}_prompt for all pictures without one, write a .txt file beside it, or name "
        f"it in {METADATA_NAME}"
    )
    return check_images(found, place, problems, advice, skip_bad_images)


def warn_of_small_images(examples: Iterable[Example], plan: CropPlan) -> None:
    """Log which pictures are smaller than what they are trained at; they are enlarged."""
    small = [
        f"{getattr(e.source, 'name', e.source)} ({e.size[0]}x{e.size[1]})"
        for e in examples
        if plan.enlarges(e.size)
    ]
    place = "aspect-ratio buckets" if plan.buckets else f"--resolution {plan.resolution}"
    _warn(place, "smaller pictures, enlarged for training", small)


def warn_of_long_images(examples: Iterable[Example], plan: CropPlan) -> None:
    """Log which pictures are so long that a crop shows a small part of them."""
    long = [
        f"{getattr(e.source, 'name', e.source)} ({e.size[0]}x{e.size[1]})"
        for e in examples
        if plan.shown(e.size) < _SMALL_PART
    ]
    place = "aspect-ratio buckets" if plan.buckets else f"--resolution {plan.resolution}"
    _warn(place, "long pictures, of which a sample shows less than a quarter", long)


def _image_folders(folder: Path, prompt: str, role: str, place: str) -> list[CaptionedFolder]:
    """The folder, or those in it of a concept each."""
    concepts = concept_folders(folder) if role == "instance" else []
    own = any(is_image(p) or p.name.lower() in METADATA_NAMES for p in folder.iterdir())
    if own or not concepts:
        return [CaptionedFolder(folder, prompt)]
    named = {concept.concept for concept in concepts}
    others = [p.name for p in folder.iterdir() if p.name not in named and p.name[0] != "."]
    _warn(place, "beside the concepts' folders, passed over", sorted(others))
    return concepts


def _find_in(
    part: CaptionedFolder, top: Path, column: str | None, place: str, problems: list[str]
) -> list[Found]:
    """The pictures of one folder with their captions; what else is there is reported."""
    visible = sorted(entry for entry in part.path.iterdir() if not entry.name.startswith("."))
    folders = {entry.name for entry in visible if entry.is_dir()}
    files = [entry.name for entry in visible if entry.name not in folders]
    before = len(problems)
    listed = read_metadata(part.path, files, column, problems)
    images, masks = folder_images(files)
    masks = [name for name in masks if name not in listed]
    names = sorted({*listed, *images})
    if not names and len(problems) == before:
        problems.append(
            f"there is no picture in {part.concept or 'it'}, and sub-folders are not read. Put "
            "the pictures into it, or give the folder that holds them"
        )
    metadata = [name for name in files if name.lower() in METADATA_NAMES]
    used = {*metadata, *names, *masks}
    found, differing = [], []
    for name, beside in _files_beside(part.path, names, files).items():
        given = {metadata[0]: listed[name]} if listed.get(name) else {}
        for file in beside:
            text = read_caption((part.path / name).parent / file, column, problems)
            if text is not None:
                used.add(file)
                given |= {file: text} if text else {}
        path = part.path / name
        shown = path.relative_to(top).as_posix()
        if len(set(given.values())) > 1:
            first, *others = given
            differing.append(f"{shown} ({first}, not {', '.join(others)})")
        caption = next(iter(given.values()), part.prompt)
        found.append(Found(shown, path, caption, part.repeats, part.concept))
    _warn(place, "several captions that differ, of which the first counts", differing)
    _warn(place, "masks of pictures, left out, as training without masks is all there is", masks)
    _report_unused(place, [name for name in files if name not in used], names)
    unread = folders - {Path(name).parts[0] for name in names}
    _warn(place, "sub-folders, not read", sorted(unread))
    missed = _not_named(part.path, names)
    _warn(place, "pictures in sub-folders that are not listed, left out", missed)
    return found


def _not_named(folder: Path, names: Sequence[str]) -> list[str]:
    """Pictures in sub-folders of which others are named."""
    parents = {Path(name).parent for name in names} - {Path()}
    existing_models = {
        (parent / name).as_posix()
        for parent in parents
        for name in folder_images(path.name for path in (folder / parent).iterdir()).images
    }
    return sorted(existing_models.difference(names))


def _files_beside(folder: Path, names: Iterable[str], files: Sequence[str]) -> dict[str, list[str]]:
    """Picture -> names of the files beside it that may hold its caption, in its own folder."""
    by_parent = defaultdict(list)
    for name in names:
        by_parent[Path(name).parent].append(name)
    found: dict[str, list[str]] = {}
    for parent, there in by_parent.items():
        names_there = files if parent == Path() else [p.name for p in (folder / parent).iterdir()]
        beside = caption_files([Path(name).name for name in there], names_there)
        found |= {name: beside[Path(name).name] for name in there}
    return dict(sorted(found.items()))


def _report_unused(place: str, names: Sequence[str], images: Iterable[str]) -> None:
    """Report files that are neither pictures nor captions of pictures."""
    stems = {key.lower() for p in images for key in (p, Path(p).stem)}
    kinds: dict[str, list[str]] = {_CAPTIONS: [], _IMAGES: [], _OTHERS: []}
    for name in names:
        ending = Path(name).suffix.lower()
        beside = Path(name).stem.lower() in stems and ending not in _CACHES
        if ending in UNREAD_IMAGES:
            kinds[_IMAGES].append(name)
        else:
            kinds[_CAPTIONS if beside or ending in LIKELY_CAPTIONS else _OTHERS].append(name)
    for what, of_kind in kinds.items():
        _warn(place, what, of_kind)


def check_images(
    found: Sequence[Found],
    place: str,
    problems: list[str],
    caption_advice: str,
    skip_bad_images: bool,
) -> list[Example]:
    """Decode every picture and make it an example.

    Raises:
        DataError: with ``problems``, the pictures without a caption, and the bad ones; these are
            left out instead with ``skip_bad_images``.
    """
    examples, bad, warnings = [], [], []
    quiet = None if len(found) >= MIN_FOR_PROGRESS else True  # None: unless there is no terminal
    pool = ThreadPoolExecutor(AT_ONCE)  # Pillow and hashlib let other threads run
    try:
        looked = pool.map(_look_at, (image.source for image in found))
        bar = tqdm(looked, "Checking pictures", len(found), unit="", disable=quiet)
        for image, seen in zip(found, bar, strict=True):
            if isinstance(seen, Exception):
                bad.append(f"{image.name} cannot be decoded: {str(seen) or type(seen).__name__}")
                continue
            content_key, size, noted = seen
            warnings += [f"{image.name} ({'; '.join(noted)})"] if noted else []
            if not image.caption:
                problems.append(f"{image.name} has no caption. {caption_advice}")
            of_concept = image.repeats, image.concept
            examples.append(Example(image.source, image.caption, content_key, size, *of_concept))
    finally:
        pool.shutdown(cancel_futures=True)
    if bad and not skip_bad_images:
        problems += bad
        problems.append("To train without what cannot be decoded, give --skip_bad_images")
    if problems:
        raise DataError(place, problems)
    if not examples:
        raise DataError(place, [*bad, "no picture is left"] if bad else ["it has no rows"])
    _warn(place, "cannot be decoded, left out", bad)
    _warn(place, "used without what of them cannot be read", warnings)
    return examples


def _look_at(source: Path | ImageSource) -> tuple[str, tuple[int, int], list[str]] | Exception:
    """Hash and size of a picture, and remarks on it, or why it cannot be decoded."""
    warnings: list[str] = []
    try:
        data = _bytes_of(source)
        return hashlib.sha256(data).hexdigest(), read_image(data, warnings).size, warnings
    except Exception as error:  # a dataset may raise any kind
        return error


def _bytes_of(source: Path | ImageSource) -> bytes:
    return read_regular(source, MAX_BYTES) if isinstance(source, Path) else source.read_bytes()


def _warn(place: str, what: str, names: Sequence[str]) -> None:
    if names:
        logger.warning("%s: %s (%d): %s", place, what, len(names), first_few(names, MAX_NAMES))
