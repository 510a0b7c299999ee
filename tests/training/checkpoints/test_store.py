"""Checkpoints are whole or not there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gralora_diffusion.io.errors import CheckpointError
from gralora_diffusion.io.tensor_files import write_safetensors
from gralora_diffusion.training.checkpoints.store import CheckpointStore


def content(text: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        (folder / "state").write_text(text, encoding="utf-8")

    return save


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_written_listed_found_and_limited(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "out", limit=2)
    assert store.list() == []
    assert store.find("latest") is None
    for step in (5, 10, 100):
        store.write(step, content(str(step)))
    assert names(store) == ["checkpoint-10", "checkpoint-100"]
    assert store.find("latest") == (100, store.folder / "checkpoint-100")
    assert store.find("checkpoint-10") == store.find(str(store.folder / "checkpoint-10"))
    with pytest.raises(CheckpointError, match=r"Checkpoints in .*: checkpoint-10, checkpoint-100"):
        store.find("checkpoint-5")


def test_same_step_again_replaces(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.write(1, content("old"))
    assert (store.write(1, content("new")) / "state").read_text(encoding="utf-8") == "new"
    assert names(store) == ["checkpoint-1"]


def test_unfinished_ones_are_never_taken_and_are_cleaned(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.write(1, content("1"))

    def killed(folder: Path) -> None:
        content("half")(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write(2, killed)
    assert len(names(store)) == 2  # as after a kill
    assert store.list() == [(1, tmp_path / "checkpoint-1")]
    store.write(3, content("3"))
    assert names(store) == ["checkpoint-1", "checkpoint-3"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("torch")])
def test_failed_writing_leaves_the_earlier_ones_and_nothing_else(
    tmp_path: Path, error: Exception
) -> None:
    store = CheckpointStore(tmp_path, limit=1)
    store.write(1, content("1"))

    def fail(folder: Path) -> None:
        content("half")(folder)
        raise error

    with pytest.raises(CheckpointError, match=r"step 2 could not be written.*checkpoint-1.*resume"):
        store.write(2, fail)
    assert names(store) == ["checkpoint-1"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.name != "posix" or os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_full_disk(small_disk: Path, kind: str) -> None:
    store = CheckpointStore(small_disk / "out", limit=1)
    store.write(1, content("1"))

    def too_large(folder: Path) -> None:
        tensors = {"x": torch.zeros(1 << 20)}
        if kind == "torch":
            torch.save(tensors, folder / "x.bin")
        else:
            write_safetensors(tensors, folder / "x.safetensors", {})

    with pytest.raises(CheckpointError, match=r"step 2 could not be written.*checkpoint-1"):
        store.write(2, too_large)
    assert names(store) == ["checkpoint-1"]
