"""Small runs of the real trainer, to be compared with each other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from gralora_diffusion.adapters.adapter_file import WEIGHTS_NAME
from gralora_diffusion.training.config.training_config import TrainingConfig, parse_config
from gralora_diffusion.training.data.dataset import TrainingSet
from gralora_diffusion.training.data.image_folder import Example, find_examples
from gralora_diffusion.training.data.sets import SampledSet
from gralora_diffusion.training.data.transforms import CropPlan
from gralora_diffusion.training.run import train
from tests import ROOT
from tests.forked import Forked, fork_ranks, start_ranks

SCRIPT = ROOT / "train_scripts" / "train_dreambooth_gralora.py"
PROGRAM = f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
#: What each run has unless a test says otherwise: fast, and nothing drawn.
USUAL: dict[str, Any] = {
    "instance_prompt": "a sks dog",
    "resolution": 16,
    "rank": 4,
    "train_batch_size": 2,
    "max_train_steps": 6,
    "checkpointing_steps": 1000,  # none; tests that resume a run say when
    "learning_rate": 1e-2,
    "mixed_precision": "no",
    "report_to": "none",
}


def copy_robot(parent: Path) -> Path:
    """Copy the bundled robot's images with their captions into a folder of their own."""
    return Path(shutil.copytree(ROOT / "samples/subjects/robot/train", parent / "robot"))


def captions_of_a_run(folder: Path) -> dict[str, str]:
    """Return name -> caption of the images as a run reads them, "none" for those without one."""
    return {Path(str(e.source)).name: e.caption for e in find_examples(folder, "none")}


def make_images(folder: Path, count: int = 3, side: int = 20, seed: int = 0) -> Path:
    """Write images of noise that are wider than high."""
    return make_shapes(folder, [(side + 7, side)] * count, seed)


def make_shapes(folder: Path, sizes: Sequence[tuple[int, int]], seed: int = 0) -> Path:
    """Write an image of noise of each size (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed)
    for number, (width, height) in enumerate(sizes):
        pixels = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def arguments(**options: Any) -> list[str]:
    """The command line of a run; None leaves an option out, True switches it on."""
    line: list[str] = []
    for name, value in {**USUAL, **options}.items():
        if value is None:
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        line += [f"--{name}", *(str(v) for v in values)]
    return line


def config(**options: Any) -> TrainingConfig:
    return parse_config(arguments(**options))


def run(**options: Any) -> Path:
    """Train in this process; return the output folder."""
    return train(config(**options))


def run_script(
    *, processes: int = 1, timeout: float = 120, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Train with the script, as a user does."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc_per_node", str(processes)]
    return subprocess.run(
        [*launcher, str(SCRIPT), *arguments(**options)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def fork(**options: Any) -> Forked:
    """Begin to train in another process."""
    return Forked(PROGRAM, *arguments(**options), ACCELERATE_USE_CPU="true")


def start(processes: int = 1, **options: Any) -> list[Forked]:
    """Begin to train in one process or two."""
    if processes == 1:
        return [fork(**options)]
    return start_ranks(PROGRAM, *arguments(**options))


def run_two(timeout: float = 120, **options: Any) -> Path:
    """Train in two processes; return the output folder."""
    for code, text in fork_ranks(PROGRAM, *arguments(**options), timeout=timeout):
        assert code == 0, text[-3000:]
    return Path(options["output_dir"])


def one_set(
    examples: Sequence[Example], plan: CropPlan, seed: int = 0, **options: Any
) -> TrainingSet:
    """Samples of one set of images, with options of the set and of all samples."""
    own = {f.name: options.pop(f.name) for f in fields(SampledSet) if f.name in options}
    return TrainingSet([SampledSet(examples, [plan], **own)], seed, **options)


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "MKL_NUM_THREADS": str(torch.get_num_threads()),
    }


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS_NAME)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def learned(folder: Path) -> list[dict[str, Any]]:
    """The metrics without those that depend on the machine and the moment."""
    return [{k: v for k, v in row.items() if k != "performance"} for row in metrics(folder)]


def assert_same_run(first: Path, second: Path) -> None:
    """Same adapter and same losses and gradient norms, bit for bit."""
    assert_close(first, second, 0.0)
    assert learned(first) == learned(second)


def assert_close(first: Path, second: Path, tolerance: float) -> None:
    """All tensors agree within ``tolerance`` x the largest element of the tensor."""
    a, b = adapter(first), adapter(second)
    assert a.keys() == b.keys()
    assert any(tensor.abs().max() > 0 for key, tensor in a.items() if "_B" in key), "not trained"
    far = {
        key: error
        for key in a
        if (error := float((a[key] - b[key]).abs().max() / a[key].abs().max().clamp(min=1e-30)))
        > tolerance
    }
    assert not far, far
