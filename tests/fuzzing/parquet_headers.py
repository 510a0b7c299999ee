"""Parquet files whose headers lie: numbers of the footer, or of a page, by Thrift's protocol.

The format is Apache's ``parquet.thrift``, written in Thrift's compact protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

_TRUE, _FALSE, _BYTE, _INTEGERS, _DOUBLE, _BINARY = 1, 2, 3, (4, 5, 6), 7, 8
_LISTS, _STRUCT = (9, 10), 12
#: Numbers that take the place of others, besides some that depend on them.
_ODD = (0, 1, -1, 127, 2**15, 2**31 - 1, -(2**31), 2**31, 2**40, 2**63 - 1)


@dataclass
class _Field:
    """A field of a struct, or an element of a list, whose number is 0."""

    number: int
    kind: int
    value: Any


class _List(list[_Field]):
    """A list with the type of its elements."""

    kind = _STRUCT


def change_headers(data: bytes, chance: Random) -> bytes:
    """Change a number in the header of a page, or some in the footer; offsets stay right."""
    size = int.from_bytes(data[-8:-4], "little")
    footer, _ = read_struct(data, len(data) - 8 - size)
    body = bytearray(data[: len(data) - 8 - size])
    changes = chance.choice((1, 1, 2, 3))
    if chance.random() < 0.5:
        changes -= 1
        chunk = chance.choice(list(_chunks(footer)))
        start = chunk.get(11, chunk[9]).value
        at = chance.choice(list(_pages(body, start, start + chunk[7].value)))
        header, end = read_struct(body, at)
        _change(header, chance)
        written = write_struct(header)
        body[at:end] = written
        _shift(footer, at, len(written) - (end - at))
        chunk[7].value += len(written) - (end - at)
    for _ in range(changes):
        _change(footer, chance)
    written = write_struct(footer)
    return bytes(body) + written + len(written).to_bytes(4, "little") + data[-4:]


def _change(fields: list[_Field], chance: Random) -> None:
    field = chance.choice(list(_numbers(fields)))
    old = field.value
    field.value = chance.choice((*_ODD, -old, old + 1, old - 1, old * 2, old * 1000))


def _numbers(fields: list[_Field]) -> Iterator[_Field]:
    for field in fields:
        if field.kind in _INTEGERS:
            yield field
        elif field.kind == _STRUCT or field.kind in _LISTS:
            yield from _numbers(field.value)


def _by_number(fields: list[_Field]) -> dict[int, _Field]:
    return {field.number: field for field in fields}


def _chunks(footer: list[_Field]) -> Iterator[dict[int, _Field]]:
    """Yield the metadata of each column of each group of rows."""
    for group in _by_number(footer)[4].value:
        for chunk in _by_number(group.value)[1].value:
            yield _by_number(_by_number(chunk.value)[3].value)


def _pages(body: bytes | bytearray, start: int, stop: int) -> Iterator[int]:
    """Yield where the headers of pages begin."""
    while 0 <= start < stop <= len(body):
        yield start
        header, end = read_struct(body, start)
        start = end + max(0, _by_number(header)[3].value)


def _shift(footer: list[_Field], at: int, by: int) -> None:
    """Move what lies behind a place in the file."""
    for chunk in _chunks(footer):
        for number in (9, 10, 11):
            if number in chunk and chunk[number].value > at:
                chunk[number].value += by


# -- Thrift's compact protocol ---------------------------------------------------------------------


def _read_number(data: bytes | bytearray, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _write_number(value: int) -> bytes:
    value &= 2**64 - 1
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    return bytes([*written, value])


def _read(data: bytes | bytearray, at: int, kind: int) -> tuple[Any, int]:
    if kind in (_TRUE, _FALSE):
        return None, at
    if kind == _BYTE:
        return data[at], at + 1
    if kind in _INTEGERS:
        value, at = _read_number(data, at)
        return (value >> 1) ^ -(value & 1), at
    if kind == _DOUBLE:
        return data[at : at + 8], at + 8
    if kind == _BINARY:
        size, at = _read_number(data, at)
        return data[at : at + size], at + size
    if kind in _LISTS:
        count, kind, at = data[at] >> 4, data[at] & 15, at + 1
        if count == 15:
            count, at = _read_number(data, at)
        elements = _List()
        elements.kind = kind
        for _ in range(count):
            if kind in (_TRUE, _FALSE):  # in a list, each has a byte
                value, at = data[at], at + 1
                elements.append(_Field(0, _BYTE, value))
                continue
            value, at = _read(data, at, kind)
            elements.append(_Field(0, kind, value))
        return elements, at
    if kind == _STRUCT:
        return read_struct(data, at)
    raise ValueError(f"type {kind}")


def read_struct(data: bytes | bytearray, at: int) -> tuple[list[_Field], int]:
    """Return the fields of the struct at a place, and where it ends."""
    fields, number = list[_Field](), 0
    while data[at]:
        step, kind, at = data[at] >> 4, data[at] & 15, at + 1
        if step:
            number += step
        else:
            number, at = _read_number(data, at)
            number = (number >> 1) ^ -(number & 1)
        value, at = _read(data, at, kind)
        fields.append(_Field(number, kind, value))
    return fields, at + 1


def _write(kind: int, value: Any) -> bytes:
    if kind in (_TRUE, _FALSE):
        return b""
    if kind == _BYTE:
        return bytes([value])
    if kind in _INTEGERS:
        return _write_number(value << 1 ^ value >> 63)
    if kind == _DOUBLE:
        return bytes(value)
    if kind == _BINARY:
        return _write_number(len(value)) + bytes(value)
    if kind in _LISTS:
        inside, count = value.kind, len(value)
        front = bytes([count << 4 | inside]) if count < 15 else bytes([240 | inside])
        front += b"" if count < 15 else _write_number(count)
        return front + b"".join(_write(element.kind, element.value) for element in value)
    return write_struct(value)


def write_struct(fields: list[_Field]) -> bytes:
    """Return a struct's bytes: those that were read, if nothing was changed."""
    written, last = b"", 0
    for field in fields:
        step = field.number - last
        if 0 < step < 16:
            written += bytes([step << 4 | field.kind])
        else:
            written += bytes([field.kind]) + _write_number(field.number << 1)
        written += _write(field.kind, field.value)
        last = field.number
    return written + b"\0"
