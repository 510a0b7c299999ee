"""Which control images fit which base, and what is said before it is loaded."""

from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gralora_diffusion.families import ControlCount, get_family
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.checks.controls import (
    check_controls,
    check_controls_of_base,
    check_sharded_controls,
)
from gralora_diffusion.training.checks.options import find_problems
from gralora_diffusion.training.data.control_crops import ControlPlan
from gralora_diffusion.training.data.controls import ControlImage
from gralora_diffusion.training.data.image_folder import Example
from gralora_diffusion.training.data.sets import crop_plan
from tests import pipeline_classes
from tests.models import PIPELINES
from tests.training.runs import config, make_images, make_shapes

PIX2PIX, KONTEXT = "StableDiffusionInstructPix2PixPipeline", "FluxKontextPipeline"


def example(*sizes: tuple[int, int], size: tuple[int, int] = (64, 96)) -> Example:
    controls = tuple(ControlImage(Path(f"{n}.png"), str(n), s) for n, s in enumerate(sizes))
    return Example(Path("after.png"), "make it red", "key", size, controls=controls)


def problems(family: str, pipeline: str | None, *images: Example, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_controls(config(**options), get_family(family), pipeline, images)
    return caught.value.problems


def warnings(family: str, pipeline: str | None, *images: Example, **options: Any) -> list[str]:
    return check_controls(config(**options), get_family(family), pipeline, images)


ONE = example((128, 192))


def test_as_many_as_the_base_takes() -> None:
    plain, two = example(), example((64, 96), (128, 192))
    assert warnings("stable-diffusion", PIX2PIX, ONE) == []
    assert warnings("flux", KONTEXT, ONE, plain) == []
    assert warnings("flux2", "Flux2Pipeline", plain, ONE, two) == []
    assert warnings("flux2", "Flux2Pipeline", plain) == []
    assert warnings("flux2-klein", "Flux2KleinKVPipeline", two) == []
    [text] = problems("stable-diffusion", PIX2PIX, plain)
    assert "edits images: a sample needs one control image, and there are no control" in text
    [text] = problems("stable-diffusion", PIX2PIX, plain, ONE)
    assert "needs one control image for each image, and there is none for after.png" in text
    [text] = problems("flux", KONTEXT, two)
    assert "takes no control image or one for each image, and there are more for after.png" in text
    for family, pipeline in (
        ("stable-diffusion", "StableDiffusionPipeline"),
        ("stable-diffusion-xl", "StableDiffusionXLPipeline"),
        ("stable-diffusion-3", "StableDiffusion3Pipeline"),
        ("stable-diffusion-3", None),
    ):
        [text] = problems(family, pipeline, ONE)
        assert (
            "does not edit images, but there are control images for after.png. Give an edit" in text
        )


def test_a_base_that_is_no_editing_base_is_named() -> None:
    """Kontext in a file of its own looks like any other FLUX.1."""
    [text] = warnings("flux", "FluxPipeline", ONE)
    assert "FluxKontextPipeline uses it. Load the adapter there" in text
    for images, done in ((ONE, "edit images, because there are control"), (example(), "generate")):
        [text] = warnings("flux", None, images)
        assert "does not show whether it edits images (FluxKontextPipeline) or" in text
        assert f"It is trained to {done}" in text
        assert "give its own pipeline as --base_config" in text
    for family in ("stable-diffusion", "flux2"):  # seen from its shapes, and one pipeline for both
        assert warnings(family, None, example()) == []
    [text] = warnings("flux", KONTEXT, example())
    assert "is trained to generate images from text alone, which can weaken its editing" in text


def test_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    other = example((128, 96))
    [text] = problems("stable-diffusion", PIX2PIX, other)
    assert "after.png has 64x96 pixels and its control image 128x96: this base needs" in text
    [text] = warnings("flux", KONTEXT, other)
    assert "used whole, while those of its shape are cropped with it (1): after.png" in text
    [text] = problems("flux2", "Flux2Pipeline", example((32, 48)))
    assert "the control image of after.png: Image too small: 32" in text


def test_options_that_contradict_the_images() -> None:
    prior = {"with_prior_preservation": True, "class_prompt": "a dog", "class_data_dir": "c"}
    [text] = problems("flux", KONTEXT, ONE, **prior)
    assert "Give --prior_source teacher" in text
    assert warnings("flux", KONTEXT, ONE, **prior, prior_source="teacher") == []
    for other in ("Flux2Pipeline", None):
        [text] = problems("flux2", other, example(), control_dropout=0.1)
        assert text.startswith("--control_dropout is 0.1, but there are no control images. Leave")
    [text] = problems("stable-diffusion", PIX2PIX, ONE, clip_skip=1)
    assert f"{PIX2PIX} does not take it" in text


def test_control_images_that_cannot_be_reduced() -> None:
    wide = example((1024, 140), size=(96, 64))
    for pipeline in (KONTEXT, "FluxPipeline"):
        assert problems_of_resolution("flux", pipeline, ONE, 512) == []
    [text] = problems_of_resolution("stable-diffusion", PIX2PIX, ONE, 512)
    assert text.startswith("--control_resolution is 512, but this base edits pixel by pixel, so a")
    for other in ("Flux2Pipeline", None):
        [text] = problems_of_resolution("flux2", other, example(), 512)
        assert text.startswith("--control_resolution is 512, but there are no control images.")
    [text] = problems_of_resolution("flux", KONTEXT, ONE, 2048)
    assert text.startswith("--control_resolution is 2048; it must be at least 128 and at most 1024")
    [text] = problems_of_resolution("flux2", "Flux2Pipeline", wide, 128)
    assert text.startswith("the control image of after.png, reduced by --control_resolution: Image")
    pipe, chosen = pipeline_classes.build(PIX2PIX), config(control_resolution=128)
    with pytest.raises(ConfigError, match="edits pixel by pixel"):  # a single file of it
        check_controls_of_base(chosen, get_family("stable-diffusion"), pipe, [ONE])


def problems_of_resolution(
    family: str, pipeline: str | None, image: Example, resolution: int
) -> list[str]:
    try:
        warnings(family, pipeline, image, control_resolution=resolution)
    except ConfigError as error:
        return error.problems
    return []


def test_validation_images(tmp_path: Path) -> None:
    make_shapes(tmp_path, [(64, 64)] * 2)
    (tmp_path / "bad.png").write_bytes(b"no image")
    first, second, bad = (str(tmp_path / name) for name in ("0.png", "1.png", "bad.png"))
    shown: dict[str, Any] = {"validation_prompt": ["a", "b", "c"]}
    assert warnings("stable-diffusion", PIX2PIX, ONE, **shown, validation_image=first) == []
    [text] = problems("stable-diffusion", PIX2PIX, ONE, **shown)
    assert text.startswith("--validation_image is missing: this base edits images")
    [text] = problems("flux", KONTEXT, ONE, **shown, validation_image=[first, second])
    assert "names 2 images for 3 prompts. Give one for all prompts or one for each" in text
    both = f"{first},{second}"
    assert warnings("flux2", "Flux2Pipeline", example(), **shown, validation_image=both) == []
    [text] = problems("flux", KONTEXT, ONE, **shown, validation_image=both)
    assert "takes no control image or one at once" in text
    found = problems("flux", KONTEXT, ONE, **shown, validation_image=[bad, "gone.png", first])
    assert f"--validation_image {bad} cannot be decoded" in found[0]
    assert "--validation_image gone.png: there is no such file" in found[1]
    plain = "StableDiffusionPipeline"
    [text] = problems("stable-diffusion", plain, example(), **shown, validation_image=first)
    assert "this base does not edit images. Leave it out" in text


def test_folders_before_anything_is_read(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    (tmp_path / "empty").mkdir()
    chosen = config(
        pretrained_model_name_or_path="owner/name",
        instance_data_dir=images,
        control_data_dir=[tmp_path / "gone", tmp_path / "empty", images],
        control_column="source",
        output_dir=tmp_path / "out",
    )
    gone, empty, same, both = find_problems(chosen)
    assert "gone': there is no such folder" in gone
    assert "empty': this folder is empty" in empty
    assert "images', which is also --instance_data_dir" in same
    assert "--control_data_dir and --control_column exclude each other" in both
    inside = config(
        pretrained_model_name_or_path="owner/name",
        instance_data_dir=images,
        control_data_dir=make_images(tmp_path / "before"),
        output_dir=tmp_path / "before" / "out",
    )
    [text] = find_problems(inside)
    assert "which is or lies in --control_data_dir" in text


def test_processes_that_compute_together() -> None:
    """With FSDP, a sample without control images would need a pass of its own."""
    tokens, aligned = ControlCount(0, None), ControlCount(1, 1, aligned=True)
    check_sharded_controls(config(), tokens, [ONE, ONE])
    check_sharded_controls(config(control_dropout=0.1), aligned, [ONE, example((64, 96))])
    with pytest.raises(ConfigError, match="equally many control images of the same sizes"):
        check_sharded_controls(config(), tokens, [ONE, example()])
    with pytest.raises(ConfigError, match=r"--control_dropout is 0\.1, but with FSDP"):
        check_sharded_controls(config(control_dropout=0.1), tokens, [ONE])


@pytest.mark.parametrize("buckets", [False, True])
def test_processes_compute_together_only_on_control_images_of_one_shape(buckets: bool) -> None:
    """Whatever is accepted is prepared to one shape, also if images differ in size."""
    options = config(resolution=64, use_aspect_ratio_buckets=buckets)
    plan = ControlPlan(
        crop_plan(options, 8), lambda image: torch.empty(3, image.height, image.width)
    )

    def prepared(image: Example) -> list[torch.Size]:
        variant = plan.crops.kept(image.size, "key", 1, 0)[0]
        blank = [Image.new("RGB", control.size) for control in image.controls]
        return [plan.pixel_values(control, image.size, variant).shape for control in blank]

    sizes = [(64, 96), (96, 64), (128, 192), (20, 30), (64, 95), (200, 200), (100, 100)]
    accepted = set()
    for one, other in itertools.combinations(sizes, 2):
        for control in ((128, 192), (128, 128), (300, 100)):
            images = [example(control, size=one), example(control, size=other)]
            with suppress(ConfigError):
                check_sharded_controls(options, ControlCount(0, None), images)
                assert prepared(images[0]) == prepared(images[1])
                accepted.add((one, other, control))
    assert all((*pair, (300, 100)) in accepted for pair in itertools.combinations(sizes, 2))
    assert ((64, 96), (128, 192), (128, 192)) in accepted
    assert ((64, 96), (96, 64), (128, 192)) not in accepted  # one is cropped, one used whole


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        ("stable-diffusion", PIX2PIX),
        ("stable-diffusion-xl", "StableDiffusionXLInstructPix2PixPipeline"),
    ],
)
def test_once_the_base_is_known(name: str, pipeline: str) -> None:
    """A single file has no index: its channels tell whether it is InstructPix2Pix."""
    family, pipe = get_family(name), pipeline_classes.build(pipeline)
    check_controls_of_base(config(), family, pipe, [ONE])
    family.check_base(pipe)
    with pytest.raises(ConfigError, match="a sample needs one control image"):
        check_controls_of_base(config(), family, pipe, [example()])
    with pytest.raises(ConfigError, match="does not edit images"):
        check_controls_of_base(config(), family, PIPELINES[name](), [ONE])
