"""JSON of others is an object, or refused with a reason."""

import codecs
import copy
import json
import os

import pytest

from gralora_diffusion.io.json_files import MOST_SEPARATORS, parse, parse_object, read_object


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_an_object_with_or_without_a_byte_order_mark(mark, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(mark + '{"ä": [1, {"b": null}]}'.encode())
    assert read_object(path) == {"ä": [1, {"b": None}]}
    size = path.stat().st_size
    assert read_object(path, size)
    with pytest.raises(OSError, match=f"it has {size} bytes; at most {size - 1} are allowed"):
        read_object(path, size - 1)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[1, 2]", "it contains a list, not an object"),
        (b"null", "it contains a NoneType"),
        (b'"{}"', "it contains a str"),
        (b'{"a": "\xff"}', "it is not text in UTF-8"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"a":' * 100_000, "it is nested too deeply"),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "it is nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "integer"),
    ],
)
def test_what_is_none(data, text, tmp_path):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match=text):
        read_object(tmp_path / "a.json")
    with pytest.raises(ValueError, match=text):
        parse_object(data)


@pytest.mark.parametrize(
    "half", [b"\\ud83d", b"\\uDE00\\uD83D", "\ud800".encode("utf-8", "surrogatepass")]
)
def test_halves_of_characters(half):
    """No file and no terminal could be given such a text."""
    with pytest.raises(ValueError, match=r"half of a character|not text in UTF-8"):
        parse(b'{"a": ["' + half + b'"]}')
    whole = json.dumps({"a": "\U0001f600 \\ud83d"})
    assert (
        parse(whole)
        == parse(whole.encode())
        == parse(whole.encode("utf-16-le"))
        == json.loads(whole)
    )


@pytest.mark.parametrize("piece", ["[],", "{},", "0,"])
def test_the_number_of_values_is_bounded_before_they_are_made(piece):
    separators = piece.count(",") + piece.count("[") + piece.count("{")
    most = "[" + piece * ((MOST_SEPARATORS - 1) // separators) + "0]"
    assert len(parse(most)) == (MOST_SEPARATORS - 1) // separators + 1
    for text in (more := most.replace("[", "[0,0,", 1), more.encode(), more.encode("utf-16")):
        with pytest.raises(ValueError, match=r"2,000,00\d commas and opening brackets; at most"):
            parse(text)


def test_values_may_be_nested_as_deeply_as_can_be_copied_and_printed():
    """Well within Python's limit, which depends on who calls."""
    text = '[{"a": ' * 32 + "1" + "}]" * 32
    value = parse(text)
    assert json.loads(repr(copy.deepcopy(value)).replace("'", '"')) == json.loads(text)
    with pytest.raises(ValueError, match="it is nested too deeply"):
        parse(f"[{text}]")
    assert [parse(plain) for plain in ("1", '"[["', "null", "[]")] == [1, "[[", None, []]


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, text in {"pipe": "named pipe", ".": "a folder", "gone": "No such file"}.items():
        with pytest.raises(OSError, match=text):
            read_object(tmp_path / name)
    with pytest.raises(OSError, match="a device"):
        read_object(tmp_path / "/dev/zero")
