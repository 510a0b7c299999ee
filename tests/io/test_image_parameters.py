"""What PNG files say of their images, read as AUTOMATIC1111's web UI and ComfyUI read it.

The chunks are read from the bytes, and both programs' ways to take the text apart are written here
again, after ``parse_generation_parameters`` and ``importA1111``.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gralora_diffusion.io.image_parameters import ImageParameters, save_png

USUAL: dict[str, Any] = {
    "prompt": "a photo of sks dog, on a beach",
    "negative_prompt": "snow, rain",
    "seed": 7,
    "steps": 30,
    "guidance_scale": 7.5,
    "scheduler": "DDIMScheduler",
    "base": "owner/base",
    "adapter": "my_adapter",
    "scale": 0.8,
}


def chunks(path: Path) -> dict[str, str]:
    """The text chunks of a PNG, from its bytes."""
    data, found, place = path.read_bytes(), {}, 8
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        (crc,) = struct.unpack_from(">I", data, place + 8 + length)
        assert crc == zlib.crc32(kind + body)
        if kind == b"tEXt":
            key, _, text = body.partition(b"\0")
            found[key.decode("latin-1")] = text.decode("latin-1")
        elif kind == b"iTXt":
            key, _, rest = body.partition(b"\0")
            packed, (_, _, text) = rest[0], rest[2:].split(b"\0", 2)
            found[key.decode("latin-1")] = (zlib.decompress(text) if packed else text).decode()
        place += 12 + length
    return found


def read_by_web_ui(text: str) -> dict[str, str]:
    """As AUTOMATIC1111's web UI reads the text."""
    field = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    assert len(field.findall(last)) >= 3  # else the line belongs to the prompt
    prompts: dict[bool, list[str]] = {False: [], True: []}
    negative = False
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            negative, line = True, line[16:].strip()
        prompts[negative].append(line)
    read = {"Prompt": "\n".join(prompts[False]), "Negative prompt": "\n".join(prompts[True])}
    for name, value in field.findall(last):
        read[name] = json.loads(value) if value[:1] == '"' == value[-1:] else value
    return read


def read_by_comfyui(text: str) -> dict[str, str]:
    """As ComfyUI's front end reads the text; it makes a workflow of it."""
    steps = text.rindex("\nSteps:")
    field = re.compile(r'\s*([^:]+:\s*([^"\{].*?|".*?"|\{.*?\}))\s*(,|$)')
    pairs = [m[0].split(":") for m in field.finditer(text[steps:].split("\n")[1])]
    read = {pair[0].strip().lower(): pair[1].rstrip(",").strip() for pair in pairs}
    negative = text.rindex("\nNegative prompt:", 0, steps)
    return {
        **read,
        "positive": text[:negative].strip(),
        "negative": text[negative + 18 : steps].strip(),
    }


def saved(tmp_path: Path, **values: Any) -> dict[str, str]:
    save_png(Image.new("RGB", (24, 16)), tmp_path / "x.png", ImageParameters(**{**USUAL, **values}))
    assert Image.open(tmp_path / "x.png").size == (24, 16)
    return chunks(tmp_path / "x.png")


def test_both_read_everything(tmp_path: Path) -> None:
    text = saved(tmp_path)["parameters"]
    web = read_by_web_ui(text)
    assert web.pop("Version").startswith("gralora-diffusion ")
    assert web == {
        "Prompt": "a photo of sks dog, on a beach",
        "Negative prompt": "snow, rain",
        "Steps": "30",
        "Sampler": "DDIM",
        "CFG scale": "7.5",
        "Seed": "7",
        "Size": "24x16",
        "Model": "owner/base",
        "GraLoRA": "my_adapter",
        "GraLoRA scale": "0.8",
    }
    comfy = read_by_comfyui(text)
    assert comfy["positive"] == web["Prompt"]
    assert comfy["negative"] == web["Negative prompt"]
    for name in ("Steps", "Sampler", "CFG scale", "Seed", "Size", "Model"):
        assert comfy[name.lower()] == web[name]


def test_no_negative_prompt_and_no_adapter(tmp_path: Path) -> None:
    text = saved(tmp_path, negative_prompt="", adapter=None, scale=None)["parameters"]
    assert read_by_comfyui(text)["negative"] == ""
    web = read_by_web_ui(text)
    assert web["Negative prompt"] == ""
    assert not [name for name in web if "GraLoRA" in name]


def test_guidance_of_a_distilled_base(tmp_path: Path) -> None:
    """Forge reads it under a name of its own."""
    web = read_by_web_ui(
        saved(tmp_path, guidance_scale=3.5, guidance_is_distilled=True)["parameters"]
    )
    assert (web["CFG scale"], web["Distilled CFG Scale"]) == ("1", "3.5")


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a\n  dog\t\x1b[31m", "a dog \\x1b[31m"),
        ("x\nNegative prompt: y\nSteps: 1, Seed: 9, Size: 1x1", None),
        ("Negative prompt: all", "Negative prompt : all"),
        ("ein schöner Hund 犬 🐶", None),
        ("x" * 20_000, "x" * 10_000),
    ],
)
def test_no_text_breaks_out(tmp_path: Path, prompt: str, shown: str | None) -> None:
    found = saved(tmp_path, prompt=prompt, negative_prompt=prompt)
    expected = shown if shown is not None else " ".join(prompt.split())
    web, comfy = read_by_web_ui(found["parameters"]), read_by_comfyui(found["parameters"])
    assert web["Prompt"] == web["Negative prompt"] == expected
    assert comfy["positive"] == comfy["negative"] == expected
    assert (web["Seed"], comfy["seed"]) == ("7", "7")
    assert json.loads(found["gralora_diffusion"])["prompt"] == prompt[:10_000]


@pytest.mark.parametrize("name", ["a, Seed: 9", 'a "b"', "a\nb: c", "{x}"])
def test_names_of_files_stay_in_their_field(tmp_path: Path, name: str) -> None:
    web = read_by_web_ui(saved(tmp_path, adapter=name)["parameters"])
    assert web["GraLoRA"] == " ".join(name.split())
    assert web["Seed"] == "7"


def test_own_chunk_is_exact(tmp_path: Path) -> None:
    own = json.loads(saved(tmp_path)["gralora_diffusion"])
    assert own.items() >= USUAL.items()
