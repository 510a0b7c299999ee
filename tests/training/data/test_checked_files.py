"""What was found of files is remembered, and never when a file may have changed."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.training.data import checked_files
from gralora_diffusion.training.data.checked_files import CheckedFiles
from gralora_diffusion.training.data.controls import ControlPlaces
from gralora_diffusion.training.data.image_folder import Example, find_examples
from gralora_diffusion.training.data.masks import MaskPlaces
from tests.training.runs import make_images


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images with masks, one of which is an opacity, and control images; all of them settled."""
    folder = make_images(tmp_path / "images", 3)
    make_images(tmp_path / "before", 3, seed=1)
    white = make_images(tmp_path / "masks", 1, seed=2) / "0.png"
    Image.new("L", (27, 20), 255).save(white)
    with Image.open(folder / "1.png") as image:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(folder / "1.png")
    monkeypatch.setattr(checked_files, "_SETTLED", 0.05)
    time.sleep(0.1)
    return folder


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kinds of files that are decoded."""
    seen: list[str] = []

    def counted(kind: str, work: Any, data: bytes) -> Any:
        seen.append(kind)
        return work(data)

    for kind, work in list(checked_files._WORK.items()):
        monkeypatch.setitem(
            checked_files._WORK, kind, lambda data, k=kind, w=work: counted(k, w, data)
        )
    return seen


def found(folder: Path, cache: Path | None, **options: Any) -> list[Example]:
    return find_examples(
        folder,
        "a dog",
        masks=MaskPlaces(folder.with_name("masks"), None, True),
        controls=ControlPlaces((folder.with_name("before"),), None),
        cache_dir=cache,
        **options,
    )


def test_a_second_start_decodes_nothing_and_finds_the_same(
    folder: Path, tmp_path: Path, decoded: list[str]
) -> None:
    cache = tmp_path / "cache"
    plain = found(folder, None)
    assert sorted(decoded) == ["image"] * 6 + ["mask"] + ["opacity"] * 2
    assert found(folder, cache, remember=False) == plain
    assert not cache.exists()
    decoded.clear()
    assert found(folder, cache) == plain
    assert len(decoded) == 9
    (file,) = cache.iterdir()
    before = file.read_bytes()
    decoded.clear()
    assert found(folder, cache) == plain
    assert decoded == []
    assert file.read_bytes() == before
    # another folder has a file of its own
    other = shutil.copytree(folder, tmp_path / "other" / "images")
    find_examples(other, "a dog", cache_dir=cache)
    assert decoded == ["image"] * 3
    assert file.read_bytes() == before


def test_a_changed_file_is_decoded_again(
    folder: Path, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    before = find_examples(folder, "a dog", cache_dir=cache)
    monkeypatch.setattr(checked_files, "_SETTLED", 600.0)
    path, times = folder / "2.png", (folder / "2.png").stat()
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\0")  # in the last checksum, which Pillow does not read
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert path.stat().st_size == times.st_size
    decoded.clear()
    after = find_examples(folder, "a dog", cache_dir=cache)
    assert [e.content_key for e in after[:2]] == [e.content_key for e in before[:2]]
    assert after[2].content_key != before[2].content_key
    # it has just changed, so it is not remembered
    decoded.clear()
    find_examples(folder, "a dog", cache_dir=cache)
    assert decoded == ["image"]


def test_problems_are_found_again_and_the_rest_is_remembered(
    folder: Path, tmp_path: Path, decoded: list[str]
) -> None:
    cache = tmp_path / "cache"
    (folder / "1.png").write_bytes(b"no image")
    for wanted in (3, 1):
        decoded.clear()
        with pytest.raises(DataError, match=r"1\.png cannot be decoded"):
            find_examples(folder, "a dog", cache_dir=cache)
        assert len(decoded) == wanted


def _lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [{**lines[0], "pillow": "0"}, *lines[1:]],
        lambda lines: lines[1:],
        lambda lines: [lines[0], ["image"]],
        lambda lines: [lines[0], [*lines[1][:3], "../key", *lines[1][4:]]],
        lambda lines: [lines[0], [*lines[1][:4], [-1, 2], *lines[1][5:]]],
        lambda lines: [lines[0], [["image"], *lines[1][1:]]],
        lambda lines: [],
    ],
    ids=["another decoder", "no version", "short", "no hash", "no size", "no kind", "empty"],
)
def test_a_damaged_file_is_not_used(
    folder: Path, tmp_path: Path, decoded: list[str], change: Any
) -> None:
    cache = tmp_path / "cache"
    whole = find_examples(folder, "a dog", cache_dir=cache)
    (file,) = cache.iterdir()
    before = file.read_text(encoding="utf-8")
    changed = [json.dumps(line) for line in change(_lines(file))]
    file.write_text("\n".join(changed), encoding="utf-8")
    decoded.clear()
    assert find_examples(folder, "a dog", cache_dir=cache) == whole
    assert decoded == ["image"] * 3
    assert sorted(file.read_text(encoding="utf-8").splitlines()) == sorted(before.splitlines())


def test_what_cannot_be_written_is_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert len(find_examples(folder, "a dog", cache_dir=tmp_path / "file")) == 3
    assert "The next start checks the images again" in caplog.text


def test_an_interruption_keeps_what_was_found(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def interrupted() -> None:
        with CheckedFiles(folder, cache) as checked:
            checked.decode("image", folder / "0.png")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with CheckedFiles(folder, cache) as checked:
        assert checked.knows("image", folder / "0.png")
        assert not checked.knows("image", folder / "1.png")
