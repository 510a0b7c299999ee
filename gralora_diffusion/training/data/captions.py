"""Captions of the images in a folder: metadata files, files beside the images, and names of
sub-folders. A metadata file may also name the mask and the control images of an image.

Problems are appended to a list, so that all of them can be reported at once.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from gralora_diffusion.io.file_names import real_path
from gralora_diffusion.io.image_files import folder_images
from gralora_diffusion.io.json_files import parse as parse_json
from gralora_diffusion.io.parquet_files import read_chunks
from gralora_diffusion.io.regular_files import is_regular, read_regular

METADATA_NAME = "metadata.jsonl"
#: Files that list images and captions, as in Hugging Face's imagefolder, in upper or lower case.
METADATA_NAMES = (METADATA_NAME, "metadata.csv", "metadata.parquet")
#: Endings of caption files beside an image, in upper or lower case. The first file of an image
#: that has a caption is used. ``1.txt`` and ``1.png.txt`` are beside ``1.png``.
CAPTION_ENDINGS = (".txt", ".caption", ".json")
#: Columns of a metadata file, or keys of a .json file, that may contain the caption; the first one
#: that a line has is used.
CAPTION_COLUMNS = ("text", "caption", "prompt")
#: Columns of a metadata file that may name the image.
NAME_COLUMNS = ("file_name", "image")
#: Columns of a metadata file that may name the mask; the second is imagefolder's form.
MASK_COLUMNS = ("mask", "mask_file_name")
#: Endings of files that are most likely captions of any program.
LIKELY_CAPTIONS = frozenset(
    {
        *(*CAPTION_ENDINGS, ".jsonl", ".csv", ".tsv", ".parquet", ".yaml", ".yml", ".toml"),
        *(".captions", ".cap", ".tags", ".tag", ".prompt", ".prompts", ".wd14", ".booru"),
    }
)
#: Beginnings of addresses and of paths with a drive.
_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:|[A-Za-z]:[\\/]")
_NOT_UTF8 = "cannot be read as UTF-8 text. Save it with the encoding UTF-8"
#: Maximum size in bytes of a caption file and of a metadata file.
_MAX_CAPTION, _MAX_METADATA = 1 << 20, 1 << 28
#: Rows of a metadata file, and problems with it after which it is not read further.
_MAX_ROWS, _MAX_PROBLEMS = 1_000_000, 1000


@dataclass(frozen=True)
class CaptionedFolder:
    """A folder of images, with a prompt for those without a caption.

    Attributes:
        repeats: how many times each image is used in an epoch.
        concept: name of a sub-folder that sets prompt and repeats; None for the whole folder.
    """

    path: Path
    prompt: str
    repeats: int = 1
    concept: str | None = None


@dataclass(frozen=True)
class ListedImage:
    """What a metadata file says about an image.

    Attributes:
        caption: "" if it has none; the first if it has several.
        mask: path of its mask relative to the folder, as it is written there.
        controls: paths of its control images in the folder.
        other_captions: further ones.
    """

    caption: str = ""
    mask: str | None = None
    controls: tuple[str, ...] = ()
    other_captions: tuple[str, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions; none if there is none."""
        return (self.caption, *self.other_captions) if self.caption else ()


def concept_name(name: str) -> tuple[int, str] | None:
    """Return repeats and prompt of a folder named as in kohya's sd-scripts; None if it is not.

    ``10_sks dog`` contains images of "sks dog", each of which is used ten times. A longer number,
    as in ``20260131_trip``, is a date and not a concept.
    """
    match = re.fullmatch(r"([1-9]\d{0,4})_(.+)", name)
    return (int(match[1]), one_line(match[2])) if match else None


def concept_folders(folder: Path) -> list[CaptionedFolder]:
    """Return the sub-folders with a ``concept_name``, sorted."""
    return [
        CaptionedFolder(folder / name, named[1], named[0], name)
        for name in sorted(os.listdir(folder))
        if (named := concept_name(name)) and (folder / name).is_dir()
    ]


def count_images(folder: Path) -> int:
    """Return the number of images in a folder, and in those of its concepts; masks are none."""
    parts = [folder, *(concept.path for concept in concept_folders(folder))]
    return sum(len(folder_images(os.listdir(part)).images) for part in parts)


