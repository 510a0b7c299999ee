"""Parquet files, checked by their headers before anything decodes them.

A small file may contain huge columns: a text that is stored once can be the value of every row. The
header of each page says how large it becomes, so that such a file is refused before memory is used.
pyarrow does not tell: it ends the process if ``RowGroupMetaData.column`` finds a contradiction.

The format is Apache's ``parquet.thrift``, written in Thrift's compact protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

#: What a file may become in memory: so many bytes, or so many times its size if that is more.
MOST_BYTES, MOST_TIMES = 128 << 20, 16
_MOST_FOOTER = 8 << 20
#: pyarrow's limit of a page's header, too.
_MOST_HEADER = 16 << 20
_MOST_PAGES = 250_000
#: A dictionary of more texts is not searched for the longest.
_MOST_SEARCHED = 1_000_000
#: Rows that are read at a time.
_MOST_ROWS = 1024
_MOST_LEVELS = 16
#: Bytes that any value takes in memory, null included.
_VALUE_BYTES = 4
_WIDEST_NUMBER = 12
#: Numbers of the format: types of values, of pages, and encodings.
_BYTE_ARRAY, _FIXED_BYTES = 6, 7
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_2 = 0, 2, 3
_DICTIONARIES, _COMMON_PREFIXES = (2, 8), 7
#: Compressions by pyarrow's names.
_CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}

_Struct = Mapping[int, Any]


@dataclass(frozen=True)
class Chunk:
    """A column in a group of rows.

    Attributes:
        column: name of the column; of a nested one, the outermost name.
        unpacked: bytes of its pages without compression.
        longest: bytes that a value may have that is stored once for many; 0 if none is.
        most: bytes that its values take at most.
    """

    column: str
    unpacked: int
    longest: int
    most: int


def check_parquet(paths: Sequence[Path]) -> None:
    """Check that the columns of files are together not far larger than the files.

    If the headers do not rule it out, columns without lists are read, a few rows at a time.

    Raises:
        OSError: a file cannot be read.
        ValueError: headers are damaged, or the columns are too large.
    """
    limit = max(MOST_BYTES, MOST_TIMES * sum(path.stat().st_size for path in paths))
    for needed_by in (_bytes_by_headers, _bytes_by_rows):
        left = limit
        for path in paths:
            try:
                with path.open("rb") as file:
                    left -= needed_by(file, left)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            if left < 0:
                break
        else:
            return
    raise ValueError(
        f"{path}: with its columns, more than {limit:,} bytes of memory are needed, most for texts "
        "or images that are repeated. Write it without dictionaries"
    )


def _bytes_by_headers(file: BinaryIO, enough: int) -> int:
    """Return the bytes that columns need at most; ``enough`` is for both such functions."""
    del enough
    return sum(chunk.most for group in read_chunks(file) for chunk in group)


def _bytes_by_rows(file: BinaryIO, enough: int) -> int:
    """Return the bytes that columns need, or some number above ``enough``."""
    unpacked = sum(chunk.unpacked for group in read_chunks(file) for chunk in group)
    if unpacked > enough:
        return unpacked
    import pyarrow
    import pyarrow.parquet

    groups, needed = read_chunks(file, search=True), 0
    try:
        opened = pyarrow.parquet.ParquetFile(file)
        columns = [opened.schema.column(number) for number in range(len(opened.schema))]
        for number, group in enumerate(groups):
            read, longest = list[str](), 1
            for column, chunk in zip(columns, group, strict=True):
                if chunk.longest and not column.max_repetition_level:
                    read.append(column.path)
                    longest = max(longest, chunk.longest)
                else:
                    needed += chunk.most
            rows = min(_MOST_ROWS, MOST_BYTES // longest) or 1
            for batch in opened.iter_batches(rows, [number], read) if read else ():
                needed += sum(map(_decoded_bytes, batch))
                if needed > enough:
                    return needed
    except pyarrow.ArrowException as error:
        raise ValueError(f"it is not a complete Parquet file ({error})") from error
    return needed


def _decoded_bytes(array: Any) -> int:
    """Return the bytes of an array in which no two values share a text."""
    from pyarrow.types import is_dictionary, is_struct

    if is_struct(array.type):
        return sum(map(_decoded_bytes, array.flatten()))
    size: int = (array.dictionary_decode() if is_dictionary(array.type) else array).nbytes
    return size


def read_chunks(file: BinaryIO, *, search: bool = False) -> list[list[Chunk]]:
    """Return the columns of each group of rows.

    Args:
        search: read the dictionaries, so that a text counts as the longest one of its dictionary,
            not as all of it.

    Raises:
        OSError: the file cannot be read.
        ValueError: its headers are damaged.
    """
    try:
        return list(_Headers(file, search).groups())
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError("it is not a complete Parquet file") from error


class _Headers:
    def __init__(self, file: BinaryIO, search: bool) -> None:
        self._file, self._search = file, search
        self._size, self._pages = file.seek(0, 2), 0

    def groups(self) -> Iterator[list[Chunk]]:
        for group in self._footer().get(4, ()):
            chunks = [self._chunk(chunk[3]) for chunk in group[1]]
            rows = group[3]  # for so many, a reader reserves memory
            if not 0 <= rows <= min((count for _, count in chunks), default=0):
                raise ValueError(f"its number of rows, {rows:,}, is impossible")
            yield [chunk for chunk, _ in chunks]

    def _footer(self) -> _Struct:
        end = self._read(self._size - 8, 8)
        size = int.from_bytes(end[:4], "little")
        if end[4:] != b"PAR1" or size > self._size - 12:
            raise ValueError("it is not a complete Parquet file")
        if size > _MOST_FOOTER:
            raise ValueError(f"its footer has {size:,} bytes, more than {_MOST_FOOTER:,}")
        return _Compact(self._read(self._size - 8 - size, size)).struct()

    def _chunk(self, described: _Struct) -> tuple[Chunk, int]:
        """Return a chunk, and how many values its pages have."""
        kind, values = _integer(described, 1), _integer(described, 5)
        unpacked = most = count = longest = repeated = 0
        for header, at in self._data(described, values):
            page, size = _integer(header, 1), _integer(header, 2)
            unpacked, most = unpacked + size, most + size
            if page == _DICTIONARY_PAGE:
                longest = self._longest(kind, header, _integer(described, 4), at)
            elif page in (_DATA_PAGE, _DATA_PAGE_2):
                about = header[5 if page == _DATA_PAGE else 8]
                here, encoding = _integer(about, 1), _integer(about, 2 if page == _DATA_PAGE else 4)
                shared = longest if encoding in _DICTIONARIES else 0
                shared = size if encoding == _COMMON_PREFIXES else shared
                count, repeated = count + here, max(repeated, shared)
                most += here * (_VALUE_BYTES + shared)
        column = described[3][0].decode(errors="replace")
        return Chunk(column, unpacked, repeated, most), count

    def _data(self, described: _Struct, values: int) -> Iterator[tuple[_Struct, int]]:
        """Yield the header of each page, and where its data begin, as pyarrow finds them."""
        at = _integer(described, 9)
        if 0 < described.get(11, 0) < at:
            at = _integer(described, 11)
        stop = at + _integer(described, 7)
        if stop > self._size:
            raise ValueError("it is not a complete Parquet file")
        while at < stop and values > 0:
            header, at = self._header(at, stop)
            self._pages += 1
            if self._pages > _MOST_PAGES:
                raise ValueError(f"it has more than {_MOST_PAGES:,} pages")
            yield header, at
            at += _integer(header, 3)
            values -= _integer(header.get(5) or header.get(8) or {1: 0}, 1)

    def _header(self, at: int, stop: int) -> tuple[_Struct, int]:
        size = 4096
        while True:
            compact = _Compact(self._read(at, min(size, stop - at)))
            try:
                return compact.struct(), at + compact.at
            except IndexError:
                if size >= min(stop - at, _MOST_HEADER):
                    raise
                size *= 16

    def _longest(self, kind: int, header: _Struct, codec: int, at: int) -> int:
        """Return the most bytes that a value of a dictionary has."""
        size, count = _integer(header, 2), _integer(header[7], 1)
        if kind == _FIXED_BYTES:
            return -(-size // max(count, 1))
        if kind != _BYTE_ARRAY:
            return _WIDEST_NUMBER
        readable = codec == 0 or codec in _CODECS
        if not self._search or count > _MOST_SEARCHED or size > MOST_BYTES or not readable:
            return size
        data = self._read(at, _integer(header, 3))
        if codec:
            data = _unpacked(data, _CODECS[codec], size)
        longest = place = 0
        for _ in range(count):  # each text has its length before it
            length = int.from_bytes(data[place : place + 4], "little")
            longest, place = max(longest, length), place + 4 + length
            if place >= len(data):
                break
        return min(longest, size)

    def _read(self, at: int, size: int) -> bytes:
        if at < 0 or size < 0:
            raise ValueError("it is not a complete Parquet file")
        self._file.seek(at)
        return self._file.read(size)


def _unpacked(data: bytes, codec: str, size: int) -> bytes:
    import pyarrow

    try:
        return bytes(pyarrow.Codec(codec).decompress(data, size, asbytes=True))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"a dictionary cannot be unpacked: {error}") from error


def _integer(struct: _Struct, number: int) -> int:
    """Return a number of bytes, values, or the like.

    Raises:
        KeyError, ValueError: there is none, or it is negative.
    """
    value = struct[number]
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"its headers have an impossible number, {value!r:.40}")
    return value


class _Compact:
    """Thrift's compact protocol. Its methods raise ``IndexError`` where the bytes end too early."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def struct(self, level: int = 0) -> _Struct:
        """Read the values of a struct by their numbers."""
        if level > _MOST_LEVELS:
            raise ValueError("its headers are nested too deeply")
        fields, number = dict[int, Any](), 0
        while head := self._byte():
            step = head >> 4
            number = number + step if step else self._signed()
            kind = head & 15
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind, level)
        return fields

    def _value(self, kind: int, level: int) -> Any:
        if kind in (1, 2, 3):  # in a list, a truth value has a byte
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._unsigned())
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._unsigned()
            if level > _MOST_LEVELS:
                raise ValueError("its headers are nested too deeply")
            return [self._value(head & 15, level + 1) for _ in range(count)]
        if kind == 12:
            return self.struct(level + 1)
        raise ValueError(f"its headers have a value of an unknown type, {kind}")

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("its headers have a number of more than 64 bits")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

    def _bytes(self, size: int) -> bytes:
        self.at += size
        if self.at > len(self._data):
            raise IndexError
        return self._data[self.at - size : self.at]
