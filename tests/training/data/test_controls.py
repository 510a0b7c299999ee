"""Where control images are looked for, what is reported at once, and what a variant shows."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageOps

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.training.data.buckets import Buckets
from gralora_diffusion.training.data.cache import ControlCache, LatentCache
from gralora_diffusion.training.data.control_crops import ControlPlan, same_shape
from gralora_diffusion.training.data.controls import ControlPlaces
from gralora_diffusion.training.data.hf_dataset import find_dataset_examples
from gralora_diffusion.training.data.image_folder import Example, find_examples
from gralora_diffusion.training.data.transforms import CropPlan
from tests.training.runs import one_set


def fill(folder: Path, *names: str, size: tuple[int, int] = (24, 16)) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shade = (40 * number + len(folder.name)) % 256
        Image.linear_gradient("L").resize(size).point(lambda p, s=shade: (p + s) % 256).convert(
            "RGB"
        ).save(folder / name)
    return folder


def controls(examples: list[Example]) -> dict[str, list[str]]:
    """Image -> its control images, as their folders and names."""
    return {
        e.source.name: [f"{c.source.parent.name}/{c.source.name}" for c in e.controls]
        for e in examples
    }


def problems(folder: Path, places: ControlPlaces, prompt: str = "make it red") -> list[str]:
    with pytest.raises(DataError) as caught:
        find_examples(folder, prompt, controls=places)
    return caught.value.problems


def listed(folder: Path, *rows: dict) -> None:
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text(text)


# -- folders ---------------------------------------------------------------------------------------


def test_folders_in_their_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same name with another extension counts, unless the very name is there."""
    images = fill(tmp_path / "images", "1.png", "2.png")
    first = fill(tmp_path / "first", "1.png", "1.webp", "2.webp", "3.png")
    second = fill(tmp_path / "second", "2.png", "1.png")
    found = find_examples(images, "p", controls=ControlPlaces((first, second)))
    assert controls(found) == {
        "1.png": ["first/1.png", "second/1.png"],
        "2.png": ["first/2.webp", "second/2.png"],
    }
    assert found[0].controls[0].load().size == found[0].controls[0].size == (24, 16)
    assert "control images without a training image, ignored (2): 1.webp, 3.png" in caplog.text


def test_concepts_have_sub_folders(tmp_path: Path) -> None:
    images = fill(tmp_path / "images", "3_red/1.png", "1_blue/1.png")
    before = fill(tmp_path / "before", "1_blue/1.png", "3_red/1.png")
    found = find_examples(images, controls=ControlPlaces((before,)))
    parents = [example.controls[0].source.parent.name for example in found]
    assert parents == [example.source.parent.name for example in found]


def test_a_control_image_of_several_names(tmp_path: Path) -> None:
    images = fill(tmp_path / "images", "1.png", "1.webp", "2.png")
    before = fill(tmp_path / "before", "1.png", "2.png")
    assert problems(images, ControlPlaces((before,))) == [
        f"--control_data_dir {str(before)!r} has one file for several training images: 1.png "
        "(1.png, 1.webp). Give each the control image of its own name and extension"
    ]
    fill(before, "1.webp")
    assert controls(find_examples(images, "p", controls=ControlPlaces((before,)))) == {
        "1.png": ["before/1.png"],
        "1.webp": ["before/1.webp"],
        "2.png": ["before/2.png"],
    }


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    images = fill(tmp_path / "images", *(f"{n}.png" for n in range(9)))
    (images / "0.png").write_bytes(b"no image")
    some = fill(tmp_path / "some", "0.png", "1.png", "2.png", "2.jpg")
    (some / "1.png").write_bytes(b"no image")
    (some / "3.jpg").write_bytes(b"no image")
    (some / "2.png").rename(some / "2.webp")
    other = fill(tmp_path / "other", "a.png", "b.png")
    found = problems(images, ControlPlaces((some, other)))
    doubtful, missing, none, *bad, advice = found
    assert "several files for 2.png (2.jpg, 2.webp). Keep the one" in doubtful
    assert f"{str(some)!r} has no control image for 4.png, 5.png, 6.png, 7.png, 8.png" in missing
    assert "where a line may have none" in missing
    assert "no control image for any of the 9 training images. Training images: 0.png" in none
    assert "Images there: a.png, b.png" in none
    assert [text.split(":")[0] for text in bad] == [
        "0.png cannot be decoded",
        "1.png",
        "3.png",
    ]
    assert "--skip_bad_images" in advice


def test_an_image_goes_with_its_bad_control_image(tmp_path: Path) -> None:
    images = fill(tmp_path / "images", "1.png", "2.png")
    before = fill(tmp_path / "before", "1.png", "2.png")
    (before / "1.png").write_bytes(b"no image")
    places = ControlPlaces((before,))
    found = find_examples(images, "p", skip_bad_images=True, controls=places)
    assert controls(found) == {"2.png": ["before/2.png"]}


