"""Which checkpoint a run resumes from, and whether its options and base are those of the run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gralora_diffusion.base_models.gguf_file import is_packed
from gralora_diffusion.base_models.unread_weights import StoredWeights
from gralora_diffusion.io.errors import CheckpointError, ConfigError
from gralora_diffusion.io.json_files import read_object
from gralora_diffusion.options.fields import Fixed, options_with
from gralora_diffusion.training.config.options import OutputOptions
from gralora_diffusion.training.config.training_config import TrainingConfig

from .store import CheckpointStore

PROGRESS_NAME = "progress.json"
#: How many numbers of each of a base's tensors are compared.
_SAMPLE = 16


def find_checkpoint(options: OutputOptions, store: CheckpointStore) -> tuple[int, Path] | None:
    """Return (step, path) of the checkpoint to resume from, if there is one.

    Raises:
        ConfigError: the output folder contains later ones.
        CheckpointError: it does not exist.
    """
    if not options.resume_from_checkpoint:
        return None
    found = store.find(options.resume_from_checkpoint)
    later = [path.name for step, path in store.list() if found and step > found[0]]
    if found and later:
        raise ConfigError(
            [
                f"--resume_from_checkpoint is {options.resume_from_checkpoint}, but "
                f"{options.output_dir!r} also contains {', '.join(later)}, and two runs would mix "
                "there. Move the later checkpoints away, or give another --output_dir and the "
                "checkpoint's path"
            ]
        )
    return found


def deciding_options(config: TrainingConfig) -> dict[str, Any]:
    """Return the options that may not change within a run; ``config`` has the family's defaults."""
    return {
        name: getattr(config, name)
        for name, fixed in options_with(type(config), Fixed).items()
        if fixed.switch is None or getattr(config, fixed.switch)
    }


def read_progress(path: Path) -> dict[str, Any]:
    """Return what the checkpoint at ``path`` says about itself.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        progress = read_object(path / PROGRESS_NAME)
        return {**progress, "step": int(progress["step"]), "options": dict(progress["options"])}
    except (OSError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a checkpoint that cannot be used."""
    return CheckpointError(
        f"{path} cannot be resumed from: {error}. It is damaged or from another version. Resume "
        "from an earlier checkpoint."
    )


def check_options(path: Path, progress: Mapping[str, Any], config: TrainingConfig) -> None:
    """Compare the options of a checkpoint with those of the run.

    Args:
        progress: result of ``read_progress``.
        config: with the family's defaults.

    Raises:
        CheckpointError: it belongs to another run. The error names all options that differ.
    """
    there, here = _with_defaults(progress["options"]), deciding_options(config)
    differing = [name for name in here if name in there and there[name] != here[name]]
    if differing:
        differences = "; ".join(
            f"--{name} {there[name]} there, {here[name]} here" for name in differing
        )
        raise _of_another_run(path, differences)


def _with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's options with the defaults of those that its version did not have.

    Without those that had no effect. All options with defaults of a family are older than this.
    """
    usual, found = TrainingConfig(), dict(options)
    for name, fixed in options_with(TrainingConfig, Fixed).items():
        if fixed.switch is None or options.get(fixed.switch):
            found.setdefault(name, getattr(usual, name))
    return found


def check_base(path: Path, progress: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Compare the weights of a checkpoint's base with the run's, wherever they are stored.

    Args:
        progress: result of ``read_progress``.
        base: result of ``describe_base``.

    Raises:
        CheckpointError: they have other weights.
    """
    there = progress.get("base")
    if not there or there["precision"] != base["precision"]:
        return  # bases in different precisions cannot be compared
    models = {*there["models"], *base["models"]}
    if differing := sorted(m for m in models if there["models"].get(m) != base["models"].get(m)):
        raise _of_another_run(
            path,
            f"trained on {there['source']}, and the {', '.join(differing)} of {base['source']} "
            "differs from it",
        )


def _of_another_run(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} belongs to another run ({why}). Resume with the options and the base of that run, "
        f"or start a new run from its values with --initial_adapter {path} and another "
        "--output_dir."
    )


def describe_base(
    pipe: Any, config: TrainingConfig, unread: Mapping[str, StoredWeights] | None = None
) -> dict[str, Any]:
    """Return what identifies a base: its source, its precision and hashes of its models.

    A hash covers some values of each frozen tensor in the model's order, which is fast and does not
    depend on an adapter. Quantized tensors are left out.

    Args:
        unread: models with placeholders for their weights -> where these are stored.
    """
    models = {
        name: _digest(model, (unread or {}).get(name))
        for name, model in sorted(pipe.components.items())
        if isinstance(model, nn.Module)
    }
    source = config.pretrained_model_name_or_path
    return {"source": source, "precision": config.mixed_precision, "models": models}


@torch.no_grad()
def _digest(model: nn.Module, unread: StoredWeights | None = None) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        stored: Any = parameter
        packed = is_packed(parameter)
        if (type(parameter) is nn.Parameter or packed) and not parameter.requires_grad:
            form = f" {int(stored.quant_type)}" if packed else ""
            stored = stored.as_tensor() if packed else stored
            if unread is None:
                values = stored.detach().flatten()[:_SAMPLE].cpu().contiguous()
            else:
                values = unread.first_values(name, _SAMPLE, stored.dtype)
            digest.update(f"{stored.dtype} {tuple(stored.shape)}{form}".encode())
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
