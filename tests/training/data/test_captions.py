"""Which captions are read, which files are named as passed over, and what is refused."""

from __future__ import annotations

import json
import logging
import os

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.training.data import captions
from gralora_diffusion.training.data.captions import caption_files
from gralora_diffusion.training.data.image_folder import find_examples


@pytest.fixture
def folder(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    return tmp_path / "data"


def fill(folder, *images):
    for number, name in enumerate(images):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name, "PNG")


def write(folder, name, content):
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(data)


def found(folder, prompt="the prompt", **options):
    return {e.source.name: e.caption for e in find_examples(folder, prompt, **options)}


def said(caplog):
    """Warnings by what they are about -> the files that they name."""
    texts = [record.getMessage().split(": ", 1)[1] for record in caplog.records]
    return {text.split(" (")[0]: text.split(": ", 1)[1] for text in texts}


def problems(folder, prompt="the prompt", **options):
    with pytest.raises(DataError) as caught:
        find_examples(folder, prompt, **options)
    return caught.value.problems


PASSED_OVER = "captions without an image or in an unsupported format, or other files, ignored"
DIFFERING = "images with captions that differ, of which the first is used"
MASKS = "masks left out, since --masked_loss is not given"


# -- files beside images ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "name"),
    [
        *(("1.png", name) for name in ("1.txt", "1.TXT", "1.Caption", "1.caption", "1.png.txt")),
        *(("1.png", name) for name in ("1.png.caption", "1.PNG.TXT", "1.json", "1.png.json")),
        *(("IMG.PNG", name) for name in ("img.txt", "IMG.txt", "Img.TXT", "img.png.txt")),
        ("a.b.png", "a.b.txt"),
    ],
)
def test_captions_beside_images(folder, caplog, image, name):
    fill(folder, image)
    write(folder, name, '{"caption": "the caption"}' if "json" in name else "the\n caption\n")
    assert found(folder) == {image: "the caption"}
    assert not caplog.records


def test_a_caption_goes_to_the_image_of_just_its_name(folder, caplog):
    fill(folder, "a.png", "A.jpg", "b.png", "b.jpg")
    for name in ("a.txt", "b.txt", "b.png.txt"):
        write(folder, name, name)
    assert found(folder) == {
        "a.png": "a.txt", "A.jpg": "the prompt", "b.png": "b.txt", "b.jpg": "b.txt"
    }  # fmt: skip
    assert said(caplog) == {DIFFERING: "b.png (b.txt, not b.png.txt)"}


def test_order_of_the_files_beside_a_image():
    names = ["1.TXT", "1.caption", "1.json", "1.png.txt", "1.txt", "2.txt", "1.png", "1.tags"]
    assert caption_files(["1.png", "3.png"], names) == {
        "1.png": ["1.txt", "1.png.txt", "1.TXT", "1.caption", "1.json"],
        "3.png": [],
    }


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        ('{"caption": "ai-toolkit", "caption_short": "x"}', "ai-toolkit"),
        ('\ufeff{"text": null, "prompt": "with\\u2028a mark"}', "with a mark"),
        ('{"tags": "a, b", "text": "the text"}', "the text"),
    ],
)
def test_json_beside_a_image(folder, content, caption):
    fill(folder, "1.png")
    write(folder, "1.json", content)
    assert found(folder) == {"1.png": caption}


def test_caption_column_names_a_key_of_json_files_too(folder):
    fill(folder, "1.png")
    write(folder, "1.json", '{"caption": "short", "long": "longer"}')
    assert found(folder, caption_column="long") == {"1.png": "longer"}


@pytest.mark.parametrize(
    "content",
    [
        *('{"shapes": []}', '{"caption": ["a", 2]}', '{"caption": "\\ud800"}', "[1]", '"x"', "3"),
        *("{", "[" * 100_000, b"\xff\xfe"),
    ],
)
def test_json_of_another_kind_is_named(folder, caplog, content):
    fill(folder, "1.png")
    write(folder, "1.json", content)
    assert found(folder) == {"1.png": "the prompt"}
    assert said(caplog) == {PASSED_OVER: "1.json"}


def test_other_captions_are_named_as_captions(folder, caplog):
    fill(folder, "1.png", "more/2.png")
    names = ["0.txt", "1.cap", "1.tags", "1.yaml", "captions.tsv", "meta_cap.json", "tags.JSONL"]
    for name in (*names, "1.npz", "readme.md"):
        write(folder, name, "{}")
    assert found(folder) == {"1.png": "the prompt"}
    assert said(caplog) == {
        PASSED_OVER: ", ".join(names),
        "other files, ignored": "1.npz, readme.md",
        "sub-folders that are not read": "more",
    }


