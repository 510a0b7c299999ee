"""What a reader of files is, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gralora_diffusion import get_family
from gralora_diffusion.io.tensor_files import write_safetensors
from gralora_diffusion.training.config.training_config import TrainingConfig

SD = "stable-diffusion"
FAMILY = get_family(SD)


@dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
        make: writes samples, each into a folder of its own.
        read: reads the sample in a folder.
        errors: those that its documentation names.
        writes: whether it may write into the folder that it reads.
        slow: whether it loads models, or writes much.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    errors: tuple[type[BaseException], ...] = ()
    writes: bool = False
    slow: bool = False


def sample_folder(folder: Path, name: str) -> Path:
    (part := folder / name).mkdir(parents=True)
    return part


def training_config(**options: Any) -> TrainingConfig:
    values = {"instance_data_dir": "x", "instance_prompt": "a dog", "output_dir": "x"}
    return TrainingConfig(**{**values, **options})


def save_tensors(tensors: dict[str, torch.Tensor], folder: Path, **metadata: str) -> Path:
    path = folder / "file.safetensors"
    write_safetensors({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def file_or(folder: Path) -> Path:
    """The file in a folder, there or not, unless the sample is the whole folder."""
    others = [path for path in folder.iterdir() if path.name != "file.safetensors"]
    return folder if others else folder / "file.safetensors"
