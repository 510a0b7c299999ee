"""What ``gralora data`` reports, and the contact sheet that it writes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gralora_diffusion.training.data.contact_sheet import as_image, write_contact_sheet
from gralora_diffusion.training.data.image_folder import find_examples
from gralora_diffusion.training.data.transforms import CropPlan
from gralora_diffusion.training.data_command import main, read
from tests.training.runs import make_shapes


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_shapes(tmp_path / "dogs", [(40, 40), (40, 40), (90, 30), (12, 12)], seed=1)
    make_shapes(tmp_path / "cats", [(40, 40)] * 2, seed=2)
    shutil.copy(tmp_path / "dogs" / "0.png", tmp_path / "dogs" / "again.png")
    (tmp_path / "dogs" / "1.txt").write_text("A SKS dog", encoding="utf-8")
    (tmp_path / "dogs" / "2.txt").write_text("a [trigger] dog", encoding="utf-8")
    (tmp_path / "data.yaml").write_text(
        "# two sets\n- {folder: dogs, prompt: a dog, trigger_word: sks, resolutions: [16, 24]}\n"
        "- {folder: cats, prompt: a cat, share: 0.5}\n",
        encoding="utf-8",
    )
    return tmp_path


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(arguments)
    return capsys.readouterr().out


def test_sets_sizes_and_findings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = report(capsys, "data.yaml", "--resolution", "32", "--train_batch_size", "4")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        "images 7, with 4 different captions",
        "set 1 dogs: 5 images, repeats 1, 16 and 24 pixels",
        "set 2 cats: 2 images, 50 % of the samples, 32 pixels",
        "prompts 4 different",
        "epoch 28 samples in batches of 4",  # 2 x 5, 3 repeated each, and 10 + 2
        "16 x 16 5 3",
        "24 x 24 5 3",
        "32 x 32 2 2",
        "the same file: 1",
        "0.png = again.png",
        "enlarged to the size that they are trained at: 1",
        "3.png (12x12)",
        "a crop shows less than 75% of the image: 1",
        "2.png (33%)",
        "captions without the trigger word, which is put before them: 3",
        "0.png, 3.png, again.png",
    ):
        assert line in lines, line
    assert not list(folder.glob("*.png"))


def test_a_folder_or_options_will_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = report(capsys, "cats", "--instance_prompt", "a cat", "--resolution", "16")
    second = report(
        capsys, *["--instance_data_dir", "cats", "--resolution", "16", "--instance_prompt"], "a cat"
    )
    (folder / "run.yaml").write_text(
        "instance_data_dir: cats\nresolution: 16\ninstance_prompt: a cat\n", encoding="utf-8"
    )
    assert first == second == report(capsys, "run.yaml")
    assert "the same file: none" in first


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("data.yaml --sheet sheet.jpg", "--sheet is 'sheet.jpg'; its name must end in .png"),
        ("data.yaml --sheet no/sheet.png", "but there is no folder 'no'"),
        ("data.yaml --resolution 30", "--resolution is 30; it must be a multiple of 8"),
        ("gone.yaml", "gone.yaml: --config cannot be read"),
        ("bad.yaml", "bad.yaml:2: cropped is not an option"),
        ("broken --instance_prompt p", "0.png cannot be decoded"),
    ],
)
def test_problems_end_the_command(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str, problem: str
) -> None:
    (folder / "bad.yaml").write_text("- folder: cats\n  cropped: true\n  prompt: p\n")
    (folder / "broken").mkdir()
    (folder / "broken" / "0.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err
    assert not list(folder.glob("*.png"))


def test_a_pipe_and_a_device_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for name, kind in (("pipe.yaml", "a named pipe"), ("zero.yaml", "a device")):
        *_, parsed = read([str(tmp_path / name)])
        assert f"--config cannot be read: it is {kind}, not a file" in parsed.problems[0]


def test_the_sheet_shows_crops_of_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = report(
        capsys, "cats", "--instance_prompt", "p", "--resolution", "40", "--sheet", "sheet.png"
    )
    assert "contact sheet: sheet.png, 2 of 2 images" in text
    sheet = np.array(Image.open(folder / "sheet.png"))
    for number, example in enumerate(find_examples("cats", "p")):
        left = 10 + 186 * number + (176 - 40) // 2
        top = 10 + (176 - 40) // 2
        assert (sheet[top : top + 40, left : left + 40] == np.array(example.load())).all()
    fewer = report(
        capsys,
        *[
            "cats",
            "--instance_prompt",
            "p",
            "--resolution",
            "40",
            "--sheet",
            "sheet.png",
            "--sheet_images",
            "1",
        ],
    )
    assert "contact sheet: sheet.png, 1 of 2 images" in fewer
    assert Image.open(folder / "sheet.png").width < sheet.shape[1]


def test_long_texts_stay_in_their_cells(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 100), "blue")
    write_contact_sheet(tmp_path / "a.png", [(image, "x" * 99, "word " * 99)] * 7)
    sheet = np.array(Image.open(tmp_path / "a.png"))
    assert sheet.shape[1] == 6 * 186 + 10
    for column in range(7):  # the gaps between the cells stay white
        assert (sheet[:, 186 * column : 186 * column + 9] == 255).all()


def test_pixel_values_become_the_image_again() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    plan = CropPlan(24, center_crop=True)
    image = Image.fromarray(pixels)
    variant = plan.kept((24, 24), "key", 1, 0)[0]
    assert as_image(plan.pixel_values(image, variant)).tobytes() == image.tobytes()