def test_an_image_may_have_several_captions(folder, caplog):
    """A list in JSON is several captions; the lines of a text are, if that is asked for."""
    fill(folder, "1.png", "2.png", "3.png", "4.png")
    write(folder, "metadata.jsonl", '{"file_name": "1.png", "text": ["a  b", "c", "", "a b"]}\n')
    write(folder, "2.txt", "\ufeffone\r\n\r\n two\u2028still two \nthree\n")
    write(folder, "3.json", '{"caption": ["x", "y"]}')
    for per_line, second in ((False, ("one two still two three",)), (True, None)):
        examples = find_examples(folder, "the prompt", caption_per_line=per_line)
        captions = {e.source.name: e.captions for e in examples}
        assert captions == {
            "1.png": ("a b", "c"),
            "2.png": second or ("one", "two still two", "three"),
            "3.png": ("x", "y"),
            "4.png": ("the prompt",),
        }
    assert not caplog.records


def test_captions_that_differ_are_named(folder, caplog):
    fill(folder, "1.png", "2.png", "3.png")
    write(folder, "metadata.jsonl", '{"file_name": "1.png", "text": "a"}\n')
    for name, text in {"1.txt": "b", "2.txt": "c", "2.caption": "c\n", "3.txt": " "}.items():
        write(folder, name, text)
    write(folder, "3.caption", "d")
    assert found(folder) == {"1.png": "a", "2.png": "c", "3.png": "d"}
    assert said(caplog) == {DIFFERING: "1.png (metadata.jsonl, not 1.txt)"}


def test_caption_files_that_cannot_be_read(folder, monkeypatch):
    monkeypatch.setattr(captions, "_MAX_CAPTION", 100)
    fill(folder, "1.png", "2.png", "3.png")
    os.mkfifo(folder / "1.txt")
    write(folder, "2.txt", "x" * 101)
    write(folder, "3.txt", b"\xff\xfe\x00")
    told = problems(folder)
    for problem, text in zip(told, ("1.txt", "2.txt", "3.txt"), strict=True):
        assert problem.startswith(f"{text} cannot be read")
    assert "named pipe" in told[0]
    assert "at most 100" in told[1]


# -- metadata files --------------------------------------------------------------------------------


ROWS = [("1.png", "one, with a comma"), ("sub/2.png", 'two "quoted"'), ("3.png", "")]


def metadata(name, key="file_name", column="text", rows=ROWS):
    ending = name.lower().rsplit(".", 1)[1]
    if ending == "jsonl":
        return "".join(json.dumps({key: n, column: text}) + "\n" for n, text in rows).encode()
    if ending == "csv":
        quoted = ['"{}","{}"'.format(n, text.replace('"', '""')) for n, text in rows]
        return "\r\n".join([f"{key},{column}", *quoted, ""]).encode()
    table = pyarrow.table({key: [n for n, _ in rows], column: [text or None for _, text in rows]})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet",
                                  "Metadata.JSONL", "METADATA.CSV"])  # fmt: skip
@pytest.mark.parametrize(("key", "column"), [("file_name", "text"), ("image", "caption")])
def test_metadata_as_imagefolder_has_it(folder, caplog, name, key, column):
    fill(folder, "1.png", "sub/2.png", "3.png", "4.png")
    write(folder, name, metadata(name, key, column))
    assert found(folder) == {
        "1.png": "one, with a comma",
        "2.png": 'two "quoted"',
        "3.png": "the prompt",
        "4.png": "the prompt",
    }
    assert not caplog.records


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_caption_column_of_any_metadata(folder, name):
    fill(folder, "1.png")
    write(folder, name, metadata(name, column="long", rows=[("1.png", "the long one")]))
    assert found(folder, caption_column="long") == {"1.png": "the long one"}
    (problem,) = problems(folder, caption_column="lang")
    assert problem.endswith(f"but {name} has no such column. It has: file_name, long")


def test_ends_of_lines_inside_json_strings(folder):
    """U+2028 and others end a line for str.splitlines, and may stand in JSON as they are."""
    fill(folder, "1.png", "2.png")
    text = "a\u2028b\u2029c\x85d\x1ce\x0bf"
    lines = [
        json.dumps({"file_name": f"{n}.png", "text": text}, ensure_ascii=False) for n in (1, 2)
    ]
    # control characters have to be escaped in JSON; json.dumps did that
    write(folder, "metadata.jsonl", "\r\n".join(lines))
    assert found(folder) == {"1.png": "a b c d e f", "2.png": "a b c d e f"}


