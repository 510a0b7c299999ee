"""Examples in columns, because an object for each of a million images would take gigabytes."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

from .image_folder import Example


class ExampleTable(Sequence[Example]):
    """Examples, each of which is made when it is asked for.

    An image takes 52 bytes, the 64 characters of its hash, its file's name and its caption. What it
    shares with others, such as the folder, is kept once. Masks, control images and further captions
    take as much as in examples.
    """

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._texts = bytearray()  # name, caption and hash of each, in UTF-8
        self._ends = array("Q", [0])  # of each text
        self._sizes = array("Q")  # width and height of each
        self._shared: list[Example] = []  # an example of each kind, which has the rest
        self._kinds = array("L")
        numbers: dict[tuple[object, ...], int] = {}
        for example in examples:
            source = example.source
            # of other sources, two may be equal and yet be of different datasets
            folder, name = (source.parent, source.name) if isinstance(source, Path) else (None, "")
            kind = (
                folder or id(source),
                example.repeats,
                example.concept,
                example.mask,
                example.controls,
                id(example.image_set),
                example.other_captions,
            )
            if (number := numbers.setdefault(kind, len(numbers))) == len(self._shared):
                self._shared.append(example)
            self._kinds.append(number)
            self._sizes.extend(example.size)
            for text in (name, example.caption, example.content_key):
                self._texts += text.encode(errors="surrogatepass")  # names may be any bytes
                self._ends.append(len(self._texts))
        self._rows = range(len(self._kinds))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> ExampleTable: ...
    def __getitem__(self, place: int | slice) -> Example | ExampleTable:
        """Return an example, or a part of the table, which shares its columns."""
        if isinstance(place, slice):
            part = copy.copy(self)
            part._rows = self._rows[place]
            return part
        row = self._rows[place]
        shared = self._shared[self._kinds[row]]
        begin, *ends = self._ends[3 * row : 3 * row + 4]
        name, caption, content_key = (
            self._texts[start:end].decode(errors="surrogatepass")
            for start, end in zip((begin, *ends), ends, strict=False)
        )
        source = shared.source
        return Example(
            source.with_name(name) if isinstance(source, Path) else source,
            caption,
            content_key,
            (self._sizes[2 * row], self._sizes[2 * row + 1]),
            shared.repeats,
            shared.concept,
            shared.mask,
            shared.controls,
            shared.image_set,
            shared.other_captions,
        )
