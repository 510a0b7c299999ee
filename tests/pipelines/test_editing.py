"""Which pipeline generates with a base, and what it is given."""

from __future__ import annotations

import inspect

import diffusers
import pytest
from PIL import Image

from gralora_diffusion.families import find_family, get_family, reduced, reduced_size
from gralora_diffusion.pipelines.editing import editing_pipeline, generating_pipeline
from tests.pipeline_classes import FILLING, build, build_filling
from tests.tiny import PIPELINES


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("StableDiffusionInstructPix2PixPipeline", ("StableDiffusionInstructPix2PixPipeline", 1)),
        ("StableDiffusionImg2ImgPipeline", ("StableDiffusionPipeline", 0)),
        ("FluxKontextPipeline", ("FluxKontextPipeline", 1)),
        ("FluxKontextInpaintPipeline", ("FluxKontextPipeline", 1)),
        ("FluxImg2ImgPipeline", ("FluxPipeline", 0)),
        ("Flux2KleinPipeline", ("Flux2KleinPipeline", None)),
        ("Flux2KleinInpaintPipeline", ("Flux2KleinPipeline", None)),
    ],
)
def test_a_base_generates_as_its_own_pipeline_does(
    name: str, expected: tuple[str, int | None]
) -> None:
    """The trainer loads it as a text-to-image pipeline; its index declares what it is."""
    own = build(name)
    family = find_family(getattr(diffusers, name))
    assert family is not None
    text_to_image = getattr(diffusers, family.pipeline_classes[0])
    wanted = inspect.signature(text_to_image.__init__).parameters
    loaded = text_to_image(**{key: p for key, p in own.components.items() if key in wanted})
    for pipe, declared in ((own, None), (loaded, name)):
        made, count = generating_pipeline(pipe, family, declared)
        assert count is not None
        assert (type(made).__name__, count.most) == expected
        assert getattr(made, family.denoiser) is getattr(own, family.denoiser)


@pytest.mark.parametrize("name", FILLING)
def test_a_base_that_fills_generates_by_filling(name: str) -> None:
    family = get_family(name)
    pipe, count = generating_pipeline(PIPELINES[name](**FILLING[name]), family)
    assert (type(pipe).__name__, count) == (family.inpainting_pipeline, None)
    assert editing_pipeline(build_filling(name), family).components.keys() == pipe.components.keys()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((80, 60), (80, 60)),  # smaller images stay
        ((100, 100), (100, 100)),
        ((400, 400), (96, 96)),
        ((800, 400), (128, 64)),  # 100 x sqrt(2) by 100 / sqrt(2), and multiples of 16
        ((50, 20000), (16, 2000)),  # a side is a token at least
    ],
)
def test_reduced_images(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert reduced_size(size, 100, 16) == expected
    image = Image.effect_noise(size, 50)
    assert reduced(image, 100, 16).size == expected
