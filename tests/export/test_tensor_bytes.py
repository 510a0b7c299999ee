"""Headers and bytes, against safetensors' own reader and writer."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import _TYPES, load_file, save_file

from gralora_diffusion import AdapterFileError
from gralora_diffusion.export import tensor_bytes
from gralora_diffusion.export.tensor_bytes import (
    Files,
    as_bytes,
    check_space,
    make_header,
)

TENSORS = {
    "b.half": torch.randn(3, 5).half(),
    "a.brain": torch.randn(7).bfloat16(),
    "ä.single": torch.randn(2, 3, 1, 1),
    "small": torch.randn(5, 3).to(torch.float8_e4m3fn),
    "number": torch.tensor(1.5, dtype=torch.float64),
    "steps": torch.arange(5),
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.empty(0, 4),
}
METADATA = {"format": "pt", "a": 'quotes " and \\', "title": "Zoë\n"}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether keys, dtypes, shapes and bytes are the same."""
    return found.keys() == expected.keys() and all(
        found[key].dtype == tensor.dtype
        and found[key].shape == tensor.shape
        and bytes(as_bytes(found[key])) == bytes(as_bytes(tensor))
        for key, tensor in expected.items()
    )


def header_of(path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_a_header_says_what_safetensors_writes(tmp_path):
    path, theirs = tmp_path / "own.safetensors", tmp_path / "theirs.safetensors"
    described = [(key, t.dtype, tuple(t.shape)) for key, t in TENSORS.items()]
    header, offsets, total = make_header(described, METADATA)
    with Files(path, total) as files:
        files.write(header, 0)
        for key, tensor in TENSORS.items():
            files.write(as_bytes(tensor), offsets[key])
    assert path.stat().st_size == total
    assert same(load_file(path), TENSORS)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == METADATA
    save_file(TENSORS, theirs, metadata=METADATA)
    own, expected = header_of(path), header_of(theirs)
    assert own.keys() == expected.keys()
    for key, entry in own.items():
        expected[key].pop("data_offsets", None)
        entry.pop("data_offsets", None)
        assert entry == expected[key]
    assert list(own["__metadata__"]) == sorted(METADATA)
    assert len(header) % 8 == 0
    for key, tensor in TENSORS.items():
        assert offsets[key] % tensor.element_size() == 0, key
    again = make_header(list(reversed(described)), dict(reversed(METADATA.items())))
    assert again == (header, offsets, total)


def test_tensors_lie_as_safetensors_lays_them(tmp_path):
    """Of every dtype: so that hashes of the data are those of a file that was saved again."""
    path = tmp_path / "theirs.safetensors"
    tensors = {
        f"{'zmbq'[number % 4]}.{len(shape)}.{number}": torch.zeros(shape, dtype=dtype)
        for number, dtype in enumerate(_TYPES.values())
        for shape in ((3, 5), (), (0, 4))
    }
    save_file(tensors, path, metadata={"format": "pt"})
    described = [(key, t.dtype, tuple(t.shape)) for key, t in tensors.items()]
    header, _, total = make_header(described, {"format": "pt"})
    assert path.read_bytes()[: len(header)] == header
    assert path.stat().st_size == total


def test_two_tensors_of_one_name():
    with pytest.raises(ValueError, match="two tensors have the same name"):
        make_header([("a", torch.half, (1,)), ("a", torch.half, (2,))], {})


@pytest.mark.parametrize(
    "missing", [(), ("copy_file_range",), ("copy_file_range", "preadv", "pwrite")]
)
def test_bytes_are_copied_between_any_places(missing, tmp_path, monkeypatch):
    """Also where the system has not what Linux has, and in pieces smaller than what is copied."""
    for name in missing:
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(tensor_bytes, "_COPY_BYTES", 1000)
    source, output = tmp_path / "source", tmp_path / "output"
    data = os.urandom(12_345)
    source.write_bytes(data)
    with Files(output, 20_000) as files:
        files.copy(source, 7, 3000, 10_001)
        buffer = bytearray(50)
        files.read(source, 1234, memoryview(buffer))
        files.write(b"end", 19_997)
    assert buffer == data[1234:1284]
    expected = bytes(3000) + data[7:10_008] + bytes(6996) + b"end"
    assert output.read_bytes() == expected
    assert source.read_bytes() == data


def test_a_source_that_became_shorter(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(bytes(10))
    with Files() as files, pytest.raises(AdapterFileError, match="became shorter"):
        files.read(source, 5, memoryview(bytearray(6)))


def test_too_little_space_is_told_with_sizes(tmp_path):
    check_space(tmp_path / "a", 1)
    with pytest.raises(OSError, match=r"1048576\.00 GiB are needed, and [0-9.]+ GiB are free"):
        check_space(tmp_path / "a", 1 << 50)
