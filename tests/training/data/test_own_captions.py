"""Captions as they are edited."""

from __future__ import annotations

import pytest
from PIL import Image

from gralora_diffusion.training.data.own_captions import (
    find_image,
    list_images,
    write_caption,
)
from tests.training.runs import captions_of_a_run, copy_robot


@pytest.fixture
def folder(tmp_path):
    return copy_robot(tmp_path)


def test_captions_are_those_that_a_run_reads(folder):
    (folder / "00.caption").write_text("not this one")
    (folder / "01.txt").write_text("")
    (folder / "01.caption").write_text("from the second file\n")
    (folder / "02.txt").unlink()
    (folder / "02.json").write_text('{"caption": "from JSON"}')
    (folder / "03.txt").write_text("two\nlines")
    images, problems = list_images(folder)
    assert problems == []
    shown = {image.path.name: image.caption or "none" for image in images}
    assert shown == captions_of_a_run(folder)
    assert {i.path.name: i.source for i in images}["01.png"] == "01.caption"
    assert [find_image(image.path) for image in images] == images
    with pytest.raises(FileNotFoundError):
        find_image(folder / "00.txt")


def test_concepts_and_metadata(folder, tmp_path):
    top = tmp_path / "concepts"
    top.mkdir()
    folder.rename(top / "3_sks toy")
    (top / "3_sks toy/metadata.jsonl").write_text('{"file_name": "00.png", "text": "listed"}\n')
    images, _ = list_images(top)
    assert [image.path.name for image in images] == [f"0{i}.png" for i in range(5)]
    assert images[0].caption == "listed"
    with pytest.raises(ValueError, match="the caption is in the metadata file; edit it there"):
        write_caption(images[0], "other")


def test_a_caption_is_written_beside_its_image(folder):
    (folder / "01.txt").unlink()
    text = "  <script>alert('é')</script>\n ${x} {{y}}  "
    for image in list_images(folder)[0][:2]:
        assert write_caption(image, text) == "<script>alert('é')</script> ${x} {{y}}"
    found = captions_of_a_run(folder)
    assert found["00.png"] == found["01.png"] == "<script>alert('é')</script> ${x} {{y}}"
    write_caption(list_images(folder)[0][0], " ")
    assert captions_of_a_run(folder)["00.png"] == "none"
    with pytest.raises(ValueError, match="more than 65,536 characters"):
        write_caption(list_images(folder)[0][0], "x" * 70_000)


@pytest.mark.parametrize("data", ["é".encode("latin-1"), "é".encode("utf-16")])
def test_a_caption_that_cannot_be_read_is_kept(folder, data):
    (folder / "00.txt").write_bytes(data)
    image = list_images(folder)[0][0]
    assert not image.is_editable
    with pytest.raises(ValueError, match=r"00\.txt cannot be read as UTF-8 text"):
        write_caption(image, "typed")
    assert (folder / "00.txt").read_bytes() == data


def test_captions_of_several_lines_are_not_joined(folder):
    (folder / "00.txt").write_text("first\n\nsecond\n")
    image = list_images(folder)[0][0]
    assert image.caption == "first second"
    with pytest.raises(ValueError, match=r"00\.txt has several lines, which may be a caption each"):
        write_caption(image, "typed")
    assert (folder / "00.txt").read_text() == "first\n\nsecond\n"


@pytest.mark.parametrize("is_there", [True, False])
def test_a_caption_of_two_images_is_not_edited(folder, is_there):
    Image.new("RGB", (20, 10)).save(folder / "00.jpg")
    if not is_there:
        (folder / "00.txt").unlink()
    found = {image.path.name: image.problem for image in list_images(folder)[0]}
    assert found["00.png"] == "00.txt is shared with 00.jpg"
    assert found["00.jpg"] == "00.txt is shared with 00.png"
    assert found["01.png"] == ""
    (folder / "00.png.txt").write_text("its own")
    assert find_image(folder / "00.png").is_editable is not is_there