def test_two_metadata_files_are_refused(folder):
    fill(folder, "1.png")
    for name in ("metadata.csv", "metadata.jsonl"):
        write(folder, name, metadata(name, rows=[("1.png", "x")]))
    assert problems(folder) == [
        "metadata.csv and metadata.jsonl both list images. Keep one of them"
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("https://example.com/1.png", "an address"),
        ("s3://bucket/1.png", "an address"),
        ("file:///etc/1.png", "an address"),
        ("data:image/png;base64,AAAA", "an address"),
        ("C:\\pictures\\1.png", "a path on another machine"),
        ("/etc/hostname", "not in the folder"),
        ("../1.png", "not in the folder"),
        ("sub/../../1.png", "not in the folder"),
        ("gone.png", "does not exist"),
        ("sub\\2.png", "does not exist. Write / between folders"),
        ("a\0b.png", "does not exist"),
        ("x" * 5000, "does not exist"),
        ("\ud800.png", "half of a character"),
        ("sub", "which is not a file"),
        ("pipe.png", "which is not a file"),
        ("out/1.png", "a link in its path leads out of it"),
    ],
)
def test_places_that_are_refused(folder, tmp_path, name, text):
    fill(folder, "1.png", "sub/2.png")
    fill(tmp_path / "elsewhere", "1.png")
    (folder / "out").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe.png")
    write(folder, "metadata.jsonl", json.dumps({"file_name": name, "text": "x"}))
    told = [problem for problem in problems(folder) if problem.startswith("metadata.jsonl, line 1")]
    assert len(told) == 1
    assert text in told[0]


def parquet(*texts: pyarrow.Array) -> bytes:
    table = pyarrow.table(dict(zip(("file_name", "text"), texts, strict=True)))
    pyarrow.parquet.write_table(table, sink := pyarrow.BufferOutputStream())
    return bytes(sink.getvalue())


def repeated(text: str, count: int) -> pyarrow.Array:
    """Stored once, whatever the count."""
    return pyarrow.DictionaryArray.from_arrays(
        pyarrow.repeat(pyarrow.scalar(0, pyarrow.int32()), count), [text]
    ).cast(pyarrow.string())


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        (
            "metadata.parquet",
            lambda: parquet(repeated("1.png", 1_000_001), repeated("", 1_000_001)),
            "metadata.parquet cannot be read: it has more than 1,000,000 rows",
        ),
        (
            "metadata.parquet",
            lambda: parquet(repeated("1.png", 300), repeated("a" * (1 << 20), 300)),
            "metadata.parquet cannot be read: its text columns have more than 268,435,456 bytes",
        ),
        (
            "metadata.jsonl",
            lambda: b"{}" + b"\nx" * 5000,
            "metadata.jsonl is not read further. Mend these problems first",
        ),
    ],
)
def test_small_files_of_very_many_rows(folder, name, data, said):
    fill(folder, "1.png")
    (folder / name).write_bytes(data())
    told = problems(folder)
    assert said in told
    assert len(told) <= 1001


def test_links_to_images_and_captions_are_followed(folder, tmp_path):
    """As in the Hub's cache, where every file is a link to one elsewhere."""
    fill(tmp_path / "pool", "a", "b")
    write(tmp_path / "pool", "c", "from a link")
    (folder / "sub").mkdir(parents=True)
    (folder / "1.png").symlink_to(tmp_path / "pool" / "a")
    (folder / "1.txt").symlink_to(tmp_path / "pool" / "c")
    (folder / "sub" / "2.png").symlink_to(tmp_path / "pool" / "b")
    write(folder, "metadata.jsonl", '{"file_name": "sub/2.png", "text": "listed"}')
    assert found(folder) == {"1.png": "from a link", "2.png": "listed"}


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("metadata.csv", "name,text\n1.png,x\n", "columns is called file_name or image"),
        ("metadata.csv", "", "It has: none"),
        ("metadata.csv", "file_name,text\n1.png,a dog, on grass\n", "line 2 has more fields"),
        ("metadata.csv", 'file_name,text\n1.png,"a dog\n', "is not CSV"),
        ("metadata.csv", b"file_name,text\n1.png,\xff\n", "UTF-8"),
        ("metadata.csv", "file_name,text\n1.png," + "x" * 200_000, "is not CSV"),
        ("metadata.parquet", b"PAR1 nonsense PAR1", "not a complete Parquet file"),
        ("metadata.parquet", metadata("m.parquet")[:-30], "not a complete Parquet file"),
        ("metadata.parquet", metadata("m.parquet", "name"), "none of its columns is called"),
        ("metadata.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("metadata.jsonl", '{"file_name": 3}', "must be like"),
        ("metadata.jsonl", '{"file_name": "1.png", "text": "\\ud800"}', "half of a character"),
        ("metadata.jsonl", '{"file_name": "1.png", "text": ' + "1" * 5000 + "}", "line 1"),
    ],
)  # fmt: skip
def test_damaged_metadata(folder, name, content, text):
    fill(folder, "1.png")
    write(folder, name, content)
    (problem,) = problems(folder)
    assert problem.startswith(name)
    assert text in problem