def is_caption_file(name: str) -> bool:
    """Return whether a file of this name may contain captions that are read here."""
    return name.lower() in METADATA_NAMES or name.lower().endswith(CAPTION_ENDINGS)


# -- metadata files --------------------------------------------------------------------------------


def read_metadata(
    folder: Path,
    names: Iterable[str],
    column: str | None,
    problems: list[str],
    mask_column: str | None = None,
    control_columns: Sequence[str] = (),
) -> dict[str, ListedImage]:
    """Return file name -> what a folder's metadata file says about it.

    Args:
        names: of the files in the folder. Nothing is listed without a metadata file.
        column: of the caption; None for the first of ``CAPTION_COLUMNS`` that a line has.
        problems: problems are appended to it.
        mask_column: of the mask; None for the first of ``MASK_COLUMNS`` that a line has.
        control_columns: of the control images; a line may lack them.
    """
    listings = sorted(name for name in names if name.lower() in METADATA_NAMES)
    if len(listings) > 1:
        problems.append(f"{' and '.join(listings)} both list images. Keep one of them")
    if len(listings) != 1:
        return {}
    (name,) = listings
    try:
        data = read_regular(folder / name, _MAX_METADATA)
        rows = _READERS[Path(name).suffix.lower()](data, name, problems)
        entries = list(islice(rows, _MAX_ROWS + 1))
        if len(entries) > _MAX_ROWS:
            raise ValueError(f"it has more than {_MAX_ROWS:,} rows")
    except UnicodeDecodeError as error:
        problems.append(f"{name} {_NOT_UTF8} ({error})")
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{name} cannot be read: {error}")
        return {}
    found: dict[str, ListedImage] = {}
    for where, entry in entries:
        if _ended(name, problems):
            break
        controls = _controls(folder, where, entry, control_columns, problems)
        _read_entry(folder, where, entry, _columns(column), mask_column, controls, found, problems)
    seen = sorted({str(key) for _, entry in entries for key in entry})
    for option, given in (("caption_column", column), ("mask_column", mask_column)):
        if given and seen and given not in seen:
            problems.append(
                f"--{option} is {given!r}, but {name} has no such column. It has: {', '.join(seen)}"
            )
    return found


def _read_entry(
    folder: Path,
    where: str,
    entry: Mapping[str, Any],
    columns: Sequence[str],
    mask_column: str | None,
    controls: tuple[str, ...],
    found: dict[str, ListedImage],
    problems: list[str],
) -> None:
    """Add what one line says to ``found``."""
    name = next((entry[c] for c in NAME_COLUMNS if entry.get(c) is not None), None)
    if not isinstance(name, str) or not name:
        problems.append(f'{where} must be like {{"file_name": "1.jpg", "text": "a caption"}}')
        return
    text = next((entry[c] for c in columns if entry.get(c) is not None), "")
    mask_columns = (mask_column,) if mask_column else MASK_COLUMNS
    mask = next((entry[c] for c in mask_columns if entry.get(c)), None)
    if problem := place_problem(folder, name):
        problems.append(f"{where} names {name}, {problem}")
        return
    name = Path(name).as_posix()
    texts = text if isinstance(text, list) else [text]
    if not all(isinstance(one, str) for one in texts):
        problems.append(f"{where}: the caption is {text!r}; it must be text, or a list of texts")
    elif not all(map(_is_text, texts)):
        problems.append(f"{where}: the caption contains characters that are not Unicode")
    elif not isinstance(mask, str | None):
        problems.append(f"{where}: the mask is {mask!r}; it must be the path of an image")
    else:
        first, *others = distinct_lines(texts) or [""]
        where_mask = Path(mask).as_posix() if mask else None
        listed = ListedImage(first, where_mask, controls, tuple(others))
        earlier = found.setdefault(name, listed)
        if earlier.captions != listed.captions:
            problems.append(f"{where} gives {name} a second, different caption")
        if earlier.mask != listed.mask:
            problems.append(f"{where} gives {name} a second, different mask")
        if earlier.controls != listed.controls:
            problems.append(f"{where} gives {name} other control images than an earlier line")


