"""Damage to small files: a function of a random number generator and of the files alone.

Formats are taken apart before they are damaged, so that most damage reaches what a reader makes of
the values instead of ending at a checksum or at the first byte that is no JSON.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml

from .parquet_headers import change_headers

#: A folder that appears if a pickle of these is run.
PROGRAM_NAME = "program_was_run"


class Literal(str):
    """Text that stands in JSON as it is, since no value of Python's is written so."""


class _Program:
    def __reduce__(self) -> Any:
        return os.mkdir, (PROGRAM_NAME,)


def _nested(depth: int) -> Literal:
    return Literal("[" * depth + "]" * depth)


#: Values of JSON that take the place of others.
ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 0.5, 2**31, 2**53 + 1, -(2**63), 2**64, 10**400, 1e308),
    *("", " ", "a", "0", "1", "1e3", "None", "(", "(a+)+$", "[", "*", "../x", "/", "/x", "C:\\x"),
    *("\0", "\ud800", "\u202e", "e\u0301", "\u0661", "\n", "\x1b[2J", "a" * 300, "{}", "{0}", "%s"),
    *([], [[]], {}, {"": None}, [None], [1, 2], ["a"], {"a": 1}, [None, None], [0] * 70),
    *map(Literal, ("NaN", "-Infinity", "1e999", "-0", "9" * 5000, "1.0e-400", '"\\ud800"')),
    *(_nested(depth) for depth in (100, 900, 960, 985, 2000, 100_000)),
)
#: Names of types, formats and programs, by which readers decide.
NAMES = (
    *("LORA", "GRALORA", "PeftType.GRALORA", "LOHA", "UNet2DConditionModel", "AutoencoderKL"),
    *("FluxTransformer2DModel", "CLIPTextModel", "StableDiffusionPipeline", "FluxPipeline"),
    *("StableDiffusionXLPipeline", "DiffusionPipeline", "ModelMixin", "diffusers", "transformers"),
    *("os", "builtins", "torch", "__class__", "__init__", "__main__", "system", "F32", "I64", "U8"),
    *("gralora", "unet", "text_encoder", "transformer", "vae", "denoiser", "all", "none", "true"),
)
#: Eight names in YAML, each for nine of the one before: together more than any memory holds.
_BOMB = "".join(
    f"{name}: &{name} [{','.join([f'*{before}' if before else 'x'] * 9)}]\n"
    for before, name in zip(["", *"abcdefgh"], "abcdefghi", strict=True)
)
#: What is put into text.
SNIPPETS = (
    *("\0", "\u2028", "\x85", "\ufeff", '"', "'", ",", "{", "}", "{0}", "{2}", "{0!r:{1}}", "%s"),
    *("../x", "/", "\\", "&a ", "*a", "[*a]", "<<: *a\n", "? [a]\n: b\n", "- ", ": ", "# ", "|\n"),
    *(
        "---\n",
        "\t",
        "\r",
        "\n",
        "\n\n",
        "9" * 5000,
        "1e999",
        "nan",
        "-inf",
        "~",
        "null",
        "=",
        "~/",
    ),
    *("[" * 3000, "? " * 3000, "{a: " * 2000, "&a [*a]", "? &a [*a]\n: 1\n", f"{_BOMB}? *i\n: 1\n"),
    *("=", "~/", "x" * 300, "y" * 100_000, "(a+)+$", "re:(", "\ud800"),
    f"!!python/object/apply:os.mkdir [{PROGRAM_NAME}]",
)
#: Dtypes of safetensors -> their bits.
DTYPES = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "C64": 64,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
}
_PICKLE = pickle.dumps(_Program(), 2)


def _saved(value: Any) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


