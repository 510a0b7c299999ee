"""Captions of the pictures in a folder: ``metadata.jsonl``, ``.txt`` and ``.caption`` files, and
names of sub-folders.

What is wrong with them is appended to a list of problems, so that all of it can be told at once.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

METADATA_NAME = "metadata.jsonl"
#: Endings of files with a picture's caption beside it; the first that is there counts.
CAPTION_ENDINGS = (".txt", ".caption")
#: Columns of metadata.jsonl that may hold the caption; the first that a line has is taken.
CAPTION_COLUMNS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class PictureFolder:
    """Pictures with one prompt for those that have none.

    Attributes:
        repeats: how many times each counts in an epoch.
        concept: name of a sub-folder that tells prompt and repeats; None for the whole folder.
    """

    path: Path
    prompt: str
    repeats: int = 1
    concept: str | None = None


def concept_folders(folder: Path) -> list[PictureFolder]:
    """Return the sub-folders named as kohya's sd-scripts want them, sorted by name.

    ``10_sks dog`` holds pictures of "sks dog", each of which counts ten times.
    """
    named = {path: re.fullmatch(r"([1-9]\d*)_(.+)", path.name) for path in folder.iterdir()}
    return [
        PictureFolder(path, one_line(match[2]), int(match[1]), path.name)
        for path, match in sorted(named.items())
        if match and path.is_dir()
    ]


def read_metadata(folder: Path, column: str | None, problems: list[str]) -> dict[str, str]:
    """Return file name -> caption ("" if the line has none) of ``metadata.jsonl``.

    Args:
        folder: holds the file, or not: then there are no captions.
        column: of the caption; None: the first of ``CAPTION_COLUMNS`` that a line has.
        problems: what is wrong is appended.
    """
    path = folder / METADATA_NAME
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{METADATA_NAME} cannot be read as UTF-8 text: {error}")
        return {}
    columns = (column,) if column else CAPTION_COLUMNS
    captions: dict[str, str] = {}
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{METADATA_NAME}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{where} is not JSON: {error}")
            continue
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            problems.append(f'{where} must be like {{"file_name": "1.jpg", "text": "a caption"}}')
            continue
        seen |= entry.keys()
        text = next((entry[c] for c in columns if entry.get(c) is not None), "")
        name = Path(name).as_posix()
        if not isinstance(text, str):
            problems.append(f"{where}: the caption is {text!r}; it must be a text")
        elif Path(name).is_absolute() or ".." in Path(name).parts:
            problems.append(f"{where} names {name}, which is not in the folder")
        elif not (folder / name).is_file():
            problems.append(f"{where} names {name}, which does not exist")
        elif captions.get(name, one_line(text)) != one_line(text):
            problems.append(f"{where} gives {name} a second, different caption")
        else:
            captions[name] = one_line(text)
    if column and seen and column not in seen:
        there = ", ".join(sorted(seen))
        problems.append(
            f"--caption_column is {column!r}, which {METADATA_NAME} lacks. It has: {there}"
        )
    return captions


def caption_beside(picture: Path, problems: list[str]) -> str:
    """Return the caption in the file beside a picture, as one line; "" if there is none."""
    beside = (picture.with_suffix(ending) for ending in CAPTION_ENDINGS)
    path = next((path for path in beside if path.is_file()), None)
    if path is None:
        return ""
    try:
        return one_line(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path.name} cannot be read as UTF-8 text: {error}")
        return ""


def one_line(text: str | None) -> str:
    """Return ``text`` without line breaks and superfluous spaces; "" for None."""
    return " ".join((text or "").split())
