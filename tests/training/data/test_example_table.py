"""Examples in columns are the examples that were put into them."""

from __future__ import annotations

import gc
import hashlib
import pathlib
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gralora_diffusion.training.config.data_file import ALL_IMAGES
from gralora_diffusion.training.data.controls import ControlImage
from gralora_diffusion.training.data.dataset import TrainingSet
from gralora_diffusion.training.data.example_table import ExampleTable
from gralora_diffusion.training.data.hf_dataset import DatasetRow
from gralora_diffusion.training.data.image_folder import Example
from gralora_diffusion.training.data.masks import Mask
from gralora_diffusion.training.data.sets import SampledSet
from gralora_diffusion.training.data.transforms import CropPlan

OTHER_SET = replace(ALL_IMAGES)  # equal, but another one
FOLDER = Path("/some/folder")
EXAMPLES = [
    Example(FOLDER / "1.png", "a cat", "1" * 64, (64, 32)),
    Example(FOLDER / "ünï\udcff.png", "eine Kätzchen 🐈\n", "2" * 64, (1, 100_000)),
    Example(Path("here.png"), "", "no hash", (3, 4), repeats=10, concept="10_cat"),
    Example(FOLDER / "1.png", "a cat", "1" * 64, (64, 32), image_set=OTHER_SET),
    Example(
        Path("../up/2.png"),
        "a dog",
        "3" * 64,
        (5, 6),
        mask=Mask(Path("m.png"), "4" * 64, (0, 0, 1, 1)),
        controls=(ControlImage(Path("c.png"), "5" * 64, (7, 8)),),
        other_captions=("a hound", "a puppy"),
    ),
    Example(DatasetRow(3, "image", "first"), "a row", "6" * 64, (9, 9)),
    Example(DatasetRow(3, "image", "second"), "a row", "6" * 64, (9, 9)),
]


def test_examples_come_back_as_they_were() -> None:
    table = ExampleTable(iter(EXAMPLES))
    assert list(table) == EXAMPLES
    assert [table[-1], table[0]] == [EXAMPLES[-1], EXAMPLES[0]]
    for ours, theirs in zip(table, EXAMPLES, strict=True):
        assert ours.image_set is theirs.image_set
        assert ours.source is theirs.source or isinstance(ours.source, Path)
    assert table.index(EXAMPLES[4]) == 4
    with pytest.raises(IndexError):
        table[len(EXAMPLES)]
    assert list(ExampleTable()) == []


@pytest.mark.parametrize("part", [slice(2, 5), slice(None, None, -2), slice(9, 12)])
def test_parts(part: slice) -> None:
    table = ExampleTable(EXAMPLES)
    assert list(table[part]) == EXAMPLES[part]
    assert list(table[part][1:]) == EXAMPLES[part][1:]
    assert list(ExampleTable(table[part])) == EXAMPLES[part]
    assert len(table) == len(EXAMPLES)


def made_up(count: int) -> Iterator[Example]:
    for number in range(count):
        content_key = hashlib.sha256(b"%d" % number).hexdigest()
        size = 640 + number % 300, 480 + number % 200
        yield Example(FOLDER / f"{number:06d}.png", f"a photo of {number}", content_key, size)


def test_an_image_takes_little_memory() -> None:
    """All that a run keeps of an image, without its latents.

    pathlib's share is left out: it interns names in a table of the whole process, which may double
    just then.
    """
    list(made_up(2000))  # what the modules keep themselves
    gc.collect()
    tracemalloc.start()
    try:
        table = ExampleTable(made_up(20_000))
        samples = TrainingSet([SampledSet(table, [CropPlan(512)])], 0)
        samples.stream.index(0)
        gc.collect()
        elsewhere = tracemalloc.Filter(inclusive=False, filename_pattern=pathlib.__file__)
        traces = tracemalloc.take_snapshot().filter_traces([elsewhere]).statistics("filename")
    finally:
        tracemalloc.stop()
    assert sum(trace.size for trace in traces) / 20_000 < 250
