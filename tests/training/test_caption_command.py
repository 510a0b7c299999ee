"""``gralora caption``: nothing that is there is overwritten, and what is written is read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from gralora_diffusion.training.caption_command import framed, main
from gralora_diffusion.training.data import own_captions
from gralora_diffusion.training.data.image_folder import find_examples
from tests.training.data.test_caption_model import save_blip
from tests.training.runs import make_images


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", 4)


def texts(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.txt")}


def caption(folder: Path, model: Path, *options: str) -> None:
    main([str(folder), "--model", str(model), "--max_new_tokens", "4", *options])


def test_captions_are_written_once_and_read_by_a_run(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "1.txt").write_text("mine")
    (folder / "2.txt").write_text("")
    caption(folder, model, "--dry_run")
    assert texts(folder) == {"1.txt": "mine", "2.txt": ""}
    assert "4 images: 3 to caption, 1 with a caption already" in capsys.readouterr().out

    caption(folder, model, "--prefix", "sks dog,", "--suffix", "at night", "--prompt", "a photo")
    written = texts(folder)
    assert written.keys() == {f"{number}.txt" for number in range(4)}
    assert written.pop("1.txt") == "mine"
    assert all(text.startswith("sks dog, a photo") for text in written.values())
    assert all(text.endswith(" at night\n") and text.count("\n") == 1 for text in written.values())
    read = {example.source.stem: example.caption for example in find_examples(folder)}
    assert {f"{name}.txt": f"{text}\n" for name, text in read.items() if text != "mine"} == written

    caption(folder, model)
    assert "0 to caption, 4 with a caption already" in capsys.readouterr().out
    assert texts(folder) == {**written, "1.txt": "mine"}
    caption(folder, model, "--overwrite")
    assert not set(texts(folder).values()) & {*written.values(), "mine"}


def test_captions_elsewhere_are_never_overwritten(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "listed"}')
    (folder / "1.txt").write_text("one\ntwo")
    (folder / "2.txt").write_bytes("Hündchen".encode("latin-1"))
    shutil.copyfile(folder / "3.png", folder / "3.bmp")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(SystemExit) as ended:
        caption(folder, model, "--overwrite")
    assert ended.value.code == 1
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    said = capsys.readouterr().err
    assert "0.png is left out: the caption is in the metadata file" in said
    assert "1.png is left out: 1.txt has several lines" in said
    assert "2.png is left out: 2.txt cannot be read as UTF-8" in said
    assert "3.png is left out: 3.txt is shared with 3.bmp" in said


def test_an_interrupted_command_goes_on(
    folder: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = shutil.copytree(folder, folder.with_name("whole"))
    caption(whole, model)
    write = own_captions.write_caption

    def interrupted(image: Any, text: str) -> str:
        if image.path.name == "2.png":
            raise KeyboardInterrupt
        return write(image, text)

    monkeypatch.setattr(own_captions, "write_caption", interrupted)
    with pytest.raises(KeyboardInterrupt):
        caption(folder, model)
    assert texts(folder).keys() == {"0.txt", "1.txt"}
    monkeypatch.undo()
    capsys.readouterr()
    caption(folder, model)
    assert "2 to caption, 2 with a caption already" in capsys.readouterr().out
    assert texts(folder) == texts(whole)


def test_an_image_that_cannot_be_read_does_not_end_it(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "1.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as ended:
        caption(folder, model)
    assert ended.value.code == 1
    assert texts(folder).keys() == {"0.txt", "2.txt", "3.txt"}
    assert "1.png has no new caption: it is not an image in a format" in capsys.readouterr().err


def test_a_caption_is_one_line_that_can_be_shown() -> None:
    assert framed("two\nlines \x1b[31m\u2028red", "sks,", "") == "sks, two lines  [31m red"
    with pytest.raises(ValueError, match="no text"):
        framed(" \n\x00", "sks", "x")


def test_a_model_that_cannot_be_had(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source, problem in (
        ("owner/absent", "the Hub's cache does not contain"),
        (tmp_path / "b", "bert"),
    ):
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(SystemExit) as ended:
            caption(folder, source)
        assert ended.value.code == 2
        assert problem in capsys.readouterr().err
    assert texts(folder) == {}
