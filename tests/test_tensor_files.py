"""Hashes in the header, against ModelSpec's reference reader and sd-scripts' definition; NaN."""

import hashlib
import json
from io import BytesIO
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from gralora_diffusion.tensor_files import (
    HASH_FIELDS,
    file_hashes,
    is_finite,
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
