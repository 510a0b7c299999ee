"""A set of captioned images, of which some are trained on and others are held out.

As in the GraLoRA paper (arXiv 2505.20355) and in PEFT's comparison
(``method_comparison/image-gen``), the images generated for a held-out caption are compared with the
image that has this caption.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gralora_diffusion.io.image_files import image_suffix
from gralora_diffusion.io.staging import staged
from gralora_diffusion.training.data.captions import METADATA_NAME
from gralora_diffusion.training.data.image_folder import Example
from gralora_diffusion.training.data.seeds import seed_from


@dataclass(frozen=True)
class CaptionedSplit:
    """Examples to train on, and examples that no method has seen."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


def split(
    examples: Sequence[Example], held_out: int, seed: int, validation: int = 0
) -> CaptionedSplit:
    """Hold out ``held_out`` images, independently of their names and order.

    The choice depends only on the images' contents and the seed. An image that occurs twice is on
    one side, and counts once. ``validation`` further images are on no side.

    Raises:
        ValueError: no image would be held out, or none left to train on.
    """
    contents = sorted({example.content_key for example in examples})
    most = len(contents) - validation - 1
    if not 0 < held_out <= most:
        left = f", of which --validation leaves out {validation}" if validation else ""
        raise ValueError(
            f"held_out is {held_out}, but there are {len(contents)} different images{left}. Hold "
            f"out 1 to {most}"
        )
    order = sorted(contents, key=lambda key: seed_from(seed, "held out", key))
    chosen, left_out = set(order[:held_out]), set(order[held_out : held_out + validation])
    return CaptionedSplit(
        tuple(e for e in examples if e.content_key not in chosen | left_out),
        tuple(e for e in examples if e.content_key in chosen),
    )


def split_as_peft(examples: Sequence[Example], held_out: int, validation: int) -> CaptionedSplit:
    """Split a dataset's rows as PEFT's comparison does, in the order of its shuffled rows.

    numpy shuffles them with seed 0. The first are trained on, the next ``validation`` are left out,
    and the last ``held_out`` are held out (``get_train_valid_test_datasets`` in
    ``method_comparison/image-gen/data.py`` of huggingface/peft).

    Raises:
        ValueError: no image would be left to train on.
    """
    order = np.arange(len(examples))
    np.random.RandomState(0).shuffle(order)
    train = len(order) - validation - held_out
    if train < 1:
        raise ValueError(
            f"held_out is {held_out} and --validation {validation}, but there are {len(order)} "
            "images, some of which must be left to train on"
        )
    return CaptionedSplit(
        tuple(examples[row] for row in order[:train]),
        tuple(examples[row] for row in order[train + validation :]),
    )


def write_examples(examples: Sequence[Example], folder: Path) -> list[Path]:
    """Write examples as a folder that the trainer reads; return the images' files, in order.

    The folder appears when it is complete. A folder that already contains these files, perhaps
    written by another process, is left unchanged. The files are the images' original bytes.

    Raises:
        OutputError: ``folder`` cannot be written to.
        DataError: an image no longer exists, or has changed.
    """
    files = {}
    for number, example in enumerate(examples):
        data = example.read_bytes()
        # the ending follows from the content, because a row of a dataset has no name
        files[f"{number:05d}{image_suffix(data)}"] = data
    entries = [
        {"file_name": name, "text": example.caption}
        for name, example in zip(files, examples, strict=True)
    ]
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    files[METADATA_NAME] = "".join(lines).encode()
    try:
        if not _holds(folder, files):
            with staged(folder) as made:
                made.mkdir()
                for name, data in files.items():
                    (made / name).write_bytes(data)
    except OSError:
        if not _holds(folder, files):  # another process may have been faster
            raise
    return [folder / name for name in files if name != METADATA_NAME]


def _holds(folder: Path, files: dict[str, bytes]) -> bool:
    return all((folder / n).is_file() and (folder / n).read_bytes() == files[n] for n in files)