def _controls(
    folder: Path,
    where: str,
    entry: Mapping[str, Any],
    columns: Sequence[str],
    problems: list[str],
) -> tuple[str, ...]:
    """Return the paths of a line's control images: each column has one or several."""
    found: list[str] = []
    for column in columns:
        value = entry.get(column)
        names = value if isinstance(value, list) else [value]
        for name in (name for name in names if name not in (None, "")):
            if not isinstance(name, str):
                problems.append(
                    f"{where}: {column} is {value!r}; it must be the path of an image, or a list "
                    "of paths"
                )
            elif problem := place_problem(folder, name):
                problems.append(f"{where} names the control image {name}, {problem}")
            else:
                found.append(Path(name).as_posix())
    return tuple(found)


def place_problem(folder: Path, name: str) -> str | None:
    """Return why a path in a metadata file does not name an image of the folder, or None."""
    path = folder / name
    if _ELSEWHERE.match(name) and not is_regular(path):
        return (
            "which is an address or a path on another machine. Put the image into the folder, and "
            "give its path relative to the folder"
        )
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return "which is not in the folder"
    if not is_regular(path):
        hint = ". Write / between folders" if "\\" in name and "/" not in name else ""
        return "which is not a file" if _exists(path) else f"which does not exist{hint}"
    # the image itself may be a link, as in the Hub's cache, but its folder must be inside
    if not real_path(path.parent).is_relative_to(real_path(folder)):
        return "which is not in the folder: a link in its path leads out of it"
    return None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _json_lines(
    data: bytes, name: str, problems: list[str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # only at line feeds: strings in JSON may contain other characters that Python splits lines at
    for number, line in enumerate(io.StringIO(data.decode("utf-8-sig"), newline="\n"), 1):
        if not line.strip():
            continue
        if _ended(name, problems):
            return
        where = f"{name}, line {number}"
        try:
            entry = parse_json(line)
        except ValueError as error:
            problems.append(f"{where} is not JSON: {error}")
            continue
        if isinstance(entry, dict):
            yield where, entry
        else:
            problems.append(f'{where} must be like {{"file_name": "1.jpg", "text": "a caption"}}')


def _csv_rows(
    data: bytes, name: str, problems: list[str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
    try:
        _check_columns(rows.fieldnames or ())
        for row in rows:
            if _ended(name, problems):
                return
            if None in row:
                problems.append(
                    f"{name}, line {rows.line_num} has more fields than the first line. Put a "
                    "caption with commas in quotes"
                )
            else:
                # in CSV, an empty field means that there is no value
                yield f"{name}, line {rows.line_num}", {k: v or None for k, v in row.items()}
    except csv.Error as error:
        problems.append(f"{name}, line {rows.line_num} is not CSV: {error}")


def _parquet_rows(
    data: bytes, name: str, problems: list[str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    del problems
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("this needs: pip install pyarrow") from error
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        columns = file.schema_arrow.names
        _check_columns(columns)
        # other columns may contain the images themselves
        kinds = zip(columns, file.schema_arrow.types, strict=True)
        texts = [column for column, kind in kinds if _is_text_column(kind)]
        chunks = [chunk for group in read_chunks(io.BytesIO(data)) for chunk in group]
        sizes = [chunk.unpacked for chunk in chunks if chunk.column in texts]
        if sum(sizes) > _MAX_METADATA:
            raise ValueError(f"its text columns have more than {_MAX_METADATA:,} bytes")
        if file.metadata.num_rows > _MAX_ROWS:
            raise ValueError(f"it has more than {_MAX_ROWS:,} rows")
        # a text that is stored once may be the value of all rows
        together = max(4, min(1024, _MAX_METADATA // max([1, *sizes])))
        number = total = 0
        for batch in file.iter_batches(together, columns=texts):
            total += batch.nbytes
            if total > _MAX_METADATA:
                raise ValueError(f"its text columns have more than {_MAX_METADATA:,} bytes")
            for row in batch.to_pylist():
                yield f"{name}, row {number}", dict.fromkeys(columns) | row
                number += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"it is not a complete Parquet file ({error})") from error


def _ended(name: str, problems: list[str]) -> bool:
    """Whether there are so many problems that a file is not read further, which is said once."""
    last = f"{name} is not read further. Mend these problems first"
    if len(problems) == _MAX_PROBLEMS:
        problems.append(last)
    return len(problems) > _MAX_PROBLEMS


def _is_text_column(kind: Any) -> bool:
    """Whether a column's values are texts or lists of texts."""
    from pyarrow.types import is_list, is_string

    return bool(is_string(kind) or (is_list(kind) and is_string(kind.value_type)))


def _check_columns(columns: Sequence[str]) -> None:
    if not set(NAME_COLUMNS) & set(columns):
        raise ValueError(
            f"none of its columns is called {' or '.join(NAME_COLUMNS)}. It has: "
            f"{', '.join(columns) or 'none'}"
        )


_READERS = {".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}


# -- files beside the images ---------------------------------------------------------------------


def caption_files(images: Iterable[str], names: Iterable[str]) -> dict[str, list[str]]:
    """Return image -> files beside it that may contain its caption, in order of precedence.

    ``1.txt`` and ``1.png.txt`` belong to ``1.png``. Upper and lower case may differ, as in
    ``1.TXT``, or ``1.txt`` for ``1.PNG``, unless another image has exactly that name.

    Args:
        images: names of the images in one folder.
        names: of all files there.
    """
    exact, folded = defaultdict(list), defaultdict(list)
    found: dict[str, list[str]] = {image: [] for image in images}
    for image in found:
        for key in (os.path.splitext(image)[0], image):
            exact[key].append(image)
            folded[key.lower()].append(image)
    for ending in CAPTION_ENDINGS:
        beside = [
            (name[: -len(ending)], not name.endswith(ending), name)
            for name in names
            if name.lower().endswith(ending)
        ]
        for key, _, name in sorted(beside, key=lambda b: (b[0] not in exact, b[1], len(b[0]), b)):
            for image in exact.get(key) or folded.get(key.lower()) or ():
                found[image].append(name)
    return found


def read_caption(path: Path, column: str | None, problems: list[str]) -> str | None:
    """Return the first of the captions that ``read_captions`` returns, or "" if there is none."""
    found = read_captions(path, column, problems)
    return found if found is None else next(iter(found), "")


def read_captions(
    path: str | Path, column: str | None, problems: list[str], per_line: bool = False
) -> list[str] | None:
    """Return the captions in a file beside an image, each as one line; none if it is empty.

    Returns None for a .json file that does not contain a caption.

    Args:
        column: key of the caption in a .json file; None for the first of ``CAPTION_COLUMNS``. It
            may have a list of captions.
        problems: problems are appended to it.
        per_line: each line of a text file is a caption, instead of all of them together.
    """
    path = os.fspath(path)
    is_json = path.lower().endswith(".json")
    try:
        text = read_regular(path, _MAX_CAPTION).decode("utf-8-sig")
        if not is_json:
            return distinct_lines(text.split("\n") if per_line else [text])
        entry = parse_json(text)
        found = [entry[c] for c in _columns(column) if entry.get(c) is not None]
        given = found[0]
        texts = given if isinstance(given, list) else [given]
        if all(isinstance(one, str) and _is_text(one) for one in texts):
            return distinct_lines(texts)
        return None
    except UnicodeDecodeError as error:
        problem = f"{os.path.basename(path)} {_NOT_UTF8} ({error})"
    except OSError as error:
        problem = f"{os.path.basename(path)} cannot be read: {error}"
    except (ValueError, AttributeError, IndexError):
        return None  # annotations of another kind
    if is_json:
        return None
    problems.append(problem)
    return []


def distinct_lines(texts: Iterable[str]) -> list[str]:
    """Return texts as one line each, without empty ones and repetitions."""
    return list(dict.fromkeys(filter(None, map(one_line, texts))))


def _columns(column: str | None) -> tuple[str, ...]:
    return (column,) if column else CAPTION_COLUMNS


def _is_text(text: str) -> bool:
    """Return whether a text can be encoded; JSON may contain halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_line(text: str | None) -> str:
    """Return ``text`` without line breaks and superfluous spaces; "" for None."""
    return " ".join((text or "").split())
