"""The DreamBooth benchmark's file and folders."""

from __future__ import annotations

import pytest

from gralora_diffusion.benchmark.dreambooth import read_prompts, read_subjects
from gralora_diffusion.io.errors import DataError
from tests.benchmark import judges
from tests.benchmark.runs import TEXT, clone


def test_subjects(tmp_path):
    bear, cat, dog = read_subjects(clone(tmp_path))
    assert [s.name for s in (bear, cat, dog)] == ["bear_plushie", "cat2", "dog"]
    assert [s.class_name for s in (bear, cat, dog)] == ["stuffed animal", "cat", "dog"]
    assert [s.live for s in (bear, cat, dog)] == [False, True, True]
    assert [len(s.images) for s in (bear, cat, dog)] == [2, 3, 4]
    assert cat.held_out is None
    assert cat.folder == tmp_path / "dataset" / "cat2"
    assert cat.images == [cat.folder / f"{n}.png" for n in range(3)]
    assert bear.prompts("sks") == [
        "a sks stuffed animal on top of pink fabric",
        "a sks stuffed animal with the Eiffel Tower in the background",
        "a cube shaped sks stuffed animal",
    ]
    assert bear.prompts() == [
        "a stuffed animal on top of pink fabric",
        "a stuffed animal with the Eiffel Tower in the background",
        "a cube shaped stuffed animal",
    ]
    assert dog.prompts("<new1>") == ["a <new1> dog wearing a santa hat", "a red <new1> dog"]
    assert dog.prompts() == ["a dog wearing a santa hat", "a red dog"]
    assert bear.instance_prompt("sks") == "a sks stuffed animal"
    assert bear.class_prompt == "a stuffed animal"


def test_some_subjects(tmp_path):
    folder = clone(tmp_path)
    found = read_subjects(folder / "dataset", ["dog", "bear_plushie"])
    assert [s.name for s in found] == ["bear_plushie", "dog"]  # as the file has them
    with pytest.raises(
        DataError, match=r"no subject cow, dog3, which --subjects names\. The subjects are: bear_"
    ):
        read_subjects(folder, ["cow", "dog", "dog3"])


def test_file_of_another_system(tmp_path):
    folder = clone(tmp_path)
    path = folder / "dataset" / "prompts_and_classes.txt"
    expected = read_prompts(path)
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert read_prompts(path) == expected


def test_other_files_among_the_images(tmp_path):
    folder = clone(tmp_path)
    for name in (".DS_Store", "._0.jpg", "notes.txt", "0_mask.png", "a.h5"):
        (folder / "dataset" / "dog" / name).write_bytes(b"x")
    assert [p.name for p in read_subjects(folder, ["dog"])[0].images] == [
        f"{n}.png" for n in range(4)
    ]


def test_folders_that_lack(tmp_path):
    with pytest.raises(DataError, match=r"Give a clone of https://github\.com/google/dreambooth"):
        read_subjects(tmp_path)
    folder = clone(tmp_path)
    for path in (folder / "dataset" / "dog").iterdir():
        path.unlink()
    (folder / "dataset" / "cat2").rename(folder / "cat2")
    with pytest.raises(DataError) as caught:
        read_subjects(folder)
    assert caught.value.problems == ["cat2: there is no such folder", "dog: no image in it"]
    assert len(read_subjects(folder, ["bear_plushie"])) == 1


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("cat2,cat", "cat2", "line 5 is not understood: cat2"),
        ("cat2,cat", "dog,cat", "line 6 is not understood: dog,dog"),
        ("cat2,cat", "../cat2,cat", "line 5 is not understood: ../cat2,cat"),
        ("cat2,cat", f"{'x' * 256},cat", "line 5 is not understood: xxx"),
        ("cat2,cat", "a\0b,cat", "line 5 is not understood: a\0b,cat"),
        ("cat2,cat", "..,cat", "line 5 is not understood: ..,cat"),
        ("'a red {0} {1}'", "'a red {0} {2}'", "line 22 is not understood: 'a red {0} {2}'.format"),
        ("'a red {0} {1}'", "'a {0} {1} {1}'", "line 22 is not understood"),
        ("'a red {0} {1}'.format", "'a red {0} {1}'.join", "line 22 is not understood"),
        ("Prompts\n\nObject Prompts", "'x'", "line 8 is not understood: 'x'"),
        ("Live Subject Prompts", "", "there are no prompts below 'Live Subject Prompts'"),
        ("subject_name,class", "", "there are no subjects. List them below"),
    ],
)
def test_file_that_is_not_understood(tmp_path, old, new, problem):
    folder = clone(tmp_path, TEXT.replace(old, new, 1))
    with pytest.raises(DataError) as caught:
        read_subjects(folder)
    assert any(problem in found for found in caught.value.problems)
    assert str(folder / "dataset" / "prompts_and_classes.txt") in str(caught.value)


def test_file_that_is_no_text(tmp_path):
    folder = clone(tmp_path)
    (folder / "dataset" / "prompts_and_classes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_subjects(folder)


def test_images_held_out(tmp_path):
    clone(tmp_path)
    for part, count in (("train", 2), ("held_out", 3)):
        judges.draw(tmp_path / "dataset/dog" / part, count)
    dog = read_subjects(tmp_path, ["dog"])[0]
    assert dog.images == [tmp_path / f"dataset/dog/train/{n}.png" for n in range(2)]
    assert dog.held_out == tmp_path / "dataset/dog/held_out"