#: What lies in a file's place.
OTHER_FILES: tuple[bytes, ...] = (
    *(b"", b"\0", b"\0" * 4096, b"\xff" * 64, b"{}", b"[]", b"null", b"\n", b"a", b"\xef\xbb\xbf"),
    *(b"\x89HDF\r\n\x1a\n" + b"\0" * 2048, b"GGUF\3\0\0\0" + b"\0" * 64, b"<!DOCTYPE html><p>"),
    *(b"version https://git-lfs.github.com/spec/v1\n", b"\x1f\x8b\x08\0", b"PK\5\6" + b"\0" * 18),
    *(_PICKLE, pickle.dumps(_Program(), 4), pickle.dumps({"a": _Program()}, 0)),
    *(_saved(_Program()), _saved({"a": torch.ones(2)}), b"\2\0\0\0\0\0\0\0{}", b"8BPS\0\1"),
    *(b"\x89PNG\r\n\x1a\n", b"GIF89a\xff\xff\xff\xff\xf7\0\0", b"\xff\xd8\xff\xe0", b"II*\0\xff"),
)
_SPECIAL = ("folder", "pipe", "link to itself", "link to nothing", "link to a device", "nothing")


def damage(folder: Path, chance: Random) -> str:
    """Change a file or two of a folder; return what was done, for people."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    done = []
    for _ in range(chance.choice((1, 1, 1, 2))):
        path = named = chance.choice(files)
        if path.is_symlink() and "blobs" in os.readlink(path) and chance.random() < 0.9:
            path = path.parent / os.readlink(path)  # in the Hub's cache
        what = _damage_file(path, named.suffix, files, chance)
        done.append(f"{named.relative_to(folder)}: {what}")
    return "; ".join(done)


def _damage_file(path: Path, suffix: str, files: list[Path], chance: Random) -> str:
    kind = chance.random()
    if kind < 0.03 or not path.is_file() or path.is_symlink():
        return _put_special(path, chance.choice(_SPECIAL))
    data = path.read_bytes()
    if kind < 0.08:
        path.write_bytes(chance.choice(OTHER_FILES))
        return "another kind of file"
    if kind < 0.10:
        other = chance.choice(files)
        path.write_bytes(other.read_bytes() if other.is_file() else b"")
        return f"replaced by {other.name}"
    change = _CHANGES.get(suffix, change_bytes)
    if kind < 0.20:
        change = change_bytes
    try:
        changed = change(data, chance)
    except Exception:  # it is damaged already, and no file of its format any more
        change, changed = change_bytes, change_bytes(data, chance)
    path.write_bytes(changed)
    return change.__name__


def _put_special(path: Path, what: str) -> str:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what != "nothing":
        places = {
            "link to itself": path.name,
            "link to nothing": "x",
            "link to a device": "/dev/zero",
        }
        path.symlink_to(places[what])
    return what


# -- bytes and text --------------------------------------------------------------------------------


def change_bytes(data: bytes, chance: Random) -> bytes:
    """Flip bits; cut, double and move slices; write numbers at their limits."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at, size = chance.randrange(len(changed) + 1), chance.choice((1, 2, 4, 8, 64, 1000))
        elsewhere = chance.randrange(len(changed) + 1)
        piece = changed[elsewhere : elsewhere + size]
        match chance.randrange(8):
            case 0:
                if at < len(changed):
                    changed[at] ^= 1 << chance.randrange(8)
            case 1:
                changed[at : at + 1] = chance.randbytes(1)
            case 2:
                del changed[at : at + size]
            case 3:
                changed[at:at] = piece
            case 4:
                changed[at : at + size] = piece
            case 5:
                del changed[at:]
            case 6:
                changed[at : at + size] = chance.choice((b"\0", b"\xff", b" ")) * size
            case _:
                number = chance.choice((0, 1, 2, -1, 127, 128, 255, 2**15, 2**31 - 1, 2**31, 2**63))
                width, order = chance.choice((1, 2, 4, 8)), chance.choice(("little", "big"))
                number %= 1 << 8 * width
                changed[at : at + width] = number.to_bytes(width, order)
    return bytes(changed)


