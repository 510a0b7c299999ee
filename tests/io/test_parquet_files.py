import io
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow
import pyarrow.parquet
import pytest

from gralora_diffusion.io.parquet_files import (
    MOST_BYTES,
    MOST_TIMES,
    Chunk,
    check_parquet,
    read_chunks,
)

TEXT = pyarrow.field("text", pyarrow.string(), nullable=False)


def written(table, **options):
    pyarrow.parquet.write_table(table, file := io.BytesIO(), **options)
    return file


def table_of(texts, kind=TEXT):
    return pyarrow.table([texts], schema=pyarrow.schema([kind]))


def repeated(text, count):
    """Stored once, whatever the count."""
    indices = pyarrow.repeat(pyarrow.scalar(0, pyarrow.int32()), count)
    return pyarrow.DictionaryArray.from_arrays(indices, [text])


def check(*files):
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.parquet" for number in range(len(files))]
        for path, file in zip(paths, files, strict=True):
            path.write_bytes(file.getvalue())
        check_parquet(paths)


def refused(*files):
    limit = max(MOST_BYTES, MOST_TIMES * sum(len(file.getvalue()) for file in files))
    with pytest.raises(ValueError, match=f"more than {limit:,} bytes of memory are needed"):
        check(*files)


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "lz4", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_chunks_by_group(codec, version):
    texts = ["a" * 100, "bc", "", "d", "ef", "ef"]
    options = {"compression": codec, "data_page_version": version, "row_group_size": 3}
    plain = written(table_of(texts), use_dictionary=False, **options)
    # each text has its length before it
    assert read_chunks(plain) == [
        [Chunk("text", 4 * 3 + 102, 0, 4 * 3 + 102 + 4 * 3)],
        [Chunk("text", 4 * 3 + 5, 0, 4 * 3 + 5 + 4 * 3)],
    ]
    shared = written(table_of(texts), **options)
    for search, longest in ((False, (4 * 3 + 102, 4 * 2 + 3)), (True, (100, 2))):
        found = [chunk for (chunk,) in read_chunks(shared, search=search)]
        assert [chunk.longest for chunk in found] == list(longest)
        assert [c.most for c in found] == [c.unpacked + 3 * (4 + c.longest) for c in found]
    check(shared)


def test_names_of_nested_columns_and_numbers():
    rows = [{"image": {"bytes": b"1234", "path": "x"}, "sizes": [1, 2], "more": [b"12", b"3"]}]
    (group,) = read_chunks(written(pyarrow.Table.from_pylist(rows)), search=True)
    assert [(c.column, c.longest) for c in group] == [
        ("image", 4), ("image", 1), ("sizes", 12), ("more", 2),
    ]  # fmt: skip


def test_one_long_text_among_many_is_no_repetition():
    """The headers alone allow for 20 GB."""
    texts = [f"{i:05} " * 5 for i in range(20_000)] + ["x" * 400_000]
    file = written(table_of(texts))
    ((chunk,),) = read_chunks(file)
    assert chunk.most > 20_000 * 800_000
    check(file)


def test_a_large_text_that_is_repeated():
    fits, too_much = (repeated("a" * (1 << 20), count) for count in (125, 129))
    check(written(pyarrow.table({"text": fits})))
    refused(*[written(pyarrow.table({"text": fits.slice(0, 65)}))] * 2)
    refused(written(pyarrow.table({"text": too_much})))
    refused(written(pyarrow.table({"list": pyarrow.ListArray.from_arrays([0, 129], too_much)})))
    refused(written(pyarrow.table({"image": pyarrow.StructArray.from_arrays([too_much], ["b"])})))


def test_texts_with_a_common_beginning():
    options = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    check(written(table_of(["a" * (1 << 20)] * 125), **options))
    refused(written(table_of(["a" * (1 << 20)] * 129), **options))


def test_large_pages_and_many_nulls():
    options = {"use_dictionary": False, "compression": "zstd", "write_statistics": False}
    refused(written(table_of(["a" * (MOST_BYTES + 1)]), **options))
    refused(written(pyarrow.table({"n": pyarrow.nulls(MOST_BYTES // 4 + 1)}), **options))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1",
        lambda data: data[:-8] + b"\0\0\0\0PAR1",
        lambda data: b"PAR1" + data[40:],
        lambda data: data[:4] + b"\x1c" * 40 + data[44:],
        lambda data: data[:4] + b"\xff" * 40 + data[44:],
    ],
)
def test_damaged_headers(damage):
    data = written(table_of(["a" * 100, "b"])).getvalue()
    with pytest.raises(ValueError, match=r"not a complete Parquet file|its headers"):
        check(io.BytesIO(damage(data)))
