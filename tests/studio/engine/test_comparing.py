"""Comparisons: every cell is what the pipeline generates with these settings."""

from __future__ import annotations

import json
import struct
import zlib

import pytest
from diffusers import FluxPipeline
from PIL import Image

from gralora_diffusion.export.main import main as export
from gralora_diffusion.io.image_parameters import ImageParameters, save_png
from gralora_diffusion.pipelines.generation import generate
from gralora_diffusion.studio.engine.comparing import (
    GRID_NAME,
    SPEC_NAME,
    Comparison,
    cell_name,
    main,
    read,
    settings_of,
)
from tests import ROOT
from tests.models import adapt, stable_diffusion

SAMPLES = ROOT / "samples"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters in folders of their own, and a pipeline that has both."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("one", "two")):
        pipe = stable_diffusion()
        adapt(pipe, name, seed=number)
        pipe.save_gralora_weights(folder / name)
    pipe = stable_diffusion()
    for name in ("one", "two"):
        pipe.load_gralora_weights(folder / name, name)
    return pipe, [str(folder / name) for name in ("one", "two")]


def test_loras_beside_adapters(base, adapters, tmp_path):
    _, (one, _) = adapters
    lora = tmp_path / "exported.safetensors"
    export([f"--adapter={one}", "--format=lora", "--style=diffusers", f"--output={lora}"])
    comparison = Comparison(
        base=str(base),
        prompts=["a cat"],
        adapters=[one],
        loras=[str(lora)],
        scales=[0.5, 1.0],
        steps=1,
        size=16,
    )
    assert comparison.problems() == []
    (tmp_path / SPEC_NAME).write_text(comparison.to_json())
    main([str(tmp_path / SPEC_NAME)])
    labels = ["base", "one\nx 0.5", "one\nx 1", "exported\nx 0.5", "exported\nx 1"]
    assert [row.label for row in comparison.rows] == labels
    pipe = stable_diffusion()
    pipe.load_lora_weights(tmp_path, weight_name=lora.name, adapter_name="stock")
    for row, scale in ((3, 0.5), (4, 1.0)):
        pipe.set_adapters("stock", scale)
        ((image,),) = generate(pipe, ["a cat"], seed=0, size=16, inference_steps=1)
        with Image.open(tmp_path / cell_name(row, 0)) as cell:
            assert cell.tobytes() == image.tobytes()
        settings = settings_of(tmp_path / cell_name(row, 0))
        assert (settings["adapter"], settings["scale"]) == (lora.name, scale)


def test_each_cell_and_the_grid(base, adapters, tmp_path):
    pipe, (one, two) = adapters
    comparison = Comparison(
        base=str(base),
        prompts=["a cat", "-a dog, <b>"],
        adapters=[one, two],
        scales=[0.5, 1.0],
        blends=[0.25],
        seeds=[3],
        steps=2,
        guidance_scale=2.0,
        size=16,
    )
    assert comparison.problems() == []
    (tmp_path / SPEC_NAME).write_text(comparison.to_json())
    assert read(tmp_path / SPEC_NAME) == comparison
    main([str(tmp_path / SPEC_NAME)])
    expected = [
        ("base", ["one"], [0.0]),
        ("one\nx 0.5", ["one"], [0.5]),
        ("one\nx 1", ["one"], [1.0]),
        ("two\nx 0.5", ["two"], [0.5]),
        ("two\nx 1", ["two"], [1.0]),
        ("one x 0.75\n+ two x 0.25", ["one", "two"], [0.75, 0.25]),
    ]
    assert [row.label for row in comparison.rows] == [label for label, _, _ in expected]
    options = {"seed": 3, "size": 16, "guidance_scale": 2.0, "inference_steps": 2}
    cells = set()
    for row, (label, names, scales) in enumerate(expected):
        pipe.set_adapters(names, scales)
        for column, prompt in enumerate(comparison.prompts):
            ((image,),) = generate(pipe, [prompt], **options)
            path = tmp_path / cell_name(row, column)
            with Image.open(path) as cell:
                assert cell.tobytes() == image.tobytes(), label
                cells.add(cell.tobytes())
            settings = settings_of(path)
            assert (settings["prompt"], settings["seed"], settings["steps"]) == (prompt, 3, 2)
    assert len(cells) == 12
    assert settings_of(tmp_path / cell_name(0, 0))["adapter"] is None
    assert settings_of(tmp_path / cell_name(1, 0))["scale"] == 0.5
    assert settings_of(tmp_path / cell_name(5, 0))["adapter"] == "one x 0.75 + two x 0.25"
    assert settings_of(tmp_path / GRID_NAME)["steps"] == 2


