"""The images of a Hugging Face dataset."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.io.hub import offline_problem
from gralora_diffusion.io.image_files import MAX_BYTES
from gralora_diffusion.io.json_files import MOST_LEVELS
from gralora_diffusion.io.parquet_files import check_parquet, read_chunks
from gralora_diffusion.io.regular_files import check_regular, read_regular
from gralora_diffusion.io.safe_text import error_line

from .captions import MASK_COLUMNS, distinct_lines, one_line
from .checked_files import CheckedFiles
from .controls import FoundControl
from .image_folder import WHOLE_IMAGES, Example, Found, check_images
from .masks import FoundMask, MaskPlaces

logger = logging.getLogger(__name__)

#: More columns than a dataset of images has, nested ones included. For 80,000, the library takes
#: minutes.
_MOST_COLUMNS = 1000
#: Endings of Parquet files in the library.
_PARQUET = (".parquet", ".geoparquet", ".gpq")
#: Types of Arrow's in which several rows may have the same bytes.
_SHARING = re.compile(r"dictionary<|run_end_encoded<|_view\b")
#: White space, and the bytes of a byte order mark.
_BEFORE_JSON = b" \t\r\n\xef\xbb\xbf"
#: In a line of JSON: texts, perhaps without their end, and everything else but brackets.
_BESIDE_BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[^\[\]{}"]+')


@dataclass(frozen=True)
class DatasetRow:
    """An image in a Hugging Face dataset whose image column is not decoded.

    Attributes:
        position: which image of a row that has a list of them.
    """

    index: int
    column: str
    dataset: Any = field(repr=False, compare=False)
    position: int | None = None

    def __str__(self) -> str:
        return f"row {self.index}"

    def read_bytes(self) -> bytes:
        value = self.dataset[self.index][self.column]
        if self.position is not None:
            value = value[self.position]
        if value is None:
            raise ValueError("it has no image")
        data: bytes | None = value["bytes"]
        if data is not None:
            return data
        path = str(value["path"])
        if "://" in path:
            raise ValueError(f"{path} is an address. Download the images")
        return read_regular(Path(path), MAX_BYTES)


def find_dataset_examples(
    name: str,
    prompt: str | None = None,
    *,
    config_name: str | None = None,
    image_column: str = "image",
    caption_column: str | None = None,
    cache_dir: str | None = None,
    skip_bad_images: bool = False,
    masks: MaskPlaces | None = None,
    control_columns: Sequence[str] = (),
) -> list[Example]:
    """Return the images of a Hugging Face dataset: of its split "train", or of its only split.

    Args:
        name: Hub id, folder of data files, or folder that ``Dataset.save_to_disk`` wrote.
        prompt: caption of the rows that have none, and of all rows without ``caption_column``.
        skip_bad_images: leave out images that cannot be decoded, or whose mask or control images
            cannot be used, with a warning.
        masks: where the masks of the images are; None to train on whole images.
        control_columns: columns with control images; a row has one, a list of them, or none.

    Raises:
        DataError: ``datasets`` is not installed, the dataset cannot be loaded, a column is missing,
            or there are problems with images and captions. The error lists all of them.
    """
    place = f"--dataset_name {name!r}"
    try:
        import datasets
    except ImportError as error:
        raise DataError(place, ["this needs: pip install datasets"]) from error
    try:
        _check_files(Path(name))
        if any((Path(name) / kept).is_file() for kept in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, config_name, cache_dir=cache_dir)
    except Exception as error:  # datasets may raise anything for damaged data
        problem = offline_problem(error, name, is_dataset=True)
        problem = problem or f"cannot be loaded: {_with_cause(error)}"
        raise DataError(place, [problem]) from error
    if isinstance(loaded, Mapping):
        if "train" not in loaded and len(loaded) > 1:
            raise DataError(place, [f"it has no split 'train'. Its splits: {', '.join(loaded)}"])
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))

    names = loaded.column_names
    mask_column = masks.column if masks else None
    columns = [
        ("image_column", image_column),
        ("caption_column", caption_column),
        ("mask_column", mask_column),
        *(("control_column", column) for column in control_columns),
    ]
    if missing := [
        f"--{flag} is {column!r}, but there is no such column. Columns: {', '.join(names)}"
        for flag, column in columns
        if column is not None and column not in names
    ]:
        raise DataError(place, missing)
    images = _undecoded(loaded, image_column, place)
    with_masks = mask_column or next((name for name in MASK_COLUMNS if name in names), None)
    masks_there = None
    if with_masks and masks:
        masks_there = _undecoded(loaded, with_masks, place)
    elif with_masks:
        logger.warning("%s: %s: column %s", place, WHOLE_IMAGES["instance"], with_masks)

    with_controls = [_undecoded(loaded, column, place) for column in control_columns]

    problems: list[str] = []
    texts: list[Any] = [None] * len(loaded)
    if caption_column:
        try:
            texts = list(loaded[caption_column])
        except Exception as error:  # Arrow raises almost any kind of error on a damaged file
            problem = f"the column {caption_column} cannot be read: {error_line(error)}"
            raise DataError(place, [problem]) from error
    found = []
    for index, text in enumerate(texts):
        several = text if isinstance(text, list) else [text]
        if not all(isinstance(one, str | None) for one in several):
            problems.append(
                f"row {index}: {caption_column} is {text!r}; it must be text, or a list of texts"
            )
            several = []
        row = DatasetRow(index, image_column, images)
        mask = None
        if masks_there is not None and masks_there[index][str(with_masks)] is not None:
            mask = FoundMask(f"in {with_masks}", DatasetRow(index, str(with_masks), masks_there))
        elif masks and masks.from_alpha:
            mask = FoundMask(str(row), row, of_alpha=True)
        controls = tuple(
            control
            for column, dataset in zip(control_columns, with_controls, strict=True)
            for control in _controls(index, column, dataset)
        )
        first, *others = distinct_lines(several) or [one_line(prompt)]
        more = tuple(others)
        found.append(Found(str(row), row, first, mask=mask, controls=controls, other_captions=more))
    advice = "Give --instance_prompt for all rows without one" + (
        "" if caption_column else ", or --caption_column"
    )
    nothing = CheckedFiles(Path(), None)  # rows are no files
    return check_images(found, place, problems, advice, skip_bad_images, nothing)


def _with_cause(error: Exception) -> str:
    """Return an error's message with its cause's, which the library often leaves out."""
    cause, said = error.__cause__, str(error)
    if isinstance(cause, Exception) and str(cause) not in said:
        said += f" ({error_line(cause)})"
    return said


def _check_files(folder: Path) -> None:
    """Check the files of a folder for what would block or end the process that reads them.

    Args:
        folder: it may not exist.

    Raises:
        OSError, ValueError: a file is a named pipe or the like, its JSON is nested too deeply, or
            its Arrow table or Parquet file is damaged, or too large in memory.
    """
    tables = []
    for inside, _, names in os.walk(folder):
        for path in (Path(inside, name) for name in names):
            try:
                check_regular(path)
                if path.suffix in (".json", ".jsonl"):
                    _check_json(path)
                elif path.suffix == ".arrow":
                    _check_table(path)
                elif path.suffix in _PARQUET:
                    _check_columns(path)
                    tables.append(path)
            except FileNotFoundError:  # a link to nothing
                continue
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}: {error}") from error
    check_parquet(tables)


def _check_json(path: Path) -> None:
    """Check JSON, or JSON in lines, for what ends the process in Arrow's reader.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is nested too deeply, or a row is null.
    """
    level = 0
    with path.open("rb") as file:
        for line in file:
            if level == 0 and line.lstrip(_BEFORE_JSON).startswith(b"null"):
                raise ValueError("a row is null")
            for bracket in _BESIDE_BRACKETS.sub(b"", line):
                level = level + 1 if bracket in b"[{" else max(level - 1, 0)
                if level > MOST_LEVELS:
                    raise ValueError("it is nested too deeply")


def _check_table(path: Path) -> None:
    """Check a file of Arrow's streaming format: all offsets, and that it is as large as its values.

    ``Dataset.save_to_disk`` neither compresses nor shares values.

    Raises:
        OSError, ValueError: it is damaged, or may be far larger in memory.
    """
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        if any(map(_is_compressed, pyarrow.ipc.MessageReader.open_stream(file))):
            raise ValueError("it is compressed. Write it with Dataset.save_to_disk")
        file.seek(0)
        with pyarrow.ipc.open_stream(file) as batches:
            for column in batches.schema:
                if _SHARING.search(str(column.type)):
                    raise ValueError(
                        f"the rows of its column {column.name} may share values ({column.type}). "
                        "Write it with Dataset.save_to_disk"
                    )
            for batch in batches:
                batch.validate(full=True)


def _is_compressed(message: Any) -> bool:
    """Whether the buffers of a message of Arrow's format are compressed.

    The format is ``Message.fbs``: a message's header is a batch, or a dictionary that has one.
    """
    data = memoryview(message.metadata)

    def field(table: int, number: int) -> int:
        """Return where a field of a table is; 0 if it is left out."""
        slots = table - int.from_bytes(data[table : table + 4], "little", signed=True)
        slot = 4 + 2 * number
        if slot >= int.from_bytes(data[slots : slots + 2], "little"):
            return 0
        offset = int.from_bytes(data[slots + slot : slots + slot + 2], "little")
        return table + offset if offset else 0

    def target(at: int) -> int:
        return at + int.from_bytes(data[at : at + 4], "little")

    if message.type not in ("record batch", "dictionary"):
        return False
    header = target(field(target(0), 2))
    batch = header if message.type == "record batch" else target(field(header, 1))
    return field(batch, 3) != 0


def _check_columns(path: Path) -> None:
    """Check a Parquet file for what its reader would take too much memory or time.

    Raises:
        OSError, ValueError: the file is damaged, has too many columns, or says that it has more
            rows than values.
    """
    import pyarrow.parquet

    columns = pyarrow.parquet.read_metadata(path).num_columns
    if columns > _MOST_COLUMNS:
        raise ValueError(f"it has {columns:,} columns, more than {_MOST_COLUMNS:,}")
    with path.open("rb") as file:
        read_chunks(file)


def _undecoded(dataset: Any, column: str, place: str) -> Any:
    """Return a column of images, or of lists of images, whose files are not decoded.

    Raises:
        DataError: it contains something else.
    """
    import datasets

    got, kind = dataset.features[column], datasets.Image(decode=False)
    if type(got).__name__ in ("list", "Sequence", "List"):  # the last since datasets 4
        kind = datasets.Sequence(kind)
    try:
        return dataset.select_columns([column]).cast_column(column, kind)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(place, [f"column {column!r} contains {got} instead of images"]) from error


def _controls(index: int, column: str, dataset: Any) -> Iterator[FoundControl]:
    """Yield the control images of a row in a column."""
    value = dataset[index][column]
    if isinstance(value, list):
        for position in range(len(value)):
            name = f"row {index}, column {column}, image {position}"
            yield FoundControl(name, DatasetRow(index, column, dataset, position))
    elif value is not None:
        yield FoundControl(f"row {index}, column {column}", DatasetRow(index, column, dataset))
