"""Whole runs on pairs of images: validated, resumed, in two processes, and loaded again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext
from PIL import Image, ImageChops

from gralora_diffusion.adapters.adapter_file import WEIGHTS_NAME, read_adapter
from gralora_diffusion.base_models.loading import find_base_family
from gralora_diffusion.base_models.options import BaseModelOptions
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.pipelines.generation import generate
from gralora_diffusion.pipelines.sample_command import main
from tests import pipeline_classes
from tests.originals import ORIGINALS, write
from tests.training.cards import draw_by_card
from tests.training.runs import assert_close, assert_same_run, make_shapes, run, run_two

PIX2PIX = "StableDiffusionInstructPix2PixPipeline"
XL_PIX2PIX = "StableDiffusionXLInstructPix2PixPipeline"


@pytest.fixture(scope="module", params=[PIX2PIX, XL_PIX2PIX])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / request.param
    pipeline_classes.build(request.param).save_pretrained(folder)
    return folder


def pairs(folder: Path, base: Path, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": make_shapes(folder / "images", [(22, 16), (16, 20)]),
        "control_data_dir": make_shapes(folder / "control", [(44, 32), (32, 40)], seed=1),
        "control_dropout": 0.3,
        "held_out_data_dir": make_shapes(folder / "held out", [(22, 16), (16, 20)], seed=2),
        "held_out_control_data_dir": make_shapes(folder / "before", [(22, 16), (32, 40)], seed=3),
        "held_out_steps": 2,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "random_flip": True,
        "aspect_ratio_buckets": "16,24;16,16;24,16",
        "seed": 3,
    }
    return {**values, **changes}


def test_a_run_resumed_and_loaded(base: Path, tmp_path: Path) -> None:
    shown = {
        "validation_prompt": ["make it red", "make it blue"],
        "validation_image": tmp_path / "control" / "0.png",
        "num_validation_images": 1,
        "validation_inference_steps": 2,
        "validation_steps": 2,
    }
    shared = pairs(tmp_path, base, **shown)
    whole = run(**shared, output_dir=tmp_path / "whole")
    run(**{**shared, "max_train_steps": 2}, output_dir=tmp_path / "parts")
    resumed = run(**shared, output_dir=tmp_path / "parts", resume_from_checkpoint="latest")
    assert_same_run(whole, resumed)
    metadata = read_adapter(whole / WEIGHTS_NAME).metadata
    assert metadata["gralora_control_images"] == "1"
    assert metadata["gralora_control_dropout"] == "0.3"

    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.load_gralora_weights(whole)
    control = Image.open(shared["validation_image"])
    options: dict[str, Any] = {"seed": 3, "size": 16, "inference_steps": 2}
    ((image,),) = generate(pipe, ["make it blue"], controls=[[control]], **options)
    last = Image.open(whole / "validation" / "step-000004" / "01-00.png")
    assert image.size == last.size == (16, 16)
    assert np.asarray(ImageChops.difference(image, last)).max() <= 1

    card = (whole / "README.md").read_text()
    assert "trained on images before and after an edit" in card
    assert "| control images per sample | 1 |" in card
    places = {"path/to/base": base, "path/to/this/folder": whole}
    by_card = draw_by_card(card, {**places, "path/to/image.png": shared["validation_image"]})
    assert type(by_card).__name__ == base.name


def test_two_processes_are_one(base: Path, tmp_path: Path) -> None:
    # the batch size decides what a bucket's last batch repeats
    shared = pairs(tmp_path, base, max_train_steps=2, aspect_ratio_buckets=None)
    shared |= {"latent_cache_dir": tmp_path / "cache", "adam_epsilon": 1e-4}
    one = run(**shared, output_dir=tmp_path / "one")
    two = run_two(**{**shared, "train_batch_size": 1}, output_dir=tmp_path / "two", timeout=300)
    assert_close(one, two, 1e-3)


def test_a_single_file_of_an_editing_base(tmp_path: Path) -> None:
    """SDXL's is read as other files of the family; its further channels show what it is."""
    pipe = pipeline_classes.build(XL_PIX2PIX)
    pipe.save_pretrained(tmp_path / "base")
    tensors = ORIGINALS["stable-diffusion-xl"](pipe)
    denoiser = {key: t for key, t in tensors.items() if key.startswith("model.diffusion_model.")}
    file = write(denoiser, tmp_path / "base.safetensors")
    shared = pairs(tmp_path, tmp_path / "base", max_train_steps=2, adam_epsilon=1e-4)
    whole = run(**shared, output_dir=tmp_path / "dir")
    shared |= {"pretrained_model_name_or_path": file, "base_config": tmp_path / "base"}
    # original files join the layers of some projections, which then round differently
    assert_close(run(**shared, output_dir=tmp_path / "file"), whole, 1e-3)


def test_a_base_that_scales_control_images_otherwise(tmp_path: Path) -> None:
    index = {"_class_name": XL_PIX2PIX, "_diffusers_version": "0.42.0", "is_cosxl_edit": True}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="with is_cosxl_edit in its index cannot be trained"):
        find_base_family(BaseModelOptions(pretrained_model_name_or_path=str(tmp_path)))