def change_text(data: bytes, chance: Random) -> bytes:
    """Change lines and words; put in what means something to some reader."""
    text = data.decode()
    for _ in range(chance.randint(1, 3)):
        lines = text.splitlines(keepends=True) or [""]
        here, there = chance.randrange(len(lines)), chance.randrange(len(lines))
        match chance.randrange(6):
            case 0:
                at = chance.randrange(len(text) + 1)
                text = text[:at] + chance.choice(SNIPPETS) + text[at:]
                continue
            case 1:
                words = text.split(" ")
                words[chance.randrange(len(words))] = chance.choice((*SNIPPETS, *NAMES))
                text = " ".join(words)
                continue
            case 2:
                del lines[here]
            case 3:
                lines.insert(here, lines[there])
            case 4:
                lines[here], lines[there] = lines[there], lines[here]
            case _:
                lines[here] = (
                    lines[here].rstrip("\n") if chance.random() < 0.5 else lines[here] * 2000
                )
        text = "".join(lines)
    return _encoded(text, chance)


def _encoded(text: str, chance: Random) -> bytes:
    encoding = chance.choice(("utf-8",) * 9 + ("utf-8-sig", "utf-16", "cp1252"))
    errors = "surrogatepass" if encoding.startswith("utf") else "replace"
    return text.encode(encoding, errors)


# -- values ----------------------------------------------------------------------------------------


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key below a value."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def changed_value(value: Any, chance: Random) -> Any:
    """A copy in which some values, at any depth, have other types, or some keys other names."""
    root = [copy.deepcopy(value)]
    for _ in range(chance.choice((1, 1, 2, 3))):
        places = list(_places(root))
        inside = [(c, k) for c, k in places if isinstance(c[k], str) and c[k].startswith("{")]
        container, key = chance.choice(inside if inside and chance.random() < 0.4 else places)
        _change(container, key, [c[k] for c, k in places], chance)
        if not root:
            return None
    return root[0]


def _change(container: Any, key: Any, others: list[Any], chance: Random) -> None:
    old = container[key]
    if isinstance(old, str) and old.startswith("{") and chance.random() < 0.9:
        try:
            container[key] = json_text(changed_value(json.loads(old), chance))
            return
        except ValueError:
            pass
    what = chance.randrange(10)
    if what == 0:
        container[key] = copy.deepcopy(chance.choice(others))
    elif what == 1:
        container[key] = chance.choice(NAMES)
    elif what == 2:
        del container[key]
    elif what == 3 and isinstance(container, dict):
        texts = [other for other in others if isinstance(other, str)] + list(container)
        new = chance.choice((*NAMES, "", "\ud800", "9" * 5000, f"{key}x", "a.b", "/", *texts))
        container[new] = container.pop(key)
    elif what == 4 and isinstance(old, dict) and old:
        twice = chance.choice(list(old))
        odd = json_text({twice: chance.choice(ODD)})[1:-1]
        container[key] = Literal(json_text(old)[:-1] + "," + odd + "}")
    elif what in (5, 6):
        container[key] = _near(old, chance)
    else:
        container[key] = copy.deepcopy(chance.choice(ODD))


def _near(value: Any, chance: Random) -> Any:
    """A value that is like this one, and another."""
    if isinstance(value, bool) or value is None:
        return chance.choice((0, 1, str(value), [value]))
    if isinstance(value, (int, float)):
        choices = [-value, value + 1, value * 2, float(value), str(value), [value], value * 10**9]
        return chance.choice([*choices, value / 3, math.nan, math.inf])
    if isinstance(value, str):
        at = chance.randrange(len(value) + 1)
        put = value[:at] + chance.choice(SNIPPETS) + value[at:]
        return chance.choice((value[:at], put, value * 50, value.upper(), list(value), {value: 1}))
    if isinstance(value, list):
        return chance.choice((value * 2, value[::-1], [value], dict(enumerate(value)), value * 500))
    if isinstance(value, dict):
        many = {f"{key}{i}": v for i in range(200) for key, v in value.items()}
        return chance.choice((list(value), list(value.values()), [value], {"a": value}, many))
    return chance.choice(ODD)


def json_text(value: Any) -> str:
    """JSON, in which :class:`Literal` stands as it is."""
    if isinstance(value, Literal):
        return str(value)
    if isinstance(value, dict):
        pairs = (f"{json.dumps(str(key))}:{json_text(item)}" for key, item in value.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(json_text, value)) + "]"
    return json.dumps(value, ensure_ascii=isinstance(value, str) and not value.isascii())


