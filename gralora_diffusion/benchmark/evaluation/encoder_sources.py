"""Whether a folder or Hub id may be an encoder, by the names of its files."""

from __future__ import annotations

from pathlib import Path

from gralora_diffusion.training.checks.paths import model_problem

#: Advice on the source of an encoder.
WANTED = (
    "Give a Hub id, or a folder that save_pretrained wrote for a model, its image processor, and "
    "its tokenizer if it reads text"
)
#: Names of transformers' files, which takes seconds to import.
CONFIG_NAME = "config.json"
WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def source_problem(source: str | Path) -> str | None:
    """Return why no encoder can be loaded from a folder or Hub id, or None if one may be.

    Only the names of files are checked, and nothing is downloaded.
    """
    if problem := model_problem(str(source), CONFIG_NAME, library="transformers"):
        return problem
    folder = Path(source)
    if not folder.is_dir():
        return None
    for what, names in (("weights", WEIGHTS), ("image processor", PROCESSORS)):
        if not any((folder / name).is_file() for name in names):
            return f"this folder has no {what}, {' or '.join(names)}. {WANTED}"
    return None