def test_metadata_that_is_no_file_or_too_long(folder, monkeypatch):
    fill(folder, "1.png")
    os.mkfifo(folder / "metadata.csv")
    (problem,) = problems(folder)
    assert "metadata.csv cannot be read: it is a named pipe" in problem
    (folder / "metadata.csv").unlink()
    monkeypatch.setattr(captions, "_MAX_METADATA", 60)
    for name in ("metadata.jsonl", "metadata.parquet"):
        write(folder, name, metadata(name, rows=[("1.png", "x" * 100)]))
        (problem,) = problems(folder)
        assert "at most 60" in problem
        (folder / name).unlink()


def test_short_rows_of_csv_have_no_caption(folder):
    fill(folder, "1.png", "2.png")
    write(folder, "metadata.csv", "file_name,text\n1.png\n\n2.png,two\n")
    assert found(folder) == {"1.png": "the prompt", "2.png": "two"}


# -- what is no image ------------------------------------------------------------------------------


def test_masks_are_left_out_and_named(folder, caplog):
    fill(folder, "1.png", "1-masklabel.png", "2.png", "2_mask.png", "3_mask.png", "mask/2.png")
    assert list(found(folder)) == ["1.png", "2.png", "3_mask.png"]
    assert said(caplog) == {
        MASKS: "1-masklabel.png, 2_mask.png",
        "sub-folders that are not read": "mask",
    }


def test_a_mask_that_is_listed_is_a_image(folder):
    fill(folder, "1.png", "1_mask.png")
    write(folder, "metadata.jsonl", '{"file_name": "1_mask.png", "text": "a mask"}')
    assert found(folder) == {"1.png": "the prompt", "1_mask.png": "a mask"}


def test_a_mask_of_a_listed_image_is_left_out(folder, caplog):
    fill(folder, "1.png", "1_mask.png", "sub/2.png", "sub/2-mask.png", "sub/3.png")
    write(folder, "metadata.csv", "file_name,text\n1.png,one\nsub/2.png,two\n")
    write(folder, "1.txt", "another")
    assert found(folder) == {"1.png": "one", "2.png": "two"}
    assert said(caplog) == {
        MASKS: "1_mask.png",
        DIFFERING: "1.png (metadata.csv, not 1.txt)",
        "images in sub-folders left out, since they are not listed": "sub/3.png",
    }


def test_dates_are_no_repeats(folder):
    fill(folder, "99999_sks dog/1.png", "20260131_trip/2.png")
    (example,) = find_examples(folder)
    assert (example.caption, example.repeats) == ("sks dog", 99999)


def test_files_that_are_no_images_are_named(folder, caplog):
    fill(folder, "1.png")
    names = ["a.h5", "b.pdf", "c.eps", "d.mpg", "e.JXL", "f.svg", "g.hdf"]
    for name in names:
        write(folder, name, "x")
    assert list(found(folder)) == ["1.png"]
    kind = "images in an unsupported format, ignored; HEIC needs the package pillow-heif"
    assert said(caplog) == {kind: ", ".join(names)}


def test_what_is_not_a_file_does_not_hang(folder):
    fill(folder, "1.png")
    os.mkfifo(folder / "2.png")
    (problem, _) = problems(folder)
    assert problem == "2.png cannot be decoded: it is a named pipe, not a file"
    assert list(found(folder, skip_bad_images=True)) == ["1.png"]


def test_damaged_colours_are_told_and_used(folder, caplog):
    fill(folder, "1.png")
    Image.new("RGB", (8, 8)).save(folder / "2.png", icc_profile=b"nonsense")
    assert list(found(folder)) == ["1.png", "2.png"]
    ((about, names),) = said(caplog).items()
    assert about == "images used without the parts that cannot be read"
    assert names.startswith("2.png (its color profile cannot be used")
