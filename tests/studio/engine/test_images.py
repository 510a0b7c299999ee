"""Folders of images as the studio shows them and as a run reads them."""

from __future__ import annotations

import io
import os
import shutil

import pytest
from PIL import Image

from gralora_diffusion.studio.engine.images import (
    add_images,
    check_folder,
)
from gralora_diffusion.studio.engine.opened import OpenedFiles
from gralora_diffusion.training.data.masks import MaskPlaces
from gralora_diffusion.training.data.own_captions import list_images
from tests import ROOT
from tests.training.runs import captions_of_a_run, copy_robot


@pytest.fixture
def folder(tmp_path):
    return copy_robot(tmp_path)


def test_uploads_are_decoded_and_get_new_names(tmp_path):
    there = tmp_path / "uploads"
    there.mkdir()
    data = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(data, "JPEG")
    (there / "..x<b>.JPG").write_bytes(data.getvalue())
    (there / "c.png").write_bytes(data.getvalue())  # a JPEG by its content
    (there / "a.png").write_bytes(b"not an image")
    (there / "a.txt").write_text("a\ncaption")
    (there / "b.txt").write_bytes(b"\xff\xfe")
    count, problems = add_images(tmp_path / "set", sorted(there.iterdir()))
    assert count == 2
    assert [p.split(" ")[0] for p in problems] == ["a.png", "a.txt", "b.txt"]
    assert sorted(os.listdir(tmp_path / "set")) == ["c.jpe", "x-b.jpg"]
    add_images(tmp_path / "set", [there / "..x<b>.JPG"])
    assert (tmp_path / "set/x-b-2.jpg").exists()  # nothing is overwritten


def test_uploaded_captions_follow_their_images(folder, tmp_path):
    there = tmp_path / "uploads"
    there.mkdir()
    for name in ("00.png", "00.jpg", "new.png"):
        Image.new("RGB", (20, 10), "red").save(there / name)
    texts = {"00.txt": "another", "00.png.txt": "of the PNG", "01.txt": "other", "new.txt": "n\nm"}
    for name, text in texts.items():
        (there / name).write_text(text)
    before = captions_of_a_run(folder)
    count, problems = add_images(folder, sorted(there.iterdir()))
    assert count == 3
    assert problems == ["01.txt is not copied, because there is a 01.txt already"]
    new = {"00-2.jpg": "another", "00-3.png": "another", "new.png": "n m"}
    assert captions_of_a_run(folder) == before | new
    assert (folder / "00-3.png.txt").read_text() == "of the PNG\n"
    again = [*sorted(there.glob("new*")), shutil.copy(there / "new.txt", tmp_path / "new.txt")]
    assert (
        add_images(folder, map(type(there), again))[1]
        == ["new.txt is not copied, because another has the same name"] * 2
    )
    same = [there / "new.png", shutil.copy(there / "00.png", tmp_path / "new.png")]
    count, problems = add_images(tmp_path / "two", [*same, there / "new.txt"])
    assert count == 2
    assert problems == ["new.txt is not copied, because several images are called new.png"]
    assert sorted(os.listdir(tmp_path / "two")) == ["new-2.png", "new.png"]


def test_crops_and_problems_of_a_folder(folder):
    Image.new("RGB", (400, 100)).save(folder / "05.png")
    checked = check_folder(folder, "a prompt", 64, False)
    assert checked.problems == []
    crop = checked.crops[folder / "05.png"]
    assert (crop.bucket, crop.shown, crop.enlarged) == ((64, 64), 0.25, False)
    assert crop.box == pytest.approx((0.375, 0, 0.625, 1))
    assert checked.crops[folder / "00.png"].box == (0, 0, 1, 1)
    (height, width), _ = check_folder(folder, "a prompt", 64, True).buckets[-1]
    assert height < width
    (folder / "01.png").write_bytes(b"")
    (folder / "02.txt").unlink()
    problems = check_folder(folder, None, 64, False).problems
    assert any(p.startswith("01.png cannot be decoded") for p in problems)
    assert any(p.startswith("02.png has no caption") for p in problems)


def test_masks_and_control_images(folder, tmp_path):
    masks = MaskPlaces(ROOT / "samples/masks/robot")
    before = shutil.copytree(folder, tmp_path / "before")
    checked = check_folder(folder, None, 64, False, masks=masks, controls=[before])
    assert checked.problems == []
    images = [folder / f"0{number}.png" for number in range(5)]
    assert checked.masks == {image: masks.folder / image.name for image in images}
    assert checked.controls == {image: [before / image.name] for image in images}
    (before / "03.png").unlink()
    (before / "04.png").write_bytes(b"")
    Image.new("L", (20, 10), "white").save(folder / "00.mask.png")
    problems = check_folder(folder, None, 64, False, masks=MaskPlaces(), controls=[before]).problems
    assert [text.partition(" ")[0] for text in problems[:3]] == [
        "--control_data_dir",
        "00.png:",
        "04.png:",
    ]
    assert "has no control image for 03.png" in problems[0]
    assert "its mask 00.mask.png has 20 x 10 pixels, but the image has" in problems[1]
    (folder / "00.mask.png").unlink()
    without = check_folder(folder, None, 64, False, masks=MaskPlaces())
    assert without.problems[0].startswith("no image has a mask")


def test_control_images_that_a_metadata_file_names_are_no_images(folder):
    line = '{"file_name": "00.png", "text": "a", "control": "01.png"}'
    (folder / "metadata.jsonl").write_text(line)
    assert [image.path.name for image in list_images(folder)[0]] == [
        *("00.png", "02.png", "03.png", "04.png")
    ]
    checked = check_folder(folder, None, 64, False)
    assert checked.problems == []
    assert checked.controls == {folder / "00.png": [folder / "01.png"]}


def test_ids_lead_to_files_in_opened_folders_alone(folder, tmp_path):
    opened = OpenedFiles()
    with pytest.raises(PermissionError):
        opened.add(folder / "00.png")
    opened.open_folder(folder)
    name = opened.add(folder / "00.png")
    assert name == opened.add(folder / "00.png")
    assert opened.find(name) == folder / "00.png"
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"")
    (folder / "link.png").symlink_to(secret)
    (folder / "sub").symlink_to(tmp_path)
    assert opened.find(opened.add(folder / "link.png")) is None
    for path in (folder / "../secret.png", folder / "sub/secret.png", secret):
        with pytest.raises(PermissionError):
            opened.add(path)
    (folder / "00.png").unlink()
    (folder / "00.png").symlink_to(secret)
    assert opened.find(name) is None
    assert opened.find("../00.png") is None
    assert OpenedFiles().find(name) is None
