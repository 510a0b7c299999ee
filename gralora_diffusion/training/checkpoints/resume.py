"""Which checkpoint a run resumes from, and whether its options and base are those of the run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gralora_diffusion.adapters.adapter_file import read_adapter
from gralora_diffusion.base_models.gguf_file import is_packed
from gralora_diffusion.base_models.meta_base import empty_base
from gralora_diffusion.base_models.unread_weights import StoredWeights
from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import CheckpointError, ConfigError
from gralora_diffusion.io.json_files import read_object
from gralora_diffusion.io.regular_files import check_regular
from gralora_diffusion.options.fields import Fixed, options_with
from gralora_diffusion.training.config.options import OutputOptions
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.optimization.adapters import (
    adapter_configs,
    adapter_differences,
    trained_components,
)

from .store import CheckpointStore

#: Schedules compute with steps as floats, which are exact up to here.
_MOST_STEPS = 2**53
PROGRESS_NAME = "progress.json"
TRAINING_WEIGHTS_NAME = "training_weights.safetensors"
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
        step = int(progress["step"])
        if not 0 <= step <= _MOST_STEPS:
            raise ValueError("its step is impossible")
        return {**progress, "step": step, "options": dict(progress["options"])}
    except (OSError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise unreadable(path, error) from error


def digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return name -> SHA-256 of those of a checkpoint's files that exist."""
    found = {}
    for name in names:
        if (path := folder / name).exists():
            check_regular(path)
            with open(path, "rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def check_files(path: Path, progress: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse files other than those that were written with the progress.

    A changed optimizer's state could be read, and used, without an error.

    Raises:
        ValueError: a file is another one.
    """
    written = progress.get("files")
    if not written:
        return  # earlier versions wrote none
    found = digests(path, names)
    for name in names:
        if found.get(name) != written.get(name):
            raise ValueError(f"{name} is not the file that was written with {PROGRESS_NAME}")


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
    if differing := _differing_options(progress, config):
        raise CheckpointError(_of_another_run(path, differing))


def check_before_loading(path: Path, config: TrainingConfig, family: ModelFamily) -> None:
    """Compare a checkpoint with the run's options, those of the adapter included.

    No weights of the base are loaded, since its layers follow from its configuration.

    Args:
        config: with the family's defaults.

    Raises:
        ConfigError: it belongs to another run, or is past the end of this one. The error names all
            differences.
        CheckpointError: it is not readable.
    """
    progress = read_progress(path)
    problems = []
    differing = [
        *_differing_options(progress, config),
        *_differing_layers(path, progress, config, family),
    ]
    if differing:
        problems.append(f"--resume_from_checkpoint: {_of_another_run(path, differing)}")
    if config.max_train_steps and progress["step"] > config.max_train_steps:
        problems.append(past_the_end(path, config.max_train_steps))
    if problems:
        raise ConfigError(problems)


def past_the_end(path: Path, last: int) -> str:
    """Return the problem of a checkpoint that is later than the last step."""
    return (
        f"{path} is past the end of this run, step {last}. Give a higher --max_train_steps or "
        "--num_train_epochs"
    )


def _differing_options(progress: Mapping[str, Any], config: TrainingConfig) -> list[str]:
    there, here = _with_defaults(progress["options"]), deciding_options(config)
    return [
        f"--{name} {there[name]} there, {value} here"
        for name, value in here.items()
        if name in there and there[name] != value
    ]


def _differing_layers(
    path: Path, progress: Mapping[str, Any], config: TrainingConfig, family: ModelFamily
) -> list[str]:
    """Return the differences of the adapter's components and configs.

    There are none if the base's layers cannot be told: loading it will say why.
    """
    try:
        check_files(path, progress, [TRAINING_WEIGHTS_NAME])
        adapter = read_adapter(path / TRAINING_WEIGHTS_NAME)
    except Exception as error:  # libraries may raise anything when a file is damaged
        raise unreadable(path, error) from error
    try:
        pipe = empty_base(config, family, torch.float32)
    except ConfigError:
        return []
    models = {name: getattr(pipe, name) for name in trained_components(config, family)}
    present = {name: model for name, model in models.items() if model is not None}
    return adapter_differences(adapter, adapter_configs(present, family, config))


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
        what = (
            f"trained on {there['source']}, and the {', '.join(differing)} of {base['source']} "
            "differs from it"
        )
        raise CheckpointError(_of_another_run(path, [what]))


def _of_another_run(path: Path, differences: Sequence[str]) -> str:
    return (
        f"{path} belongs to another run ({'; '.join(differences)}). Resume with the options and "
        f"the base of that run, or start a new run from its values with --initial_adapter {path} "
        "and another --output_dir."
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