def change_json(data: bytes, chance: Random) -> bytes:
    return _encoded(json_text(changed_value(json.loads(data), chance)), chance)


def change_lines(data: bytes, chance: Random) -> bytes:
    """JSON in lines."""
    rows = [json.loads(line) for line in data.splitlines()]
    if chance.random() < 0.3:
        return change_text(data, chance)
    return _encoded("".join(json_text(row) + "\n" for row in changed_value(rows, chance)), chance)


def change_yaml(data: bytes, chance: Random) -> bytes:
    """YAML, of which JSON is a part."""
    if chance.random() < 0.5:
        return change_text(data, chance)
    value = changed_value(yaml.safe_load(data), chance)
    if isinstance(value, dict) and chance.random() < 0.5:
        return _encoded("".join(f"{key}: {json_text(v)}\n" for key, v in value.items()), chance)
    return _encoded(json_text(value), chance)


def change_table(data: bytes, chance: Random) -> bytes:
    """CSV."""
    if chance.random() < 0.5:
        return change_text(data, chance)
    rows = changed_value(list(csv.reader(io.StringIO(data.decode()))), chance)
    file = io.StringIO(newline="")
    csv.writer(file).writerows(row if isinstance(row, list) else [row] for row in rows)
    return _encoded(file.getvalue(), chance)


def change_parquet(data: bytes, chance: Random) -> bytes:
    """Columns of other types and names, or headers that lie."""
    if chance.random() < 0.4:
        return change_headers(data, chance)
    rows = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    changed = [row for row in changed_value(rows, chance) if isinstance(row, dict)]
    table = pyarrow.Table.from_pylist(changed)
    pyarrow.parquet.write_table(table, sink := pyarrow.BufferOutputStream())
    return bytes(sink.getvalue())


# -- tensors ---------------------------------------------------------------------------------------


