"""Headers and hashes, against safetensors, ModelSpec's reference reader and sd-scripts; NaN."""

import hashlib
import json
import os
from io import BytesIO
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.io.tensor_files import (
    HASH_FIELDS,
    file_hashes,
    is_finite,
    read_header,
    read_safetensors,
    replacing,
    write_safetensors,
)


def modelspec_hash(path: Path) -> str:
    """As the specification says it: all tensor content, that is, all but the header."""
    content = path.read_bytes()
    return "0x" + hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def kohyas_hashes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[str, str]:
    """As sd-scripts computes them before it saves: over a file with the ss_ fields alone."""
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    file = BytesIO(safetensors.torch.save(tensors, kept))
    size = int.from_bytes(file.read(8), "little")
    file.seek(8 + size)
    new = hashlib.sha256(file.read()).hexdigest()
    file.seek(0x100000)
    return new, hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


@pytest.mark.parametrize("size", [3, 300_000, 400_000], ids=["small", "1.2 MB", "1.6 MB"])
@pytest.mark.parametrize(
    "metadata",
    [{}, {"ss_tag_frequency": '{"Bär": {"a \\"cat\\"\\n": 1}}', "ss_seed": "0", "other": "ü" * 77}],
    ids=["bare", "full"],
)
def test_hashes_are_those_of_the_specifications(size, metadata, tmp_path):
    torch.manual_seed(size)
    tensors = {
        "b": torch.randn(size),
        "ä.weight": torch.randn(3, 5).half(),
        "a": torch.randn(7, dtype=torch.float64),
    }
    path = tmp_path / "file.safetensors"
    write_safetensors(tensors, path, {**metadata, **HASH_FIELDS})
    with safe_open(path, "pt") as file:
        written = file.metadata()
        assert {key: file.get_tensor(key).tolist() for key in tensors} == {
            key: tensor.tolist() for key, tensor in tensors.items()
        }
    new, legacy = kohyas_hashes(tensors, metadata)
    assert written["modelspec.hash_sha256"] == modelspec_hash(path) == f"0x{new}"
    assert written["sshs_model_hash"] == new
    assert written["sshs_legacy_hash"] == legacy
    assert {key: value for key, value in written.items() if key not in HASH_FIELDS} == metadata
    assert file_hashes(path) == {key: written[key] for key in HASH_FIELDS}


def test_an_old_hash_is_replaced_and_none_is_added(tmp_path):
    path = tmp_path / "file.safetensors"
    write_safetensors({"a": torch.ones(2)}, path, {"modelspec.hash_sha256": "0x12", "x": "y"})
    text = path.read_bytes()
    header = json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])
    assert header["__metadata__"] == {"modelspec.hash_sha256": modelspec_hash(path), "x": "y"}


def test_two_writers_do_not_share_a_temporary_file(tmp_path):
    """Of two machines their processes may have the same number."""
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_is_finite_if_all_its_elements_are(dtype):
    largest = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(largest)  # the sum is not
    for wrong in (torch.nan, torch.inf, -torch.inf):
        largest[1, 2] = wrong
        assert not is_finite(largest)
    largest[0, 0], largest[1, 2] = torch.inf, -torch.inf
    assert not is_finite(largest)
    assert is_finite(torch.ones(4).to(torch.float8_e4m3fn))
    assert not is_finite(torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn))
    assert is_finite(torch.tensor([1 + 2j]))
    assert not is_finite(torch.tensor([complex(1, torch.nan)]))


# -- headers ---------------------------------------------------------------------------------------

STORED = {
    "b.half": torch.randn(3, 5).half(),
    "a.brain": torch.randn(7).bfloat16(),
    "ä.single": torch.randn(2, 3, 1, 1),
    "small": torch.randn(5, 3).to(torch.float8_e4m3fn),
    "steps": torch.arange(5),
    "nothing": torch.empty(0, 4),
}


