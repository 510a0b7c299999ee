"""What was found of image files when they were decoded, remembered for later runs.

Decoding a hundred thousand images takes an hour. An entry of a file counts while its size and its
times of modification and of status change stay the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import PIL

from gralora_diffusion.io.image_files import DECODER_VERSION, read_image, read_mask, read_opacity
from gralora_diffusion.io.json_files import parse as parse_json
from gralora_diffusion.io.regular_files import check_regular
from gralora_diffusion.io.tensor_files import replacing

from .sources import Source, bytes_of

logger = logging.getLogger(__name__)

#: Bytes of the file at most; a million images need a fifth.
_MOST_BYTES = 1 << 30
#: Bytes of a line at most.
_MOST_LINE = 1 << 16
#: Seconds for which a file must not have changed: a change within a tick of a file system's clock
#: would leave its times as they are.
_SETTLED = 2.0

#: Where an image's parts that are not black begin and end: left, top, right, bottom.
Box = tuple[int, int, int, int]
#: Size in bytes, and the times of modification and status change in nanoseconds.
Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Facts:
    """What is known of an image file that was decoded.

    Attributes:
        content_key: SHA-256 of its bytes.
        size: width and height in pixels, upright.
        box: of a mask; None if it is all black.
        highest: value of a mask.
        warnings: problems that did not prevent reading.
        opaque: its opacity was asked for, and it has none.
    """

    content_key: str
    size: tuple[int, int]
    box: Box | None = None
    highest: int = 0
    warnings: tuple[str, ...] = ()
    opaque: bool = False


def facts_of_image(data: bytes) -> Facts:
    """Decode an image.

    Raises:
        ImageError: it cannot be decoded.
    """
    warnings: list[str] = []
    size = read_image(data, warnings).size
    return Facts(hashlib.sha256(data).hexdigest(), size, warnings=tuple(warnings))


def facts_of_mask(data: bytes, *, of_alpha: bool = False) -> Facts:
    """Decode a mask, or the opacity of an image.

    Raises:
        ImageError: it cannot be decoded.
    """
    content_key = hashlib.sha256(data).hexdigest()
    image = read_opacity(data) if of_alpha else read_mask(data)
    if image is None:
        return Facts(content_key, (0, 0), opaque=True)
    highest: Any = image.getextrema()[1]  # of a single band
    return Facts(content_key, image.size, image.getbbox(), highest)


#: What was done with a file, and its path -> its stamp then, and what was found.
Entries = dict[tuple[str, str], tuple[Stamp, Facts]]
#: Name of what is done with a file -> how.
_WORK: dict[str, Callable[[bytes], Facts]] = {
    "image": facts_of_image,
    "mask": facts_of_mask,
    "opacity": partial(facts_of_mask, of_alpha=True),
}


class CheckedFiles:
    """Decodes the files of a folder of images, and remembers what it found.

    Use it as a context manager: on leaving, whatever the reason, new results are written.

    Args:
        images: the folder of images. Its masks and control images may lie elsewhere.
        cache: folder of the caches; without one, nothing is remembered.
        write: whether new results are written.
    """

    def __init__(self, images: Path, cache: str | Path | None, *, write: bool = True) -> None:
        name = hashlib.sha256(os.fsencode(images.absolute())).hexdigest()[:16]
        self._file = Path(cache) / f"checked-{name}.jsonl" if cache else None
        self._write = write
        self._before: Entries = {}
        self._now: Entries = {}
        self._is_new = False

    def __enter__(self) -> CheckedFiles:
        if self._file is not None:
            # it may be gone, damaged, or of another version: then everything is checked again
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                self._before = _read(self._file)
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is None or not (self._is_new and self._write):
            return
        whole = error[0] is None
        entries = self._now if whole else self._before | self._now
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._file) as temporary, temporary.open("w", encoding="utf-8") as file:
                file.write(f"{json.dumps(_VERSION)}\n")
                for (kind, path), (stamp, facts) in entries.items():
                    file.write(f"{json.dumps([kind, path, stamp, *astuple(facts)])}\n")
        except OSError as problem:
            logger.warning(
                "%s cannot be written: %s. The next start checks the images again",
                self._file,
                problem,
            )

    def knows(self, kind: str, source: Source) -> bool:
        """Return whether a file was decoded before, as far as that is known without opening it."""
        return isinstance(source, Path) and (kind, str(source.absolute())) in self._before

    def decode(self, kind: str, source: Source) -> Facts:
        """Return what is known of an "image", a "mask" or the "opacity" of an image.

        It may be called from several threads.

        Raises:
            OSError, ValueError: the file cannot be read, or not decoded. This is not remembered.
        """
        work = _WORK[kind]
        if self._file is None or not isinstance(source, Path):
            return work(bytes_of(source))
        key, stamp = (kind, str(source.absolute())), _stamp(source)
        found = self._before.get(key)
        if found is None or found[0] != stamp:
            began = time.time()
            found = stamp, work(bytes_of(source))
            if max(stamp[1:]) / 1e9 > began - _SETTLED or _stamp(source) != stamp:
                return found[1]
            self._is_new = True
        self._now[key] = found
        return found[1]


#: First line of a file: by which decoder its results are.
_VERSION = {"format": 1, "decoder": DECODER_VERSION, "pillow": PIL.__version__}


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(path: Path) -> Entries:
    """Return the entries of a file.

    Raises:
        OSError, ValueError, TypeError, KeyError: there are none, or damaged ones.
    """
    if check_regular(path).st_size > _MOST_BYTES:
        return {}
    entries: Entries = {}
    with path.open("rb") as file:
        if parse_json(file.readline(_MOST_LINE)) != _VERSION:
            return {}
        while line := file.readline(_MOST_LINE):
            kind, name, stamp, *values = parse_json(line)
            entries[kind, name] = _numbers(stamp, 3), _facts(*values)
    return entries


def _facts(content_key: Any, size: Any, box: Any, highest: Any, texts: Any, opaque: Any) -> Facts:
    """Return facts from JSON values, which must be such as are written."""
    if not re.fullmatch("[0-9a-f]{64}", content_key) or not all(isinstance(t, str) for t in texts):
        raise ValueError("no facts of an image")
    whole = None if box is None else _numbers(box, 4)
    (level,) = _numbers([highest], 1)
    return Facts(content_key, _numbers(size, 2), whole, level, tuple(texts), opaque is True)


def _numbers(values: Any, count: int) -> Any:
    """Return as many whole numbers from 0 on as a tuple."""
    if len(values) != count or not all(type(n) is int and n >= 0 for n in values):
        raise ValueError("no whole numbers")
    return tuple(values)