def test_the_length_of_prompts(tmp_path):
    comparison = Comparison(
        base=str(SAMPLES / "tiny-flux-base"),
        prompts=["a red car on grass"],
        steps=1,
        size=64,
        max_sequence_length=16,
    )
    (tmp_path / SPEC_NAME).write_text(comparison.to_json())
    main([str(tmp_path / SPEC_NAME)])
    pipe = FluxPipeline.from_pretrained(comparison.base)
    cells = []
    for tokens in (16, None):
        ((image,),) = generate(
            pipe, comparison.prompts, size=64, inference_steps=1, max_sequence_length=tokens
        )
        cells.append(image.tobytes())
    with Image.open(tmp_path / cell_name(0, 0)) as cell:
        assert cell.tobytes() == cells[0] != cells[1]


def test_problems_before_anything_is_loaded(tmp_path):
    wrong = Comparison(
        base=" ",
        prompts=[],
        with_base=False,
        blends=[2.0],
        seeds=[-1],
        steps=0,
        size=9,
        max_sequence_length=0,
    )
    words = ["base", "prompt", "nothing to compare", "two adapters", "0 to 1", "steps", "seed"]
    words += ["size", "tokens of a prompt are 0; they must be at least 1"]
    for word, problem in zip(words, wrong.problems(), strict=True):
        assert word in problem
    path = tmp_path / SPEC_NAME
    for content in ("[]", '{"bases": 1}', "{"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"contain|Expecting"):
            read(path)
    right = {"base": "a", "prompts": ["b"]}
    for other in (
        {"base": 1},
        {"prompts": "b"},
        {"prompts": [1]},
        {"scales": ["1"]},
        {"scales": [float("nan")]},
        {"seeds": [1.5]},
        {"with_base": 1},
        {"steps": True},
        {"size": "9"},
        {"max_sequence_length": 64.5},
        {"guidance_scale": 10**400},
    ):
        path.write_text(json.dumps(right | other))
        with pytest.raises(ValueError, match=f"comparison: {next(iter(other))} is "):
            read(path)
    many = Comparison(base="a", prompts=["b"] * 1000, seeds=[0] * 1000, adapters=["c"] * 1000)
    assert many.problems() == ["these are 1,001,000,000 images; at most 1,000 are compared"]


def test_settings_of_an_image_are_read_again_when_it_changes(tmp_path):
    path = tmp_path / "cell.png"
    assert settings_of(path) == {}
    for seed in (1, 22):
        save_png(Image.new("RGB", (8, 8)), path, ImageParameters(prompt="a", seed=seed, steps=1))
        assert settings_of(path)["seed"] == seed
    path.write_bytes(path.read_bytes()[:60])
    assert settings_of(path) == {}
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(SIGNATURE + chunk(b"IHDR", header))
    assert settings_of(path) == {}  # its size alone would fill the memory
    image = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    image += chunk(b"IDAT", zlib.compress(b"\0\0"))
    path.write_bytes(SIGNATURE + image + chunk(b"iCCP", b"name\0"))
    assert settings_of(path) == {}  # for this, Pillow raises an IndexError


SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(name: bytes, content: bytes) -> bytes:
    checked = name + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))
