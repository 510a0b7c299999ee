"""The split of a captioned set."""

from __future__ import annotations

import shutil

import datasets
import pytest
from PIL import Image

from gralora_diffusion.benchmark.captioned import split, write_examples
from gralora_diffusion.io.errors import DataError
from gralora_diffusion.training.data.hf_dataset import DatasetRow, find_dataset_examples
from gralora_diffusion.training.data.image_folder import Example, find_examples
from tests.benchmark import judges


def captioned(folder, count=8):
    for number, path in enumerate(judges.draw(folder, count)):
        path.with_suffix(".txt").write_text(f"picture {number}", encoding="utf-8")
    return folder


def read_captioned(folder, held_out, seed):
    return split(find_examples(folder), held_out, seed)


def facts(examples):
    return {(e.content_key, e.caption) for e in examples}


def test_split(tmp_path):
    folder = captioned(tmp_path)
    found = read_captioned(folder, 3, seed=0)
    assert len(found.train) == 5
    assert len(found.held_out) == 3
    assert not facts(found.train) & facts(found.held_out)
    assert facts(found.train) | facts(found.held_out) == facts(find_examples(folder))
    names = [example.source.name for example in found.train]
    assert names == sorted(names)
    assert read_captioned(folder, 3, seed=0) == found
    others = {frozenset(facts(read_captioned(folder, 3, seed).held_out)) for seed in range(10)}
    assert len(others) > 5


def test_split_follows_contents_not_names(tmp_path):
    folder = captioned(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for path in folder.iterdir():
        shutil.copy(path, tmp_path / "b" / f"x{9 - int(path.stem)}{path.suffix}")
    one, two = (read_captioned(tmp_path / name, 3, seed=4) for name in "ab")
    assert facts(one.held_out) == facts(two.held_out)
    # what is held out stays held out when more is
    assert facts(one.held_out) < facts(read_captioned(folder, 5, seed=4).held_out)


def test_twins_are_on_one_side(tmp_path):
    folder = captioned(tmp_path, 4)
    for number in range(4):
        shutil.copy(folder / f"{number}.png", folder / f"twin{number}.png")
        (folder / f"twin{number}.txt").write_text("another caption", encoding="utf-8")
    found = read_captioned(folder, 2, seed=0)
    assert (len(found.train), len(found.held_out)) == (4, 4)
    keys = [{example.content_key for example in side} for side in (found.train, found.held_out)]
    assert not keys[0] & keys[1]


@pytest.mark.parametrize("held_out", [0, -1, 4, 9])
def test_numbers_that_cannot_be_held_out(tmp_path, held_out):
    examples = find_examples(captioned(tmp_path, 4))
    message = rf"held_out is {held_out}, but there are 4 different images\. Hold out 1 to 3"
    with pytest.raises(ValueError, match=message):
        split(examples, held_out, 0)


def test_images_without_caption_are_refused(tmp_path):
    folder = captioned(tmp_path, 4)
    (folder / "2.txt").unlink()
    with pytest.raises(DataError, match=r"2\.png has no caption"):
        read_captioned(folder, 2, 0)


def test_written_examples_are_read_by_the_trainer(tmp_path):
    folder = captioned(tmp_path / "from")
    jpeg = folder / "8.jpg"
    Image.new("RGB", (20, 10), "red").save(jpeg)
    (folder / "8.txt").write_text('"Größe" — 犬', encoding="utf-8")
    Image.new("RGB", (20, 10), "blue").save(folder / "9.jp2")  # of which Pillow says "JPEG2000"
    (folder / "9.txt").write_text("ends\u2028of\x85lines", encoding="utf-8")
    examples = find_examples(folder)
    files = write_examples(examples[3:], tmp_path / "new" / "to")
    assert [f.read_bytes() for f in files] == [e.source.read_bytes() for e in examples[3:]]
    before = [f.stat().st_mtime_ns for f in files]
    assert write_examples(examples[3:], tmp_path / "new" / "to") == files
    assert [f.stat().st_mtime_ns for f in files] == before  # another process may be reading them
    back = find_examples(tmp_path / "new" / "to")
    assert [(e.content_key, e.caption, e.size) for e in back] == [
        (e.content_key, e.caption, e.size) for e in examples[3:]
    ]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["to"]


def test_rows_of_a_dataset_are_written(tmp_path):
    paths = judges.draw(tmp_path / "from", 3)
    columns = {"image": [str(path) for path in paths], "text": ["one", "two", "three"]}
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(
        tmp_path / "kept"
    )
    rows = find_dataset_examples(str(tmp_path / "kept"), caption_column="text")
    assert isinstance(rows[0].source, DatasetRow)
    write_examples(rows, tmp_path / "to")
    assert facts(find_examples(tmp_path / "to")) == facts(rows)


def test_nothing_half_written_is_left(tmp_path):
    examples = find_examples(captioned(tmp_path / "from", 3))
    gone = Example(tmp_path / "gone.png", "gone", "0", (1, 1))
    with pytest.raises(DataError, match=r"gone\.png"):
        write_examples([*examples, gone], tmp_path / "new" / "to")
    assert not (tmp_path / "new").exists()
