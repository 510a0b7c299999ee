"""Files that were looked at are not opened again, and changed ones are."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.training.data import tensor_store
from gralora_diffusion.training.data.store_index import INDEX_NAME
from gralora_diffusion.training.data.tensor_store import TensorStore

KEYS = [f"key {number}" for number in range(300)]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    store = TensorStore(folder)
    for number, key in enumerate(KEYS):
        store[key] = {"a": torch.full((2,), number)}
    store.finish_looking()
    return folder


@pytest.fixture
def folder(filled: Path, tmp_path: Path) -> Path:
    """A copy whose files were looked at once."""
    folder = shutil.copytree(filled, tmp_path / "cache")
    look(folder)
    return folder


def look(folder: Path) -> list[str]:
    """Return the keys whose tensors are there, in the eyes of a new start."""
    store = TensorStore(folder)
    found = [key for key in [*KEYS, "another"] if key in store]
    store.finish_looking()
    return found


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files whose headers are read from now on."""
    names: list[str] = []
    read = tensor_store._read_checked_header

    def noted(path: Path) -> dict[str, str]:
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(tensor_store, "_read_checked_header", noted)
    return names


def test_written_files_are_not_opened(filled: Path, opened: list[str]) -> None:
    assert look(filled) == KEYS
    assert opened == []


def test_files_from_elsewhere_are_opened_once(filled: Path, tmp_path: Path, opened) -> None:
    copy = shutil.copytree(filled, tmp_path / "copy")
    assert look(copy) == KEYS
    assert len(opened) == len(KEYS)
    assert look(copy) == KEYS
    assert len(opened) == len(KEYS)


def test_a_changed_file_is_opened(folder: Path, opened: list[str], caplog) -> None:
    path = folder / "key 7.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert look(folder) == [key for key in KEYS if key != "key 7"]
    assert opened == [path.name]
    assert "1 damaged files, which are encoded again: key 7.safetensors" in caplog.text
    (folder / "key 8.safetensors").unlink()
    assert set(KEYS) - set(look(folder)) == {"key 7", "key 8"}


def test_a_changed_value_is_found_when_it_is_read(folder: Path) -> None:
    """Even if size and times are as before."""
    path = folder / "key 7.safetensors"
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match="its content is not what was written"):
        _ = TensorStore(folder)["key 7"]


@pytest.mark.parametrize("kind", ["none", "empty", "pickle", "rows", "unsorted", "text", "zip"])
def test_a_damaged_index_is_left_out(folder: Path, kind: str, opened: list[str]) -> None:
    index = folder / INDEX_NAME
    rows = np.load(index)
    if kind == "none":
        index.unlink()
    elif kind == "zip":
        np.savez(folder / "x.npz", rows=rows)
        (folder / "x.npz").replace(index)
    elif kind in ("empty", "text"):
        index.write_bytes(b"" if kind == "empty" else b"\x93NUMPY what")
    else:
        other = {"rows": rows["size"], "unsorted": rows[::-1]}.get(kind, np.array([{}, None]))
        np.save(index, other, allow_pickle=True)
    assert look(folder) == KEYS
    assert len(opened) == len(KEYS)
    np.testing.assert_array_equal(np.load(index), rows)


def test_several_processes_add_to_one_index(filled: Path, tmp_path: Path, opened) -> None:
    folder = shutil.copytree(filled, tmp_path / "cache")
    (folder / INDEX_NAME).unlink()
    stores = [TensorStore(folder), TensorStore(folder)]
    for part, store in enumerate(stores):
        assert all(key in store for key in KEYS[part::2])
    for store in stores:
        store.finish_looking()
    opened.clear()
    assert look(folder) == KEYS
    assert opened == []
    stores[0]["key 3"] = {"a": torch.ones(1)}  # a newer stamp takes the place of the older
    stores[0].finish_looking()
    assert look(folder) == KEYS
    assert opened == []
    assert len(np.load(folder / INDEX_NAME)) == len(KEYS)


def test_an_index_that_cannot_be_written_is_only_a_warning(
    filled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(filled, tmp_path / "cache")
    (folder / INDEX_NAME).unlink()
    (folder / INDEX_NAME).mkdir()
    with caplog.at_level(logging.WARNING):
        assert look(folder) == KEYS
    assert f"{INDEX_NAME} cannot be written" in caplog.text
