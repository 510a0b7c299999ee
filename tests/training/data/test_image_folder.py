"""Finding images and captions in folders and datasets, and what is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.training.data.buckets import Buckets
from gralora_diffusion.training.data.hf_dataset import find_dataset_examples
from gralora_diffusion.training.data.image_folder import (
    find_examples,
    warn_of_long_images,
    warn_of_small_images,
)
from gralora_diffusion.training.data.transforms import CropPlan
from tests.fuzzing import parquet_headers


def image(seed=0, size=(12, 8)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def fill(folder, names, size=(12, 8)):
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image(seed, size).save(path)


def write_metadata(folder, *entries):
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def captions(examples):
    return {example.source.name: example.caption for example in examples}


# -- folders ---------------------------------------------------------------------------------------


def test_folder_with_one_prompt(tmp_path):
    fill(tmp_path, ["b.png", "a.PNG", "c.jpeg"])
    examples = find_examples(tmp_path, "a photo of sks dog")
    assert [example.source for example in examples] == [
        tmp_path / name for name in ("a.PNG", "b.png", "c.jpeg")
    ]
    assert {example.caption for example in examples} == {"a photo of sks dog"}
    for example in examples:
        data = example.source.read_bytes()
        assert example.content_key == hashlib.sha256(data).hexdigest()
        assert example.size == (12, 8)
    np.testing.assert_array_equal(np.asarray(examples[0].load()), np.asarray(image(1)))


def test_captions_metadata_then_text_file_then_prompt(tmp_path):
    fill(tmp_path, ["1.png", "2.png", "3.png", "sub/4.png", "sub/5.png", "sub/unlisted.png"])
    (tmp_path / "1.txt").write_text("from the text file", encoding="utf-8")
    (tmp_path / "2.txt").write_text("\ufeffvon der\n Textdatei: Hündchen \n", encoding="utf-8")
    write_metadata(
        tmp_path,
        {"file_name": "1.png", "text": "from metadata"},
        "",
        {"file_name": "./sub/4.png", "text": None, "caption": "in a sub-folder"},
        {"file_name": "sub/5.png"},
    )
    found = find_examples(tmp_path, "the prompt")
    assert captions(found) == {
        "1.png": "from metadata",
        "2.png": "von der Textdatei: Hündchen",
        "3.png": "the prompt",
        "4.png": "in a sub-folder",
        "5.png": "the prompt",
    }


def test_caption_files_of_either_ending(tmp_path, caplog):
    fill(tmp_path, ["1.png", "2.png"])
    for name, text in {"1.caption": "a", "2.caption": "b", "2.txt": "c", "3.caption": "d"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert captions(find_examples(tmp_path)) == {"1.png": "a", "2.png": "c"}
    assert "other files, ignored (1): 3.caption" in caplog.text


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_metadata_columns(tmp_path, column):
    fill(tmp_path, ["1.png"])
    write_metadata(tmp_path, {"file_name": "1.png", column: "a cat", "other": 3})
    assert captions(find_examples(tmp_path)) == {"1.png": "a cat"}


def test_caption_column_chooses_among_the_metadata(tmp_path):
    fill(tmp_path, ["1.png"])
    write_metadata(tmp_path, {"file_name": "1.png", "text": "a cat", "long": "a cat on a mat"})
    assert captions(find_examples(tmp_path, caption_column="long")) == {"1.png": "a cat on a mat"}
    with pytest.raises(DataError, match=r"--caption_column is 'lang'.*file_name, long, text"):
        find_examples(tmp_path, "prompt", caption_column="lang")


def test_images_without_any_caption_are_all_named(tmp_path):
    fill(tmp_path, ["1.png", "2.png", "3.png"])
    (tmp_path / "1.txt").write_text("a dog", encoding="utf-8")
    (tmp_path / "3.txt").write_text("  \n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        find_examples(tmp_path, role="class")
    *problems, advice = caught.value.problems
    assert [problem.split(".")[0] for problem in problems] == ["2", "3"]
    assert advice.startswith("Give --class_prompt for all images without one")
    assert "--class_prompt" in str(caught.value)
    assert f"--class_data_dir '{tmp_path}'" in str(caught.value)


def test_every_fault_of_the_metadata_is_told(tmp_path):
    fill(tmp_path, ["1.png", "2.png"])
    write_metadata(
        tmp_path,
        '{"file_name": "1.png", "text": "fine"}',
        '{"file_name": "1.png"',
        "[1, 2]",
        {"text": "which picture?"},
        {"file_name": "gone.png", "text": "x"},
        {"file_name": "../1.png", "text": "x"},
        {"file_name": "2.png", "text": ["a", 3]},
        {"file_name": "1.png", "text": "another"},
    )
    with pytest.raises(DataError) as caught:
        find_examples(tmp_path, "prompt")
    told = caught.value.problems
    expected = [
        "line 2 is not JSON",
        "line 3 must be like",
        "line 4 must be like",
        "line 5 names gone.png, which does not exist",
        "line 6 names ../1.png, which is not in the folder",
        "line 7: the caption is ['a', 3]; it must be text, or a list",
        "line 8 gives 1.png a second, different caption",
    ]
    assert len(told) == len(expected)
    for problem, part in zip(told, expected, strict=True):
        assert part in problem


def test_caption_files_that_are_not_utf8_are_named(tmp_path):
    fill(tmp_path, ["1.png"])
    (tmp_path / "1.txt").write_bytes("Hündchen".encode("latin-1"))
    with pytest.raises(DataError, match=r"1\.txt cannot be read as UTF-8"):
        find_examples(tmp_path, "prompt")
    with pytest.raises(DataError, match=r"1\.png has no caption: 1\.txt is not read"):
        find_examples(tmp_path)


def test_stray_files_are_reported_once_and_hidden_ones_never(tmp_path, caplog):
    fill(tmp_path, ["1.png", "more/2.png"])
    for number in range(12):
        (tmp_path / f"note{number:02}.md").write_text("x", encoding="utf-8")
    for hidden in (".DS_Store", "._1.png"):
        (tmp_path / hidden).write_bytes(b"\0\1")
    with caplog.at_level(logging.INFO):
        assert len(find_examples(tmp_path, "prompt")) == 1
    strays, folders = (record.getMessage() for record in caplog.records)
    names = ", ".join(f"note{number:02}.md" for number in range(10))
    assert strays.endswith(f"other files, ignored (12): {names} and 2 more")
    assert folders.endswith("sub-folders that are not read (1): more")
    assert "DS_Store" not in caplog.text


def test_text_files_of_no_image_are_stray(tmp_path, caplog):
    fill(tmp_path, ["1.png"])
    for name in ("1.txt", "license.txt"):
        (tmp_path / name).write_text("words", encoding="utf-8")
    assert captions(find_examples(tmp_path)) == {"1.png": "words"}
    assert "other files, ignored (1): license.txt" in caplog.text


def test_no_folder_empty_folder_and_folder_of_folders(tmp_path):
    with pytest.raises(DataError, match=r"--instance_data_dir '.*gone': *\n.*no such folder"):
        find_examples(tmp_path / "gone", "prompt")
    with pytest.raises(DataError, match="there is no image in it"):
        find_examples(tmp_path, "prompt")
    fill(tmp_path, ["deep/1.png"])
    with pytest.raises(DataError, match="no image in it, and sub-folders are not read"):
        find_examples(tmp_path, "prompt")


def test_folders_of_a_concept_each(tmp_path, caplog):
    fill(tmp_path, ["10_sks dog/b.png", "10_sks dog/a.png", "2_zwx_cat/1.png", "0_none/1.png"])
    (tmp_path / "10_sks dog" / "a.caption").write_text("a sks dog asleep", encoding="utf-8")
    write_metadata(tmp_path / "2_zwx_cat", {"file_name": "1.png", "text": "a cat"})
    (tmp_path / "sample.txt").write_text("words", encoding="utf-8")
    found = find_examples(tmp_path, "unused")
    assert [(e.source.name, e.caption, e.repeats, e.concept) for e in found] == [
        ("a.png", "a sks dog asleep", 10, "10_sks dog"),
        ("b.png", "sks dog", 10, "10_sks dog"),
        ("1.png", "a cat", 2, "2_zwx_cat"),
    ]
    assert "ignored beside the concepts' folders (2): 0_none, sample.txt" in caplog.text
    (tmp_path / "3_empty").mkdir()
    with pytest.raises(DataError, match="there is no image in 3_empty"):
        find_examples(tmp_path)
    shutil.rmtree(tmp_path / "3_empty")
    classes = find_examples(tmp_path, "prompt", role="class")
    assert [(e.caption, e.repeats) for e in classes] == [(e.caption, e.repeats) for e in found]
    fill(tmp_path, ["own.png"])  # kohya's scripts would ignore it, and other programs all the rest
    with pytest.raises(DataError, match=r"contains images \(own.png\) and folders .*10_sks dog"):
        find_examples(tmp_path, "prompt")
    write_metadata(tmp_path, {"file_name": "own.png"}, {"file_name": "2_zwx_cat/1.png"})
    assert captions(find_examples(tmp_path, "prompt")).keys() == {"own.png", "1.png"}


def damage(folder):
    fill(folder, ["1.png", "2.png", "cut.png", "cut.jpg", "page.jpg", "empty.webp"], (64, 64))
    for name in ("cut.png", "cut.jpg"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-2000])
    (folder / "page.jpg").write_text("<html>404</html>", encoding="utf-8")
    (folder / "empty.webp").write_bytes(b"")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    return ["cut.jpg", "cut.png", "empty.webp", "gone.png", "page.jpg"]


def test_bad_images_are_all_named_in_one_error(tmp_path):
    bad = damage(tmp_path)
    with pytest.raises(DataError) as caught:
        find_examples(tmp_path, "prompt")
    *problems, advice = caught.value.problems
    assert [problem.split(" cannot be decoded: ")[0] for problem in problems] == bad
    assert all(problem.split(": ", 1)[1] for problem in problems)
    assert "--skip_bad_images" in advice
    assert "BytesIO" not in str(caught.value)


def test_bad_images_can_be_skipped_but_not_all(tmp_path, caplog):
    bad = damage(tmp_path)
    examples = find_examples(tmp_path, "prompt", skip_bad_images=True)
    assert list(captions(examples)) == ["1.png", "2.png"]
    assert all(name in caplog.text for name in bad)
    for example in examples:
        example.source.unlink()
    with pytest.raises(DataError, match="no image is left"):
        find_examples(tmp_path, "prompt", skip_bad_images=True)


def test_a_image_that_changes_after_the_start_is_noticed(tmp_path):
    fill(tmp_path, ["1.png"])
    (example,) = find_examples(tmp_path, "prompt")
    image(99).save(tmp_path / "1.png")
    with pytest.raises(DataError, match="was changed after the run started"):
        example.load()
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError, match="can no longer be read"):
        example.load()


def test_images_are_decoded_at_once_and_kept_in_order(tmp_path, monkeypatch):
    fill(tmp_path, [f"{number}.png" for number in range(8)])
    together, read = threading.Barrier(8), Path.read_bytes

    def read_bytes(path):
        together.wait(timeout=20)  # for the others, or it breaks
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    examples = find_examples(tmp_path, "prompt")
    assert [example.source.name for example in examples] == [f"{n}.png" for n in range(8)]
    for example in examples:
        assert example.content_key == hashlib.sha256(read(example.source)).hexdigest()


def test_all_kinds_of_files_load_upright_in_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image().save(tmp_path / "turned.jpg", exif=exif)
    image().convert("CMYK").save(tmp_path / "cmyk.jpg")
    image().convert("RGBA").save(tmp_path / "alpha.png")
    image().save(tmp_path / "moving.gif", save_all=True, append_images=[image(1)])
    Image.fromarray(np.full((8, 12), 30000, np.uint16)).save(tmp_path / "deep.png")
    sizes = {
        e.source.name: (e.size, e.load().size, e.load().mode) for e in find_examples(tmp_path, "p")
    }
    flat = ((12, 8), (12, 8), "RGB")
    turned = ((8, 12), (8, 12), "RGB")
    kinds = ("alpha.png", "cmyk.jpg", "deep.png", "moving.gif")
    assert sizes == {**dict.fromkeys(kinds, flat), "turned.jpg": turned}


def test_small_images_are_reported(tmp_path, caplog):
    fill(tmp_path, ["1.png"], (12, 8))
    fill(tmp_path, ["2.png"], (9, 9))
    examples = find_examples(tmp_path, "prompt")
    warn_of_small_images(examples, CropPlan(8))
    assert "images" not in caplog.text
    warn_of_small_images(examples, CropPlan(9))
    assert "--resolution 9: smaller images, enlarged for training (1): 1.png (12x8)" in caplog.text


def test_images_smaller_than_their_bucket_are_reported(tmp_path, caplog):
    fill(tmp_path, ["1.png"], (12, 8))
    fill(tmp_path, ["2.png"], (9, 9))
    examples = find_examples(tmp_path, "prompt")
    warn_of_small_images(examples, CropPlan(99, buckets=Buckets(99, 1, ((8, 12), (9, 9)))))
    assert "images" not in caplog.text
    warn_of_small_images(examples, CropPlan(8, buckets=Buckets(8, 1, ((8, 12), (16, 16)))))
    assert "aspect-ratio buckets: smaller images, enlarged for training (1): 2.png (9x9)" in (
        caplog.text
    )


def test_images_of_which_little_is_shown_are_reported(tmp_path, caplog):
    fill(tmp_path, ["1.png"], (32, 8))
    fill(tmp_path, ["2.png"], (33, 8))
    fill(tmp_path, ["3.png"], (1, 9))
    examples = find_examples(tmp_path, "prompt")
    warn_of_long_images(examples, CropPlan(8))
    (record,) = caplog.records
    assert record.getMessage() == (
        "--resolution 8: long images, of which a sample shows less than a quarter (2): "
        "2.png (33x8), 3.png (1x9)"
    )


# -- datasets --------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def save_dataset(folder, **columns):
    folder.mkdir(exist_ok=True)
    features = datasets.Dataset.from_dict(columns)
    if "image" in columns:
        features = features.cast_column("image", datasets.Image())
    features.to_parquet(str(folder / "train-00000.parquet"))
    return str(folder)


def png_bytes(tmp_path, seed):
    path = tmp_path / "one.png"
    image(seed).save(path)
    return path.read_bytes()


def test_dataset_rows_with_captions(tmp_path, cache):
    data = [png_bytes(tmp_path, seed) for seed in range(3)]
    rows = [{"bytes": item, "path": None} for item in data]
    name = save_dataset(tmp_path / "set", image=rows, text=["zero", None, " two\n"])
    found = find_dataset_examples(name, "prompt", caption_column="text", cache_dir=cache)
    assert [example.caption for example in found] == ["zero", "prompt", "two"]
    for seed, example in enumerate(found):
        assert example.content_key == hashlib.sha256(data[seed]).hexdigest()
        assert example.size == (12, 8)
        np.testing.assert_array_equal(np.asarray(example.load()), np.asarray(image(seed)))
    found = find_dataset_examples(name, "prompt", cache_dir=cache)
    assert {example.caption for example in found} == {"prompt"}


def test_dataset_from_an_image_folder_and_from_disk(tmp_path, cache):
    fill(tmp_path / "set", ["1.png", "2.png"])
    write_metadata(
        tmp_path / "set",
        {"file_name": "1.png", "text": "one"},
        {"file_name": "2.png", "text": "two"},
    )
    found = find_dataset_examples(str(tmp_path / "set"), caption_column="text", cache_dir=cache)
    assert [example.caption for example in found] == ["one", "two"]
    loaded = datasets.load_dataset(str(tmp_path / "set"), cache_dir=cache)
    loaded["train"].save_to_disk(str(tmp_path / "disk"))
    loaded.save_to_disk(str(tmp_path / "disks"))
    for kept in ("disk", "disks"):
        again = find_dataset_examples(str(tmp_path / kept), caption_column="text")
        assert [(e.caption, e.content_key) for e in again] == [
            (e.caption, e.content_key) for e in found
        ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("null\n", "metadata.jsonl: a row is null"),
        ('\ufeff null{"file_name": "1.png"}\n', "metadata.jsonl: a row is null"),
        ('{"a": ' + "[" * 30_000, "metadata.jsonl: it is nested too deeply"),
        (
            '"[[\\"]]"\n' + "]" * 9 + '["]", "\\\\", ' * 70,
            "metadata.jsonl: it is nested too deeply",
        ),
        ("\n".join("[" * 70), "metadata.jsonl: it is nested too deeply"),
    ],
)
def test_rows_that_would_end_the_process(tmp_path, cache, text, said):
    fill(tmp_path, ["1.png"])
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(DataError, match=f"cannot be loaded: .*{said}"):
        find_dataset_examples(str(tmp_path), "p", cache_dir=cache)


def test_texts_of_rows_may_contain_brackets(tmp_path, cache):
    caption = '[[{"' * 100 + "\\"
    fill(tmp_path, ["1.png"])
    write_metadata(tmp_path, {"file_name": "1.png", "text": caption, "boxes": [[1, 2], [3]] * 50})
    (found,) = find_dataset_examples(str(tmp_path), caption_column="text", cache_dir=cache)
    assert found.caption == caption


def test_damaged_tables_and_pipes_of_a_dataset_on_disk(tmp_path):
    """Arrow would read outside of the file, and wait for the pipe."""
    rows = [{"bytes": png_bytes(tmp_path, 0), "path": None}]
    made = datasets.Dataset.from_dict({"image": rows, "text": ["a caption of it"]})
    made.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "disk"))
    (table,) = (tmp_path / "disk").glob("*.arrow")
    data = table.read_bytes()
    at = data.rindex(bytes(4) + (15).to_bytes(4, "little")) + 4  # where the caption ends
    table.write_bytes(data[:at] + (1 << 30).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(DataError, match=rf"{table.name}: In column 1: .* out of bounds"):
        find_dataset_examples(str(tmp_path / "disk"), caption_column="text")
    table.unlink()
    os.mkfifo(table)
    with pytest.raises(DataError, match=rf"{table.name}: it is a named pipe, not a file"):
        find_dataset_examples(str(tmp_path / "disk"), caption_column="text")


@pytest.mark.parametrize(
    ("kind", "compression", "said"),
    [
        (pyarrow.string(), None, None),
        (pyarrow.string(), "zstd", "it is compressed. Write it with Dataset.save_to_disk"),
        (pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), None, "column text may share"),
        (pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), "lz4", "it is compressed"),
        (pyarrow.list_(pyarrow.string_view()), None, "column text may share values"),
    ],
)
def test_small_tables_of_large_texts_on_disk(tmp_path, kind, compression, said):
    """They would fill the memory."""
    rows = [{"bytes": png_bytes(tmp_path, 0), "path": None}]
    made = datasets.Dataset.from_dict({"image": rows, "text": ["a caption"]})
    made.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "disk"))
    (table,) = (tmp_path / "disk").glob("*.arrow")
    read = pyarrow.ipc.open_stream(table.read_bytes()).read_all()
    texts = ["a caption" if kind != pyarrow.list_(pyarrow.string_view()) else ["a caption"]]
    read = read.set_column(1, "text", pyarrow.array(texts, kind))
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with pyarrow.ipc.new_stream(str(table), read.schema, options=options) as writer:
        writer.write_table(read)
    if said is None:
        (found,) = find_dataset_examples(str(tmp_path / "disk"), caption_column="text")
        assert found.caption == "a caption"
        return
    with pytest.raises(DataError, match=said):
        find_dataset_examples(str(tmp_path / "disk"), caption_column="text")


@pytest.mark.parametrize("rows", [2, 2**40, -1])
def test_a_table_that_lies_about_its_rows(tmp_path, cache, rows):
    """Arrow would reserve memory for as many, and fill it."""
    image = {"bytes": png_bytes(tmp_path, 0), "path": None}
    name = save_dataset(tmp_path / "set", image=[image], text=["a"])
    (table,) = Path(name).glob("*.parquet")
    assert find_dataset_examples(name, "p", cache_dir=cache)
    with _footer(table) as footer:
        (group,) = footer[4]
        next(field for field in group.value if field.number == 3).value = rows
    with pytest.raises(DataError, match=f"its number of rows, {rows:,}, is impossible"):
        find_dataset_examples(name, "p", cache_dir=cache)


@contextmanager
def _footer(table):
    """The footer of a Parquet file, by its numbers, to be changed."""
    data = table.read_bytes()
    front = data[: len(data) - 8 - int.from_bytes(data[-8:-4], "little")]
    footer, _ = parquet_headers.read_struct(data, len(front))
    yield {field.number: field.value for field in footer}
    written = parquet_headers.write_struct(footer)
    table.write_bytes(front + written + len(written).to_bytes(4, "little") + b"PAR1")


@pytest.mark.parametrize("name", ["metadata.parquet", "train.parquet"])
def test_a_table_whose_headers_contradict_each_other(tmp_path, cache, name):
    """pyarrow ends the process if it is asked for the metadata of this column."""
    made = datasets.Dataset.from_dict({"file_name": ["1.png"], "text": ["a"]})
    fill(tmp_path, ["1.png"])
    made.to_parquet(str(tmp_path / name))
    with _footer(tmp_path / name) as footer:
        of_name = footer[2][1].value
        next(field for field in of_name if field.number == 1).value = 1  # INT32
    with pytest.raises(DataError, match="does not support INT32"):
        find_dataset_examples(str(tmp_path), "p", cache_dir=cache)
    if name == "metadata.parquet":
        with pytest.raises(DataError, match=r"metadata\.parquet, row 0 must be like"):
            find_examples(tmp_path, "p")


def test_a_small_table_of_a_large_text(tmp_path, cache):
    """It is stored once. Arrow would take 3 GB for it."""
    indices = pyarrow.repeat(pyarrow.scalar(0, pyarrow.int32()), 3000)
    text = pyarrow.DictionaryArray.from_arrays(indices, ["a" * (1 << 20)])
    table = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), table, store_schema=False)
    assert table.stat().st_size < 1 << 17
    with pytest.raises(DataError, match="more than 134,217,728 bytes of memory are needed"):
        find_dataset_examples(str(tmp_path), "p", cache_dir=cache)


def test_more_columns_than_the_library_reads_in_time(tmp_path, cache):
    image = {"bytes": png_bytes(tmp_path, 0), "path": None}
    numbers = [{f"n{i}": i for i in range(998)}]  # with the image's two, as many as are allowed
    name = save_dataset(tmp_path / "most", image=[image], numbers=numbers)
    assert len(find_dataset_examples(name, "p", cache_dir=cache)) == 1
    name = save_dataset(tmp_path / "more", image=[image], numbers=numbers, one=[1])
    with pytest.raises(DataError, match="it has 1,001 columns, more than 1,000"):
        find_dataset_examples(name, "p", cache_dir=cache)


def test_dataset_faults_are_named(tmp_path, cache):
    rows = [{"bytes": png_bytes(tmp_path, 0), "path": None}, {"bytes": b"junk", "path": None}, None]
    name = save_dataset(tmp_path / "set", image=rows, text=["a", "b", "c"], number=[1, 2, 3])

    def refuse(match, name=name, **options):
        with pytest.raises(DataError, match=match) as caught:
            find_dataset_examples(name, cache_dir=cache, **options)
        return caught.value.problems

    refuse("--image_column is 'jpg'.*Columns: image, text, number", image_column="jpg")
    refuse("--caption_column is 'label'", caption_column="label", prompt="p")
    refuse("column 'number' contains .* instead of images", image_column="number", prompt="p")
    refuse("number is 1; it must be text", caption_column="number")
    refuse("--dataset_name '.*gone'", name=str(tmp_path / "gone"), prompt="p")
    first, second, *_ = refuse("row 1 cannot be decoded", prompt="p")
    assert first.startswith("row 1 cannot be decoded")
    assert second == "row 2 cannot be decoded: it has no image"
    assert refuse("(?s)row 0 has no caption.*or --caption_column", skip_bad_images=True)
    kept = find_dataset_examples(name, "p", cache_dir=cache, skip_bad_images=True)
    assert [example.source.index for example in kept] == [0]


def test_without_the_datasets_package_its_installation_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        find_dataset_examples("owner/name", "prompt")
