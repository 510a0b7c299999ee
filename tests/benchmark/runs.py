"""Small runs of the real benchmark: a tiny base, tiny encoders, three made-up subjects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gralora_diffusion.benchmark.run_config import parse_settings
from gralora_diffusion.benchmark.settings import BenchmarkSettings
from tests.benchmark import judges
from tests.forked import Forked

#: As the public file is written, but shorter.
TEXT = """\
Classes

subject_name,class
bear_plushie,stuffed animal
cat2,cat
dog,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} on top of pink fabric'.format(unique_token, class_token),
'a {0} {1} with the Eiffel Tower in the background'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a santa hat'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]
"""
USUAL: dict[str, Any] = {
    "subjects": ["cat2", "dog"],
    "methods": ["lora-r4", "gralora-r4-k2"],
    "seeds": [0],
    "images_per_prompt": 2,
    "drift_prompts": ["a car", "a tree"],
    "drift_images": 1,
    "prior_images": 2,
    "inference_steps": 2,
    "resolution": 16,
    "train_batch_size": 2,
    "max_train_steps": 3,
    "learning_rate": 1e-2,
    "mixed_precision": "no",
}


def clone(folder: Path, text: str = TEXT) -> Path:
    """A small clone of google/dreambooth."""
    dataset = folder / "dataset"
    for number, name in enumerate(["bear_plushie", "cat2", "dog"]):
        judges.draw(dataset / name, 2 + number, seed=number)
    (dataset / "prompts_and_classes.txt").write_text(text, encoding="utf-8")
    (dataset / "references_and_licenses.txt").write_text("links", encoding="utf-8")
    return folder


def arguments(world: Path, output: Path, **options: Any) -> list[str]:
    """A command line; ``world`` is what the fixture of this name gives. None leaves one out."""
    places = {
        "pretrained_model_name_or_path": world / "base",
        "dreambooth_dir": world / "dreambooth",
        "encoders": [f"dinov2={world / 'dinov2'}", f"clip={world / 'clip'}"],
        "output_dir": output,
    }
    line: list[str] = []
    for name, value in {**places, **USUAL, **options}.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            line += [f"--{name}", *map(str, values)]
    return line


def settings(world: Path, output: Path, **options: Any) -> BenchmarkSettings:
    return parse_settings(arguments(world, output, **options))


def start(world: Path, output: Path, **options: Any) -> Forked:
    """The command in a process of its own."""
    program = "from gralora_diffusion.benchmark.command import main; main()"
    return Forked(program, *arguments(world, output, **options), ACCELERATE_USE_CPU="true")