def test_sample_with_an_image(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shapes(tmp_path, [(24, 16)] * 2)
    images = [str(tmp_path / f"{number}.png") for number in range(2)]
    line = ["--base", str(base), "--prompt", "red", "blue", "--output", str(tmp_path / "grid.png")]
    line += ["--num_inference_steps", "2", "--image_dir", str(tmp_path / "each")]
    main([*line, "--image", *images, "--image_guidance_scale", "2"])
    made = [Image.open(tmp_path / "each" / f"0{row}-00.png") for row in range(2)]
    assert [image.size for image in made] == [(24, 16)] * 2
    assert ImageChops.difference(*made).getbbox() is not None
    for arguments, text in (
        ([], "--image is missing: this base edits images. Give one control image"),
        (["--image", *images, images[0]], "--image names 3 images for 2 prompts"),
        (["--image", "gone.png"], "--image gone.png: there is no such file"),
        (["--image", ",".join(images)], "this base takes one control image at once"),
        (["--image", images[0], "--clip_skip", "1"], "--clip_skip: "),
        (["--image_guidance_scale", "2"], "has no effect without --image"),
    ):
        with pytest.raises(SystemExit):
            main([*line, *arguments])
        assert text in capsys.readouterr().err


def test_reduced_control_images_are_planned_and_resumed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes = [(160, 160)]
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", sizes)
    pipeline_classes.build("FluxKontextPipeline").save_pretrained(tmp_path / "base")
    shared = {
        "pretrained_model_name_or_path": tmp_path / "base",
        "instance_data_dir": make_shapes(tmp_path / "images", [(16, 16)] * 2),
        "control_data_dir": make_shapes(tmp_path / "control", [(160, 160)] * 2, seed=1),
        "output_dir": tmp_path / "out",
    }
    peaks = []
    for side in (None, 128):
        run(**shared, dry_run=True, control_resolution=side)
        text = capsys.readouterr().out
        assert f"control images of up to {side or 160} x {side or 160} pixels" in text
        (peak,) = re.findall(r"  peak .* ([\d.,]+)\n", text)  # of the steps
        peaks.append(float(peak.replace(",", "")))
    assert peaks[1] < 0.9 * peaks[0]
    shared |= {"checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
    warned = []
    for step, side in enumerate((128, 128, 144), 1):
        caplog.clear()
        run(**shared, control_resolution=side, max_train_steps=step)
        warned.append("are not those of the checkpoint" in caplog.text)
    assert warned == [False, False, True]


@pytest.mark.parametrize(
    ("name", "count"), [("FluxKontextPipeline", 1), ("Flux2Pipeline", 2), ("Flux2KleinPipeline", 2)]
)
def test_validation_of_bases_with_reference_tokens(
    name: str,
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The base is loaded as a text-to-image pipeline, and edits all the same."""
    sizes = [(64, 64)]
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", sizes)
    pipeline_classes.build(name).save_pretrained(tmp_path / name)
    controls = make_shapes(tmp_path / "control", [(160, 128)] * 2, seed=1)
    both = ",".join(str(controls / f"{number}.png") for number in range(count))
    make_shapes(tmp_path / "images", [(20, 16)] * 2)
    out = run(
        pretrained_model_name_or_path=tmp_path / name,
        instance_data_dir=tmp_path / "images",
        control_data_dir=controls,
        max_train_steps=1,
        validation_prompt="make it red",
        validation_image=both,
        num_validation_images=1,
        validation_inference_steps=1,
        control_resolution=128,
        output_dir=tmp_path / "out",
    )
    last = Image.open(out / "validation" / "step-000001" / "00-00.png")
    assert last.size == (16, 16)
    adapter = out / WEIGHTS_NAME
    assert read_adapter(adapter).metadata["gralora_control_resolution"] == "128"

    # `gralora sample` and the card's code take control images of the same size
    line = ["--base", tmp_path / name, "--adapter", out, "--prompt", "make it red", "--image", both]
    line += ["--output", tmp_path / "grid.png", "--image_dir", tmp_path / "each", "--size", 16]
    main([str(part) for part in (*line, "--num_inference_steps", 1)])
    assert "at most 128x128 pixels, as in the adapter's training" in capsys.readouterr().out
    (made,) = (tmp_path / "each").iterdir()
    assert ImageChops.difference(Image.open(made), last).getbbox() is None
    main([str(part) for part in (*line, "--num_inference_steps", 1, "--control_resolution", 136)])
    assert ImageChops.difference(Image.open(made), last).getbbox() is not None
    if count > 1:
        with pytest.raises(SystemExit):
            main([str(part) for part in (*line, "--control_resolution", 1025)])
        assert "it must be at least 128 and at most 1024" in capsys.readouterr().err
    else:
        places = {"path/to/base": tmp_path / name, "path/to/this/folder": out}
        card = (out / "README.md").read_text()
        draw_by_card(card, {**places, "path/to/image.png": controls / "0.png"})
