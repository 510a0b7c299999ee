"""Finding the pictures to train on, with their captions, and refusing what cannot be trained on.

A picture's caption is, in this order: its line in ``metadata.jsonl``, the ``.txt`` file beside it,
the prompt for all pictures. All pictures are decoded once to know that they can be; afterwards only
their paths, captions and hashes are kept.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from ..hub import offline_problem
from .captions import METADATA_NAME, one_line, read_caption, read_metadata
from .pictures import CropPlan, decode, is_picture

logger = logging.getLogger(__name__)

MAX_NAMES = 10
#: Checking fewer pictures is over before a progress bar could be read.
MIN_FOR_PROGRESS = 50


class DataError(ValueError):
    """Pictures or captions that cannot be trained on. ``problems`` holds one text for each."""

    def __init__(self, place: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join([f"{place}:", *(f"  {problem}" for problem in problems)]))


@dataclass(frozen=True)
class DatasetRow:
    """A picture in a Hugging Face dataset whose image column is not decoded."""

    index: int
    column: str
    dataset: Any = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"row {self.index}"

    def read_bytes(self) -> bytes:
        value = self.dataset[self.index][self.column]
        if value is None:
            raise ValueError("it has no picture")
        data: bytes | None = value["bytes"]
        return Path(value["path"]).read_bytes() if data is None else data


@dataclass(frozen=True)
class Example:
    """A picture and its caption. The picture stays where it is until it is loaded.

    Attributes:
        source: where the picture is; ``str`` of it names it for people.
        content_key: SHA-256 of the picture's bytes.
        size: width and height in pixels, upright.
    """

    source: Path | DatasetRow
    caption: str
    content_key: str
    size: tuple[int, int]

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


def find_examples(
    folder: str | Path,
    prompt: str | None = None,
    *,
    caption_column: str | None = None,
    skip_bad_images: bool = False,
    role: str = "instance",
) -> list[Example]:
    """Return the pictures in ``folder``, sorted by name.

    Sub-folders are read only where ``metadata.jsonl`` names a picture in them. Other files are
    passed over with a warning, hidden ones without.

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
    listed = read_metadata(folder, caption_column, problems)
    names = _picture_names(folder, listed, place)
    if not names and not problems:
        problems.append(
            "there is no picture in it, and sub-folders are not read. Put the pictures into it, or "
            "give the folder that holds them"
        )
    found = []
    for name in names:
        sidecar = (folder / name).with_suffix(".txt")
        beside = read_caption(sidecar, problems) if sidecar.is_file() else ""
        found.append((name, folder / name, listed.get(name) or beside or one_line(prompt)))
    advice = (
        f"Give --{role}_prompt for all pictures without one, write a .txt file beside it, or name "
        f"it in {METADATA_NAME}"
    )
    return _check_pictures(found, place, problems, advice, skip_bad_images)


def find_dataset_examples(
    name: str,
    prompt: str | None = None,
    *,
    config_name: str | None = None,
    image_column: str = "image",
    caption_column: str | None = None,
    cache_dir: str | None = None,
    skip_bad_images: bool = False,
) -> list[Example]:
    """Return the pictures of a Hugging Face dataset: of its split "train", or of its only one.

    Args:
        name: Hub id, folder of data files, or folder that ``Dataset.save_to_disk`` wrote.
        prompt: caption of the rows that have none, and of all rows without ``caption_column``.
        skip_bad_images: leave out what cannot be decoded, with a warning.

    Raises:
        DataError: ``datasets`` is not installed, the dataset cannot be loaded or lacks a column, or
            with all that is wrong with the pictures and captions.
    """
    place = f"--dataset_name {name!r}"
    try:
        import datasets
    except ImportError as error:
        raise DataError(place, ["this needs: pip install datasets"]) from error
    try:
        if any((Path(name) / kept).is_file() for kept in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, config_name, cache_dir=cache_dir)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        problem = offline_problem(error, name, is_dataset=True) or f"cannot be loaded: {error}"
        raise DataError(place, [problem]) from error
    if isinstance(loaded, Mapping):
        if "train" not in loaded and len(loaded) > 1:
            raise DataError(place, [f"it has no split 'train', only {', '.join(loaded)}"])
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))

    columns = {"image_column": image_column, "caption_column": caption_column}
    if lacking := [
        f"--{flag} is {column!r}, which it lacks. Columns: {', '.join(loaded.column_names)}"
        for flag, column in columns.items()
        if column is not None and column not in loaded.column_names
    ]:
        raise DataError(place, lacking)
    try:
        pictures = loaded.select_columns([image_column]).cast_column(
            image_column, datasets.Image(decode=False)
        )
    except (TypeError, ValueError, RuntimeError) as error:
        got = loaded.features[image_column]
        raise DataError(place, [f"column {image_column!r} holds no pictures but {got}"]) from error

    problems: list[str] = []
    texts = loaded[caption_column] if caption_column else [None] * len(loaded)
    found = []
    for index, text in enumerate(texts):
        if not isinstance(text, str | None):
            problems.append(f"row {index}: {caption_column} is {text!r}; it must be a text")
            text = None
        row = DatasetRow(index, image_column, pictures)
        found.append((str(row), row, one_line(text) or one_line(prompt)))
    advice = "Give --instance_prompt for all rows without one" + (
        "" if caption_column else ", or --caption_column"
    )
    return _check_pictures(found, place, problems, advice, skip_bad_images)


