"""Stored tensors as numpy arrays, against torch's own reading of the same file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import _TYPES, load_file, save_file

from gralora_diffusion.io import arrays
from gralora_diffusion.io.arrays import StoredArray, stored_array
from gralora_diffusion.io.tensor_files import is_finite, read_header


def read(path: Path) -> dict[str, StoredArray]:
    data = path.read_bytes()
    return {key: stored_array(header, data) for key, header in read_header(path)[0].items()}


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """All patterns of bits up to 16 bits, and a sample of longer ones with the special values."""
    size = dtype.itemsize
    if dtype == torch.bool:
        return torch.tensor([False, True])
    if size <= 2:
        return (
            torch.arange(256**size, dtype=torch.int64)
            .to(torch.int32)
            .view(torch.uint8)
            .view(-1, 4)[:, :size]
            .contiguous()
            .view(dtype)
            .flatten()
        )
    random = torch.randint(0, 256, (64 * size,), generator=torch.Generator().manual_seed(0))
    found = random.to(torch.uint8).view(dtype)
    if not (dtype.is_floating_point or dtype.is_complex):
        return found
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-44]).to(dtype)
    return torch.cat([found, special])


@pytest.mark.parametrize("name", _TYPES)
def test_values_and_names_are_those_of_torch(name: str, tmp_path: Path) -> None:
    tensor = patterns(_TYPES[name])
    parts = {f"part{i}": row.clone() for i, row in enumerate(tensor.view(-1, 2)[:300])}
    parts |= {"whole": tensor, "none": tensor[:0].reshape(0, 3), "one": tensor[1].clone()}
    save_file(parts, tmp_path / "x.safetensors")
    expected = load_file(tmp_path / "x.safetensors")
    for key, stored in read(tmp_path / "x.safetensors").items():
        theirs = expected[key]
        assert f"torch.{stored.dtype}" == str(theirs.dtype)
        assert stored.shape == theirs.shape
        assert stored.is_finite() == is_finite(theirs)
        if not (theirs.is_complex() or theirs.dtype == torch.bool):
            # both to float64, in which all but the largest integers are exact
            with np.errstate(invalid="ignore"):  # some NaN are signals
                ours = stored.values().astype("f8")
            np.testing.assert_array_equal(ours, theirs.double().numpy(), strict=True)
            if theirs.is_floating_point():
                signs = np.signbit(ours), torch.signbit(theirs.double()).numpy()
                known = ~np.isnan(ours)
                np.testing.assert_array_equal(signs[0][known], signs[1][known])
        else:
            np.testing.assert_array_equal(stored.values(), theirs.numpy(), strict=True)


def test_powers_of_two_in_8_bits(tmp_path: Path) -> None:
    """safetensors cannot hand them to torch, but torch has the dtype."""
    entry = {"dtype": "F8_E8M0", "shape": [256], "data_offsets": [0, 256]}
    text = json.dumps({"scales": entry}).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(range(256))
    (tmp_path / "x.safetensors").write_bytes(data)
    stored = read(tmp_path / "x.safetensors")["scales"]
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert f"torch.{stored.dtype}" == str(theirs.dtype)
    np.testing.assert_array_equal(stored.values(), theirs.float().numpy(), strict=True)
    assert not stored.is_finite()


@pytest.mark.parametrize("name", ["F16", "BF16", "F32", "F8_E5M2"])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_value_that_is_none_is_found_anywhere(
    name: str, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "_AT_ONCE", 8)
    tensor = torch.ones(3, 7)
    for value in (1.0, math.inf, -math.inf, math.nan):
        tensor[place, place] = value
        save_file({"a": tensor.to(_TYPES[name])}, tmp_path / "x.safetensors")
        assert read(tmp_path / "x.safetensors")["a"].is_finite() == (value == 1.0)


@pytest.mark.parametrize("padding", range(1, 8))
def test_bytes_that_are_not_aligned(padding: int, tmp_path: Path) -> None:
    tensor = torch.randn(5, 3, dtype=torch.float64)
    entry = {"dtype": "F64", "shape": [5, 3], "data_offsets": [0, 120]}
    text = json.dumps({"a": entry}).encode() + b" " * padding
    (tmp_path / "x.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + tensor.numpy().tobytes()
    )
    stored = read(tmp_path / "x.safetensors")["a"]
    assert stored.is_finite()
    np.testing.assert_array_equal(stored.values(), tensor.numpy(), strict=True)