def test_several_targets_of_one_control_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Other instructions lead to other targets; the same one with two targets is named."""
    caplog.set_level(logging.WARNING)
    images = fill(tmp_path / "images", "1.png", "2.png", "3.png", "source.png")
    listed(
        images,
        {"file_name": "1.png", "text": "red", "control": "source.png"},
        {"file_name": "2.png", "text": "blue", "control": "source.png"},
        {"file_name": "3.png", "text": "red", "control": "source.png"},
    )
    found = find_examples(images, controls=ControlPlaces())
    assert controls(found) == {f"{n}.png": ["images/source.png"] for n in (1, 2, 3)}
    [message] = [m for m in caplog.messages if "of another image" in m]
    assert message.endswith("(1): 3.png (as 1.png)")


# -- metadata files --------------------------------------------------------------------------------


def test_a_line_has_any_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Control images are no images to train on, unless they are listed, too."""
    images = fill(tmp_path / "images", "1.png", "2.png", "3.png", "in/a.png", "in/b.png", "c.png")
    listed(
        images,
        {"file_name": "1.png", "text": "t", "control": ["in/a.png", "in/b.png"]},
        {"file_name": "2.png", "text": "t", "control": "1.png"},
        {"file_name": "3.png", "text": "t", "control": None},
    )
    found = find_examples(images, "prompt", controls=ControlPlaces())
    assert controls(found) == {
        "1.png": ["in/a.png", "in/b.png"],
        "2.png": ["images/1.png"],
        "3.png": [],
        "c.png": [],
    }
    assert "not read" not in caplog.text
    assert "left out" not in caplog.text
    # whoever does not ask for control images gets none
    assert [e.controls for e in find_examples(images, "prompt")] == [()] * 4


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_columns_by_name(tmp_path: Path, kind: str) -> None:
    images = fill(tmp_path / "images", "1.png", "a.png", "b.png")
    row: dict[str, Any] = {"file_name": "1.png", "text": "t", "first": "b.png", "second": "a.png"}
    if kind == "parquet":
        row["first"] = ["b.png"]
        table = pyarrow.Table.from_pylist([row])
        pyarrow.parquet.write_table(table, images / "metadata.parquet")
    elif kind == "csv":
        text = ",".join(row) + "\n" + ",".join(row.values())
        (images / "metadata.csv").write_text(text)
    else:
        listed(images, row)
    found = find_examples(images, controls=ControlPlaces(columns=("first", "second")))
    assert controls(found)["1.png"] == ["images/b.png", "images/a.png"]


def test_bad_lines_are_named(tmp_path: Path) -> None:
    images = fill(tmp_path / "images", "1.png", "2.png", "3.png", "4.png")
    fill(tmp_path, "outside.png")
    listed(
        images,
        {"file_name": "1.png", "text": "t", "control": "gone.png"},
        {"file_name": "2.png", "text": "t", "control": "../outside.png"},
        {"file_name": "3.png", "text": "t", "control": [3]},
        {"file_name": "4.png", "text": "t", "control": "1.png"},
        {"file_name": "4.png", "text": "t", "control": "2.png"},
    )
    before = fill(tmp_path / "before", "1.png", "2.png", "3.png", "4.png")
    found = problems(images, ControlPlaces((before,)))
    assert found[0].endswith("line 1 names the control image gone.png, which does not exist")
    assert found[1].endswith("names the control image ../outside.png, which is not in the folder")
    assert found[2].endswith("control is [3]; it must be the path of an image, or a list of paths")
    assert found[3].endswith("gives 4.png other control images than an earlier line")
    assert found[4].startswith("a metadata file names control images of 4.png, and --control_data")
    unknown = problems(images, ControlPlaces(columns=("source",)))
    assert unknown[-1].startswith("--control_column is source, but no line of a metadata file")


# -- datasets --------------------------------------------------------------------------------------


def test_columns_of_a_dataset(tmp_path: Path) -> None:
    paths = [str(fill(tmp_path, f"{n}.png") / f"{n}.png") for n in range(4)]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "edit": datasets.Value("string"),
            "one": datasets.Image(),
            "more": datasets.Sequence(datasets.Image()),
        }
    )
    rows = {
        "image": paths[:2],
        "edit": ["red", "blue"],
        "one": [paths[2], None],
        "more": [[paths[3], paths[0]], []],
    }
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "set")
    options = {"caption_column": "edit", "control_columns": ["one", "more"]}
    first, second = find_dataset_examples(str(tmp_path / "set"), **options)
    keys = [e.content_key for e in find_examples(tmp_path, "p")]
    assert [c.content_key for c in first.controls] == [keys[2], keys[3], keys[0]]
    assert second.controls == ()
    with pytest.raises(DataError, match=r"--control_column is 'none', but there is no such column"):
        find_dataset_examples(str(tmp_path / "set"), "p", control_columns=["none"])
    with pytest.raises(DataError, match=r"row 1, column edit cannot be decoded"):
        find_dataset_examples(str(tmp_path / "set"), "p", control_columns=["edit"])