def by_hand(path: Path, entries: dict[str, tuple[str, list[int], int, int]], size: int) -> Path:
    """A file with such a header and so many bytes behind it."""
    header = {
        key: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        for key, (dtype, shape, begin, end) in entries.items()
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


def test_a_header_says_where_tensors_lie(tmp_path):
    path = tmp_path / "a.safetensors"
    metadata = {"format": "pt", "title": 'Zoë\n "quoted" \\'}
    safetensors.torch.save_file(STORED, path, metadata=metadata)
    found, said = read_header(path)
    assert said == metadata
    assert found.keys() == STORED.keys()
    assert sorted(found, key=lambda key: found[key].offset) == list(found)
    data = path.read_bytes()
    for key, tensor in STORED.items():
        stored = found[key]
        assert (stored.path, stored.key) == (path, key)
        assert (stored.dtype, stored.shape) == (tensor.dtype, tuple(tensor.shape))
        raw = data[stored.offset : stored.offset + stored.nbytes]
        assert raw == bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
    safetensors.torch.save_file(STORED, path)
    assert read_header(path)[1] == {}


def test_a_dtype_that_torch_has_not_is_told_when_it_is_asked_for(tmp_path):
    """Scales of quantized files; the header is read all the same."""
    path = by_hand(tmp_path / "a.safetensors", {"a.scale": ("F8_E8M0", [4], 0, 4)}, 4)
    stored = read_header(path)[0]["a.scale"]
    assert (stored.dtype_name, stored.shape, stored.nbytes) == ("F8_E8M0", (4,), 4)
    with pytest.raises(AdapterFileError, match=r"a\.scale is stored as F8_E8M0, which"):
        _ = stored.dtype


@pytest.mark.parametrize("read", [read_header, read_safetensors])
class TestUnreadable:
    @pytest.mark.parametrize("cut", [0, 4, 30, -1])
    def test_not_whole(self, read, cut, tmp_path):
        path = tmp_path / "a.safetensors"
        safetensors.torch.save_file(STORED, path)
        path.write_bytes(path.read_bytes()[:cut])
        size = path.stat().st_size
        text = rf"a\.safetensors: not a complete safetensors file \({size} bytes\): "
        text += r".* download or copy it again"
        with pytest.raises(AdapterFileError, match=text):
            read(path)

    @pytest.mark.parametrize(
        ("data", "text"),
        [
            (b"PK\x03\x04" + bytes(100), "a pickle"),
            (b"GGUF" + bytes(100), "a GGUF file"),
            (b"\x02" + bytes(7) + b"[]", r"not a safetensors file \(10 bytes\)"),
            (b"\x05" + bytes(7) + b'{"a":1}', "damaged or truncated"),
        ],
    )
    def test_not_safetensors(self, read, data, text, tmp_path):
        path = tmp_path / "a.safetensors"
        path.write_bytes(data)
        with pytest.raises(AdapterFileError, match=rf"a\.safetensors: .*{text}"):
            read(path)

    @pytest.mark.parametrize(
        "entries",
        [
            {"a": ("F32", [2], 0, 4)},  # another size than its shape's
            {"a": ("F32", [1], 0, 4), "b": ("F32", [1], 2, 6)},  # one over the other
            {"a": ("F32", [1], 0, 4)},  # and bytes that belong to none
        ],
    )
    def test_a_header_that_contradicts_itself(self, read, entries, tmp_path):
        path = by_hand(tmp_path / "a.safetensors", entries, 8)
        with pytest.raises(AdapterFileError, match=r"a\.safetensors: .*damaged or truncated"):
            read(path)

    def test_more_names_than_memory_is_there_for(self, read, tmp_path):
        """safetensors would take gigabytes for a header of 100 MB."""
        names = ",".join(f'"{i:x}":""' for i in range(2_000_000))
        text = f'{{"__metadata__":{{{names}}}}}'.encode()
        path = tmp_path / "a.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(AdapterFileError, match=r"2,000,001 commas and opening brackets"):
            read(path)

    @pytest.mark.parametrize(
        "entry",
        [
            '["F32", [1], [0, 4]]',
            '{"dtype": {"F32": null}, "shape": [1], "data_offsets": [0, 4]}',
        ],
    )
    def test_forms_that_safetensors_takes_and_never_writes(self, read, entry, tmp_path):
        path, text = tmp_path / "a.safetensors", f'{{"a": {entry}}}'.encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        with safe_open(path, "np") as file:
            assert list(file.keys()) == ["a"]
        with pytest.raises(AdapterFileError, match="the entry of 'a' does not follow the format"):
            read(path)

    @pytest.mark.parametrize("length", [0x3C, 0x280, 0x480, 0x4034B50])
    @pytest.mark.parametrize("rest", [b"", b'{"a":{"dtype"'])
    def test_a_length_that_looks_like_another_file(self, read, length, rest, tmp_path):
        """A truncated file is no pickle, and no web page, because its header has that length."""
        path = tmp_path / "a.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + rest)
        with pytest.raises(AdapterFileError, match="damaged or truncated"):
            read(path)

    @pytest.mark.parametrize(
        "data", [b"\x80\x02}q\x00(X\x01\x00\x00\x00a", b"\x80\x04K{.", b"\x80\x02K\x00."]
    )
    def test_pickles(self, read, data, tmp_path):
        (tmp_path / "a.safetensors").write_bytes(data)
        with pytest.raises(AdapterFileError, match="a pickle"):
            read(tmp_path / "a.safetensors")

    @pytest.mark.parametrize("shape", [[0, 1 << 60], [0, 1 << 40, 1 << 40], [1] * 65 + [0]])
    def test_shapes_that_torch_has_no_room_for(self, read, shape, tmp_path):
        path = by_hand(tmp_path / "a.safetensors", {"a": ("F32", shape, 0, 0)}, 0)
        with pytest.raises(AdapterFileError, match=r"a\.safetensors: .*damaged"):
            read(path)

    def test_a_header_longer_than_any(self, read, tmp_path):
        path = tmp_path / "a.safetensors"
        path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}" + bytes(100))
        with pytest.raises(AdapterFileError, match="not a safetensors file"):
            read(path)

    def test_a_named_pipe(self, read, tmp_path):
        os.mkfifo(tmp_path / "a.safetensors")
        with pytest.raises(AdapterFileError, match="is not a regular file"):
            read(tmp_path / "a.safetensors")

    def test_nothing_there(self, read, tmp_path):
        with pytest.raises(AdapterFileError, match="no such file"):
            read(tmp_path / "a.safetensors")
