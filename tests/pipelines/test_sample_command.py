"""`gralora sample`: what it generates, writes and refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from gralora_diffusion.export.lora import export_lora
from gralora_diffusion.families import find_pipeline_family
from gralora_diffusion.io.dtypes import torch_dtype
from gralora_diffusion.pipelines.generation import generate
from gralora_diffusion.pipelines.grid import labelled_grid
from gralora_diffusion.pipelines.sample_command import main, usual_dtype
from tests.io.image_bytes import png, shown
from tests.models import PIPELINES, adapt, stable_diffusion


@pytest.fixture
def files(tmp_path: Path) -> Path:
    pipe = stable_diffusion()
    pipe.save_pretrained(tmp_path / "base")
    adapt(pipe)
    pipe.save_gralora_weights(tmp_path / "adapter")
    return tmp_path


def test_command_compares(files: Path) -> None:
    shared = ["--prompt", "a cat", "a dog", "--size", "16", "--num_inference_steps", "2"]
    shared += ["--base", str(files / "base")]
    compared = files / "deep" / "compared.png"
    adapted = ["--adapter", str(files / "adapter")]
    main([*shared, *adapted, "--compare", "--output", str(compared)])
    main([*shared, "--output", str(files / "before.png")])
    main([*shared, *adapted, "--output", str(files / "after.png")])
    grid, before, after = (
        np.asarray(Image.open(f))[:, 112:]
        for f in (compared, files / "before.png", files / "after.png")
    )
    assert (grid[8:200] == before[8:200]).all()
    assert (grid[208:400] == after[8:200]).all()
    assert (before[8:200] != after[8:200]).any()


def test_command_shows_an_exported_lora(files: Path) -> None:
    """An exact LoRA generates what the adapter does, at any strength, alone and beside it."""
    lora = files / "lora.safetensors"
    export_lora(files / "adapter", lora, style="diffusers")
    shared = ["--prompt", "a cat", "--size", "16", "--num_inference_steps", "2", "--scale", "0.5"]
    shared += ["--base", str(files / "base")]
    adapted = ["--adapter", str(files / "adapter")]
    with_lora = ["--lora", str(lora)]
    main([*shared, *adapted, "--output", str(files / "adapter.png")])
    main([*shared, *with_lora, "--output", str(files / "lora.png")])
    main([*shared, *adapted, *with_lora, "--compare", "--output", str(files / "all.png")])
    expected, shown, rows = (
        np.asarray(Image.open(files / name))[:, 112:].astype(int)
        for name in ("adapter.png", "lora.png", "all.png")
    )
    assert np.abs(shown[8:200] - expected[8:200]).max() <= 1
    before, gralora, lora_row = (rows[top : top + 192] for top in (8, 208, 408))
    assert (gralora == expected[8:200]).all()
    assert np.abs(lora_row - gralora).max() <= 1
    assert np.abs(before - gralora).max() > 5


def test_images_say_how_they_were_generated(files: Path) -> None:
    line = ["--prompt", "a cat", "a dog", "--images_per_prompt", "2", "--size", "16", "--seed", "5"]
    line += ["--num_inference_steps", "1", "--negative_prompt", "snow", "--scale", "0.5"]
    line += ["--base", str(files / "base"), "--compare", "--output", str(files / "grid.png")]
    weights = files / "adapter" / "pytorch_gralora_weights.safetensors"
    main([*line, "--adapter", str(weights), "--image_dir", str(files / "apart")])
    numbers = ("00-00", "00-01", "01-00", "01-01")
    names = [f"{label}-{number}.png" for label in ("after", "before") for number in numbers]
    assert sorted(path.name for path in (files / "apart").iterdir()) == names
    for name in names:
        label, prompt, image = name.removesuffix(".png").split("-")
        read = Image.open(files / "apart" / name)
        assert read.size == (16, 16)
        own = json.loads(read.info["gralora_diffusion"])
        adapter = {"adapter": "adapter", "scale": 0.5} if label == "after" else {"adapter": None}
        expected = {"prompt": ["a cat", "a dog"][int(prompt)], "seed": 5 + int(image)}
        expected |= {"negative_prompt": "snow", "steps": 1, "guidance_scale": 7.5, "base": "base"}
        assert own.items() >= {**expected, **adapter}.items()
    grid = json.loads(Image.open(files / "grid.png").info["gralora_diffusion"])
    assert (grid["prompt"], grid["seed"], grid["adapter"]) == ("a cat", 5, "adapter")


def test_command_writes_over_nothing_that_it_reads(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = files / "subject"
    subject.mkdir()
    Image.new("RGB", (8, 8)).save(subject / "1.png")
    weights = files / "adapter" / "pytorch_gralora_weights.safetensors"
    (files / "hard.png").hardlink_to(weights)
    (files / "link.png").symlink_to(files / "base" / "model_index.json")
    line = ["--prompt", "x", "--base", str(files / "base"), "--adapter", str(files / "adapter")]
    line += ["--reference", str(subject)]
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    for output in ("subject/1.png", "subject/2.png", "base/grid.png", "hard.png", "link.png"):
        with pytest.raises(SystemExit):
            main([*line, "--output", str(files / output)])
        assert "which is read. Choose another --output" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before


def test_reference_is_read_as_training_reads_it(files: Path) -> None:
    """Upright, in sRGB, laid on white, without masks and other files."""
    folder = files / "subject"
    folder.mkdir()
    colours = np.full((4, 4, 3), (200, 30, 40))
    see_through = np.full((4, 4), 7)
    (folder / "1.png").write_bytes(png(2, 8, colours, ((b"cICP", bytes([12, 13, 0, 1])),)))
    (folder / "2.png").write_bytes(png(0, 16, see_through, ((b"tRNS", b"\0\7"),)))
    Image.new("RGB", (4, 4)).save(folder / "2_mask.png")
    (folder / "notes.pdf").write_text("no picture")
    line = ["--prompt", "a cat", "--size", "16", "--num_inference_steps", "1"]
    line += ["--base", str(files / "base"), "--output", str(files / "out.png")]
    main([*line, "--reference", str(folder)])
    grid = np.asarray(Image.open(files / "out.png")).astype(int)
    assert grid.shape[1] == 112 + 2 * 200
    assert np.abs(grid[8:200, 112:304] - shown((200, 30, 40), "display-p3")).max() <= 1.5
    assert (grid[8:200, 312:504] == 255).all()


def test_references_that_cannot_be_read_are_all_named(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = files / "subject"
    folder.mkdir()
    line = ["--prompt", "x", "--base", "owner/x", "--output", str(files / "out.png"), "--reference"]
    with pytest.raises(SystemExit):
        main([*line, str(folder)])
    assert f"--reference {folder} contains no images" in capsys.readouterr().err
    (folder / "1.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n")
    os.mkfifo(folder / "2.png")
    with pytest.raises(SystemExit):
        main([*line, str(folder)])
    told = capsys.readouterr().err
    assert "1.png cannot be decoded: it is not an image in a format that is supported" in told
    assert "2.png cannot be decoded: it is a named pipe" in told


@pytest.mark.parametrize(
    ("pipeline", "device", "name"),
    [
        ("FluxPipeline", "cpu", "fp32"),
        ("FluxPipeline", "cuda", "bf16"),
        ("StableDiffusionXLPipeline", "cuda", "fp16"),
        ("SanaPipeline", "cuda", "fp16"),
    ],
)
def test_usual_dtype(pipeline: str, device: str, name: str) -> None:
    assert usual_dtype(find_pipeline_family(pipeline), device) == name


@pytest.mark.parametrize("name", [None, "fp32", "bf16", "fp16"])
def test_dtype(files: Path, name: str | None) -> None:
    """Without the option, fp32 on the CPU whatever the base is stored in."""
    line = ["--prompt", "a cat", "--size", "16", "--num_inference_steps", "2", "--seed", "3"]
    line += ["--base", str(files / "base"), "--output", str(files / "out.png")]
    pipe = stable_diffusion().to(torch_dtype(name or "fp32"))
    pipe.save_pretrained(files / "base", safe_serialization=True)
    main([*line, *(["--dtype", name] if name else [])])
    wanted = generate(pipe, ["a cat"], seed=3, size=16, inference_steps=2)[0][0]
    grid = np.asarray(Image.open(files / "out.png"))
    assert (grid == np.asarray(labelled_grid([("", [wanted])], ["a cat"]))).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--dtype", "half"], "--dtype is 'half'; it must be one of fp32, bf16, fp16. Did"),
        (["--base", "./nowhere"], "--base ./nowhere: no such file or folder in '.'."),
        (["--compare"], "--compare needs an adapter"),
        (
            ["--reference", "nowhere"],
            "--reference nowhere cannot be read as a folder: No such file",
        ),
        (["--adapter", "./nowhere"], "--adapter ./nowhere"),
        (["--output", "out.text"], "--output is 'out.text'; it must be an image file, such as"),
        (["--output", "."], "--output is '.'; it must be an image file"),
        (["--images_per_prompt", "0"], "--images_per_prompt is 0; it must be at least 1"),
        (["--num_inference_steps", "0"], "--num_inference_steps is 0; it must be at least 1"),
        (["--clip_skip", "0"], "--clip_skip is 0; it must be at least 1"),
        (["--max_sequence_length", "0"], "--max_sequence_length is 0; it must be at least 1"),
        (
            ["--max_sequence_length", "64"],
            "--max_sequence_length: StableDiffusionPipeline does not take this option. Leave it",
        ),
        (["--size", "31"], "--size is 31; it must be a positive multiple of 8. The nearest is 32"),
    ],
)
def test_errors_of_the_command(
    files: Path, options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--base", str(files / "base"), "--prompt", "x", "--output", str(files / "out.png")]
    with pytest.raises(SystemExit):
        main([*line, *options])
    assert text in capsys.readouterr().err
    assert not (files / "out.png").exists()


@pytest.mark.parametrize("tokens", [None, 8, 600])
def test_length_of_prompts(tokens: int | None, tmp_path: Path, capsys: Any) -> None:
    """The images are the pipeline's own, or it is said how long its prompts may be."""
    PIPELINES["flux"]().save_pretrained(tmp_path / "base")
    line = ["--prompt", "a cat", "--size", "32", "--num_inference_steps", "2"]
    line += ["--base", str(tmp_path / "base"), "--output", str(tmp_path / "out.png")]
    line += ["--max_sequence_length", str(tokens)] if tokens else []
    if tokens == 600:
        with pytest.raises(SystemExit):
            main(line)
        assert (
            "--max_sequence_length is 600; the pipelines of flux accept at most 512. Give a number "
            "up to 512" in capsys.readouterr().err
        )
        return
    main(line)
    pipe = FluxPipeline.from_pretrained(tmp_path / "base")
    seed = torch.Generator().manual_seed(0)
    wanted = pipe(
        "a cat",
        height=32,
        width=32,
        num_inference_steps=2,
        generator=seed,
        max_sequence_length=tokens or 512,
    ).images[0]
    grid = np.asarray(Image.open(tmp_path / "out.png"))
    assert (grid == np.asarray(labelled_grid([("", [wanted])], ["a cat"]))).all()
