"""Read JSON from untrusted files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .regular_files import read_regular

#: Maximum size of a file. No config, index or result is as large.
MOST_BYTES = 64 << 20
#: Commas and opening brackets at most: a text has about as many as values. Each takes up to 130
#: bytes and 1.2 microseconds, measured in the worst texts that were found.
MOST_SEPARATORS = 2_000_000
#: Levels of lists and objects at most, so that values can be compared, copied and printed, which
#: takes several calls for each level.
MOST_LEVELS = 64
#: An escape of half a character, perhaps beside the other half.
_HALF = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def parse(text: str | bytes) -> Any:
    """Return the value in a JSON text; a byte order mark in bytes is ignored.

    Raises:
        ValueError: the text is not JSON, has too many values, is nested too deeply, or has halves
            of characters.
    """
    try:
        if isinstance(text, bytes):  # json.loads would let halves of characters pass
            text = text.decode(json.detect_encoding(text))
        check_separators(text)
        content = json.loads(text)
        if _HALF.search(text):
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it has an escape that is half of a character") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is not text in UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _levels(content) > MOST_LEVELS:
        raise ValueError("it is nested too deeply")
    return content


def check_separators(text: str | bytes) -> None:
    """Check how many values a JSON text may have, before they are made.

    Raises:
        ValueError: it has more than ``MOST_SEPARATORS`` commas and opening brackets.
    """
    if isinstance(text, bytes):
        count = sum(map(text.count, (b",", b"[", b"{")))
    else:
        count = sum(map(text.count, ",[{"))
    if count > MOST_SEPARATORS:
        raise ValueError(
            f"it has {count:,} commas and opening brackets; at most {MOST_SEPARATORS:,} are allowed"
        )


def _levels(value: Any) -> int:
    """Return how deep lists and objects are nested, or one more than is allowed."""
    inside, levels = [value] if isinstance(value, (dict, list)) else [], 0
    while inside and levels <= MOST_LEVELS:
        levels += 1
        inside = [
            part
            for outer in inside
            for part in (outer.values() if type(outer) is dict else outer)
            if type(part) is dict or type(part) is list
        ]
    return levels


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Return the object in a JSON text; a byte order mark in bytes is ignored.

    Raises:
        ValueError: as :func:`parse`, or the text is not an object.
    """
    content = parse(text)
    if not isinstance(content, dict):
        raise ValueError(f"it contains a {type(content).__name__}, not an object ({{...}})")
    return content


def read_object(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Read a file with one JSON object.

    Raises:
        OSError: the file cannot be read, is not a regular file, or has more bytes than allowed.
        ValueError: it does not contain an object; see :func:`parse_object`.
    """
    return parse_object(read_regular(path, most_bytes))
