"""Finding the pictures to train on in folders, and refusing what cannot be trained on.

A picture's caption is, in this order: its line in ``metadata.jsonl``, the ``.txt`` or ``.caption``
file beside it, the prompt for all pictures. All pictures are decoded once to know that they can be;
afterwards only their paths, captions and hashes are kept.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from ..tensor_files import some
from .captions import (
    CAPTION_ENDINGS,
    METADATA_NAME,
    PictureFolder,
    caption_beside,
    concept_folders,
    one_line,
    read_metadata,
)
from .pictures import CropPlan, decode, is_picture

if TYPE_CHECKING:
    from .dataset_rows import DatasetRow

logger = logging.getLogger(__name__)

MAX_NAMES = 10
#: So many pictures are decoded at once to be checked.
AT_ONCE = 8
#: Checking fewer pictures is over before a progress bar could be read.
MIN_FOR_PROGRESS = 50


class DataError(ValueError):
    """Pictures or captions that cannot be trained on. ``problems`` holds one text for each."""

    def __init__(self, place: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join([f"{place}:", *(f"  {problem}" for problem in problems)]))


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

    source: Path | DatasetRow
    caption: str
    content_key: str
    size: tuple[int, int]
    repeats: int = 1
    concept: str | None = None

    def load(self) -> Image.Image:
        """Return the picture, upright and RGB.

        Raises:
            DataError: it is not there any more, or is another one than when it was found.
        """
        return decode(self.read_bytes())

    def read_bytes(self) -> bytes:
        """Return the picture's file.

        Raises:
            DataError: as ``load``.
        """
        try:
            data = self.source.read_bytes()
        except OSError as error:
            raise DataError(str(self.source), [f"cannot be read any more: {error}"]) from error
        if hashlib.sha256(data).hexdigest() != self.content_key:
            raise DataError(str(self.source), ["was changed since the start. Start again"])
        return data


class Found(NamedTuple):
    """A picture that was not looked at yet; ``name`` is for people."""

    name: str
    source: Path | DatasetRow
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

    Sub-folders are read only where ``metadata.jsonl`` names a picture in them, or if it holds no
    picture but sub-folders named as kohya's sd-scripts want them, see ``concept_folders``. Other
    files are passed over with a warning, hidden ones without.

    Args:
        prompt: caption of the pictures that have none.
        caption_column: column of ``metadata.jsonl``; by default one of ``CAPTION_COLUMNS``.
        skip_bad_images: leave out what cannot be decoded, with a warning.
        role: "instance" or "class", for the flags that errors name.

    Raises:
        DataError: no folder, no picture in it, or with all that is wrong with the pictures, the
            captions, and ``metadata.jsonl``.
    """
    folder = Path(folder)
    place = f"--{role}_data_dir {str(folder)!r}"
    if not folder.is_dir():
        raise DataError(place, ["there is no such folder. Give the folder with the pictures"])
    problems: list[str] = []
    found = []
    for part in _picture_folders(folder, one_line(prompt), role, place):
        listed = read_metadata(part.path, caption_column, problems)
        names = _picture_names(part.path, listed, place)
        if not names and not problems:
            problems.append(
                f"there is no picture in {part.concept or 'it'}, and sub-folders are not read. Put "
                "the pictures into it, or give the folder that holds them"
            )
        for name in names:
            path = part.path / name
            caption = listed.get(name) or caption_beside(path, problems) or part.prompt
            shown = path.relative_to(folder).as_posix()
            found.append(Found(shown, path, caption, part.repeats, part.concept))
    advice = (
        f"Give --{role}_prompt for all pictures without one, write a .txt file beside it, or name "
        f"it in {METADATA_NAME}"
    )
    return check_pictures(found, place, problems, advice, skip_bad_images)


def warn_of_small_pictures(examples: Iterable[Example], plan: CropPlan) -> None:
    """Log which pictures are smaller than what they are trained at; they are enlarged."""
    small = [
        f"{getattr(e.source, 'name', e.source)} ({e.size[0]}x{e.size[1]})"
        for e in examples
        if plan.enlarges(e.size)
    ]
    place = "aspect-ratio buckets" if plan.buckets else f"--resolution {plan.resolution}"
    _warn(place, "smaller pictures, enlarged for training", small)


def _picture_folders(folder: Path, prompt: str, role: str, place: str) -> list[PictureFolder]:
    """The folder, or those in it of a concept each."""
    concepts = concept_folders(folder) if role == "instance" else []
    own = any(is_picture(path) or path.name == METADATA_NAME for path in folder.iterdir())
    if own or not concepts:
        return [PictureFolder(folder, prompt)]
    named = {concept.concept for concept in concepts}
    others = [p.name for p in folder.iterdir() if p.name not in named and p.name[0] != "."]
    _warn(place, "beside the concepts' folders, passed over", sorted(others))
    return concepts


def _picture_names(folder: Path, listed: Iterable[str], place: str) -> list[str]:
    """Return the pictures' names, sorted; report the other files and sub-folders."""
    visible = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry.name for entry in visible if not entry.is_dir()]
    names = {*listed, *(name for name in files if is_picture(Path(name)))}
    beside = {Path(name).with_suffix(end).name for name in names for end in CAPTION_ENDINGS}
    used = {METADATA_NAME, *names, *beside}
    _warn(place, "other files, passed over", [name for name in files if name not in used])
    read = {Path(name).parts[0] for name in names}
    unread = [entry.name for entry in visible if entry.is_dir() and entry.name not in read]
    _warn(place, "sub-folders, not read", unread)
    return sorted(names)


def check_pictures(
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
    examples, bad = [], []
    quiet = None if len(found) >= MIN_FOR_PROGRESS else True  # None: unless there is no terminal
    pool = ThreadPoolExecutor(AT_ONCE)  # Pillow and hashlib let other threads run
    try:
        looked = pool.map(_look_at, (picture.source for picture in found))
        bar = tqdm(looked, "Checking pictures", len(found), unit="", disable=quiet)
        for picture, seen in zip(found, bar, strict=True):
            if isinstance(seen, UnidentifiedImageError):
                seen = ValueError("it is no picture of a kind that Pillow knows")
            if isinstance(seen, Exception):
                bad.append(f"{picture.name} cannot be decoded: {str(seen) or type(seen).__name__}")
                continue
            if not picture.caption:
                problems.append(f"{picture.name} has no caption. {caption_advice}")
            of_concept = picture.repeats, picture.concept
            examples.append(Example(picture.source, picture.caption, *seen, *of_concept))
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
    return examples


def _look_at(source: Path | DatasetRow) -> tuple[str, tuple[int, int]] | Exception:
    """Hash and size of a picture, or why it cannot be decoded."""
    try:
        data = source.read_bytes()
        return hashlib.sha256(data).hexdigest(), decode(data).size
    except Exception as error:  # Pillow raises almost any kind on a damaged file
        return error


def _warn(place: str, what: str, names: Sequence[str]) -> None:
    if names:
        logger.warning("%s: %s (%d): %s", place, what, len(names), some(names, MAX_NAMES))