def warn_of_small_pictures(examples: Iterable[Example], plan: CropPlan) -> None:
    """Log which pictures are smaller than what they are trained at; they are enlarged."""
    small = [
        f"{getattr(e.source, 'name', e.source)} ({e.size[0]}x{e.size[1]})"
        for e in examples
        if plan.enlarges(e.size)
    ]
    place = "aspect-ratio buckets" if plan.buckets else f"--resolution {plan.resolution}"
    _warn(place, "smaller pictures, enlarged for training", small)


def _picture_names(folder: Path, listed: Iterable[str], place: str) -> list[str]:
    """Return the pictures' names, sorted; report the other files and sub-folders."""
    visible = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry.name for entry in visible if not entry.is_dir()]
    names = {*listed, *(name for name in files if is_picture(Path(name)))}
    used = {METADATA_NAME, *names, *(Path(name).with_suffix(".txt").name for name in names)}
    _warn(place, "other files, passed over", [name for name in files if name not in used])
    read = {Path(name).parts[0] for name in names}
    unread = [entry.name for entry in visible if entry.is_dir() and entry.name not in read]
    _warn(place, "sub-folders, not read", unread)
    return sorted(names)


def _check_pictures(
    found: Sequence[tuple[str, Path | DatasetRow, str]],
    place: str,
    problems: list[str],
    caption_advice: str,
    skip_bad_images: bool,
) -> list[Example]:
    """Decode every one of (name, picture, caption) and make it an example.

    Raises:
        DataError: with ``problems``, the pictures without a caption, and the bad ones; these are
            left out instead with ``skip_bad_images``.
    """
    examples, bad = [], []
    quiet = None if len(found) >= MIN_FOR_PROGRESS else True  # None: unless there is no terminal
    for name, source, caption in tqdm(found, desc="Checking pictures", unit="", disable=quiet):
        try:
            data = source.read_bytes()
            size = decode(data).size
        except UnidentifiedImageError:
            bad.append(f"{name} cannot be decoded: it is no picture of a kind that Pillow knows")
        except Exception as error:  # Pillow raises almost any kind on a damaged file
            bad.append(f"{name} cannot be decoded: {str(error) or type(error).__name__}")
        else:
            if not caption:
                problems.append(f"{name} has no caption. {caption_advice}")
            examples.append(Example(source, caption, hashlib.sha256(data).hexdigest(), size))
    if bad and not skip_bad_images:
        problems += bad
        problems.append("To train without what cannot be decoded, give --skip_bad_images")
    if problems:
        raise DataError(place, problems)
    if not examples:
        raise DataError(place, [*bad, "no picture is left"] if bad else ["it has no rows"])
    _warn(place, "cannot be decoded, left out", bad)
    return examples


def _warn(place: str, what: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        listed = ", ".join(names[:MAX_NAMES])
        logger.warning("%s: %s (%d): %s%s", place, what, len(names), listed, more)
