"""Objects of JSON in files that others gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .regular_files import read_regular

#: More than any config, index or result has.
MOST_BYTES = 64 << 20


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Return the object that a text of JSON holds; a byte order mark in bytes is passed over.

    Raises:
        ValueError: it is no JSON, nested too deeply, or holds something other than an object.
    """
    try:
        content = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text in UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object ({{...}})")
    return content


def read_object(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Read a file that holds one object of JSON.

    Raises:
        OSError: the file cannot be read, is no regular file, or has more bytes than allowed.
        ValueError: it holds no such object; see :func:`parse_object`.
    """
    return parse_object(read_regular(path, most_bytes))