def change_safetensors(data: bytes, chance: Random) -> bytes:
    """A header that lies, or a consistent file of other names, shapes, dtypes, values."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    kind = chance.random()
    if kind < 0.05:
        lie = chance.choice((0, 1, size - 1, size + 1, len(data), 10**8, 2**32, 2**63, 2**64 - 1))
        return lie.to_bytes(8, "little") + data[8:]
    if kind < 0.35:
        header = changed_value(header, chance)
    else:
        metadata = header.pop("__metadata__", {})
        entries = {
            key: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
            for key, entry in header.items()
        }
        if metadata and chance.random() < 0.5:
            changed = changed_value(metadata, chance)
            items = changed.items() if isinstance(changed, dict) else ()
            metadata = {k: v if isinstance(v, str) else json_text(v) for k, v in items}
        else:
            for _ in range(chance.randint(1, 3)):
                if entries:
                    _change_entry(entries, chance)
        header, end = {"__metadata__": metadata}, 0
        for key, (dtype, shape, values) in entries.items():
            start, end = end, end + len(values)
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        body = b"".join(values for _, _, values in entries.values())
    text = json_text(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


def _change_entry(entries: dict[str, tuple[str, list[int], bytes]], chance: Random) -> None:
    key = chance.choice(list(entries))
    dtype, shape, values = entries[key]
    what = chance.randrange(7)
    if what == 0:
        del entries[key]
    elif what == 1:  # another name, of the parts of the names there are
        parts = chance.choice(list(entries)).split(".")
        own = key.split(".")
        at = chance.randrange(len(own))
        own[at] = chance.choice((*parts, *NAMES, "", "\0", "0", "999", "alpha", "weight", "é"))
        entries[chance.choice((".".join(own), key + ".", f"base_model.model.{key}"))] = entries.pop(
            key
        )
    elif what == 2:
        entries[chance.choice((f"{key}x", f"{key}.0", f"x.{key}"))] = entries[key]
    elif what == 3:  # another shape of as many elements
        count = math.prod(shape)
        shapes = [shape[::-1], [count], [1, *shape], [*shape, 1, 1], [count, 1], [1] * 65 + [count]]
        entries[key] = dtype, chance.choice(shapes), values
    elif what == 4:  # none, one, or more than memory holds
        sizes = [([], 1), ([0], 0), ([0, *shape[1:]], 0), ([*shape[:-1], 0], 0), ([2**62, 0], 0)]
        new_shape, count = chance.choice(sizes)
        entries[key] = dtype, new_shape, values[: count * DTYPES.get(dtype, 8) // 8]
    elif what == 5:  # the same bytes as other numbers
        new_dtype = chance.choice(list(DTYPES))
        entries[key] = new_dtype, [len(values) * 8 // DTYPES[new_dtype]], values
        if shape and DTYPES[new_dtype] == DTYPES.get(dtype):
            entries[key] = new_dtype, shape, values
    else:
        odd = chance.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\0" * 4))
        part = odd * chance.choice((1, len(values) // 4))
        entries[key] = dtype, shape, part[: len(values)] + values[len(part) :]


def change_saved(data: bytes, chance: Random) -> bytes:
    """What torch.save wrote."""
    if chance.random() < 0.7:
        value = changed_value(torch.load(io.BytesIO(data), weights_only=True), chance)
        return _saved(_without_literals(value))
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        entries = {info.filename: old.read(info) for info in old.infolist()}
    name = chance.choice(list(entries))
    entries[name] = _PICKLE if chance.random() < 0.3 else change_bytes(entries[name], chance)
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as new:
        for entry, content in entries.items():
            new.writestr(zipfile.ZipInfo(entry), content)
    return buffer.getvalue()


def _without_literals(value: Any) -> Any:
    if isinstance(value, Literal):
        return str(value)
    if isinstance(value, dict):
        return {key: _without_literals(item) for key, item in value.items()}
    return [_without_literals(item) for item in value] if isinstance(value, list) else value


# -- images ----------------------------------------------------------------------------------------


def change_png(data: bytes, chance: Random) -> bytes:
    """Chunks with right checksums: others, in another order, with other contents."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    for _ in range(chance.randint(1, 2)):
        here = chance.randrange(len(chunks))
        name, body = chunks[here]
        match chance.randrange(5):
            case 0:
                del chunks[here]
                chunks = chunks or [(b"IEND", b"")]
            case 1:
                chunks.insert(chance.randrange(len(chunks)), chunks[here])
            case 2:
                number = struct.pack(
                    ">I", chance.choice((0, 1, 45455, 100_000, 2**31 - 1, 2**32 - 1))
                )
                names = (b"gAMA", b"cICP", b"tRNS", b"PLTE", b"eXIf", b"iCCP", b"acTL", b"sRGB")
                odd = (number, number * 8, b"\x09\x10\0\1", b"", b"x\0\0" + zlib.compress(b"a"))
                chunks.insert(1, (chance.choice((*names, b"cHRM")), chance.choice(odd)))
            case _:
                chunks[here] = name, _change_chunk(name, body, chance)
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def _change_chunk(name: bytes, body: bytes, chance: Random) -> bytes:
    if name == b"iCCP":  # a name, and the profile deflated
        front, _, packed = body.partition(b"\0\0")
        return front + b"\0\0" + zlib.compress(change_bytes(zlib.decompress(packed), chance))
    if name == b"IHDR" and chance.random() < 0.5:
        width, height = (chance.choice((0, 1, 16, 10_000, 2**31 - 1)) for _ in range(2))
        return struct.pack(">II", width, height) + body[8:]
    return change_bytes(body, chance)


_CHANGES: dict[str, Callable[[bytes, Random], bytes]] = {
    ".safetensors": change_safetensors,
    ".json": change_json,
    ".owner": change_json,
    ".status": change_json,
    ".jsonl": change_lines,
    ".yaml": change_yaml,
    ".csv": change_table,
    ".txt": change_text,
    ".jinja": change_text,
    ".parquet": change_parquet,
    ".bin": change_saved,
    ".png": change_png,
}