# -- pixels ----------------------------------------------------------------------------------------


def test_shapes_up_to_rounding() -> None:
    assert same_shape((512, 341), (1024, 683))
    assert not same_shape((512, 341), (1024, 700))
    assert not same_shape((341, 512), (683, 1024)[::-1])


def pixels(image: Image.Image) -> torch.Tensor:
    values = torch.tensor(list(image.tobytes())).view(image.height, image.width, 3)
    return values.permute(2, 0, 1).float() / 127.5 - 1


def test_a_control_image_shows_what_its_target_shows(tmp_path: Path) -> None:
    """At its own resolution; one of another shape is whole. Both are mirrored with the target."""
    wide = Image.open(fill(tmp_path, "1.png", size=(66, 48)) / "1.png")
    square = Image.open(fill(tmp_path, "2.png", size=(30, 30)) / "2.png")
    plan = ControlPlan(CropPlan(16, random_flip=True), pixels)
    for place in range(7):
        variant = plan.crops._variant((22, 16), place, flip=place % 2 == 1)
        left = 22 - 16 - place if variant.flip else place
        part = wide.crop((3 * left, 0, 3 * (left + 16), 48))
        expected = [pixels(ImageOps.mirror(p) if variant.flip else p) for p in (part, square)]
        for image, wanted in zip((wide, square), expected, strict=True):
            assert torch.equal(plan.pixel_values(image, (22, 16), variant), wanted)


def test_latents_are_cached_by_everything_they_depend_on(tmp_path: Path) -> None:
    images = fill(tmp_path / "images", "1.png", "2.png", size=(22, 16))
    before = fill(tmp_path / "before", "1.png", "2.png", size=(44, 32))
    examples = find_examples(images, "p", controls=ControlPlaces((before,)))
    crops = CropPlan(16, random_flip=True)

    def encode(batch: torch.Tensor) -> torch.Tensor:
        return batch[:, :, ::2, ::2]

    folder = tmp_path / "cache"
    made = one_set(
        examples,
        crops,
        3,
        cache=LatentCache(crops, "vae", folder),
        cached_crops=2,
        controls=ControlPlan(crops),
        control_cache=ControlCache(ControlPlan(crops), "vae", folder),
    )
    made.fill_cache(lambda batch: (batch, batch), progress=False)
    assert made.fill_control_cache(encode, progress=False) == 4
    again = ControlCache(ControlPlan(crops), "vae", folder)
    wanted = list(made._wanted(slice(None)))
    assert again.fill(wanted, encode, progress=False) == 0
    for other in (
        ControlCache(ControlPlan(crops), "another VAE", folder),
        ControlCache(ControlPlan(crops, pixels), "vae", folder),
        ControlCache(ControlPlan(crops, pixels, 512), "vae", folder),
        ControlCache(ControlPlan(crops, pixels, 256), "vae", folder),
        ControlCache(ControlPlan(CropPlan(16, interpolation="box")), "vae", folder),
    ):
        assert other.fill(wanted, encode, progress=False) == 4
    for position in range(6):
        sample = made[position]
        example = next(e for e in examples if e.content_key == sample["content_key"])
        variant = next(
            v
            for v in made._entry(examples.index(example)).kept
            if torch.equal(made.cache.get(example.content_key, v)["mean"], sample["mean"])
        )
        small = example.controls[0].load().resize((22, 16), Image.Resampling.LANCZOS)
        left = 22 - variant.left - 16 if variant.flip else variant.left
        part = small.crop((left, 0, left + 16, 16))
        part = ImageOps.mirror(part) if variant.flip else part
        torch.testing.assert_close(sample["controls"][0], encode(pixels(part)[None])[0])


def test_a_changed_control_image_is_another_run(tmp_path: Path) -> None:
    images = fill(tmp_path / "images", "1.png", "2.png")
    first = fill(tmp_path / "first", "1.png", "2.png")
    second = fill(tmp_path / "the second", "1.png", "2.png")
    plan = CropPlan(16, buckets=Buckets(16, 8))
    digests = {
        one_set(find_examples(images, "p", controls=places), plan, 0).digest
        for places in (None, ControlPlaces((first,)), ControlPlaces((second,)))
    }
    assert len(digests) == 3
