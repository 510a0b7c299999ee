"""The output folder at the start and at the end of a run, and its upload."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from huggingface_hub import create_repo

from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.file_names import real_path
from gralora_diffusion.io.tensor_files import replacing
from gralora_diffusion.training.config.options import OutputOptions
from gralora_diffusion.training.config.training_config import TrainingConfig, parse_config
from gralora_diffusion.training.config.validation_prompts import ValidationPrompt
from gralora_diffusion.training.runtime.agreement import from_first
from gralora_diffusion.training.runtime.folder_lock import (
    BENCHMARK_NAME,
    CONFIG_NAME,
    owned_by_run,
)

from .curve import CURVE_NAME, plot_curve
from .metrics import with_loss
from .model_card import write_card
from .upload import upload
from .validation_history import write_history

logger = logging.getLogger(__name__)


@contextmanager
def own_output_dir(options: OutputOptions, accelerator: Accelerator) -> Iterator[None]:
    """Make this run the only owner of the output folder inside; every process must enter it.

    Raises:
        ConfigError: another run is using it, or it belongs to a benchmark.
    """
    folder, label = Path(options.output_dir), f"--output_dir {options.output_dir!r}"

    def check() -> None:
        if (folder / BENCHMARK_NAME).exists():
            raise ConfigError(
                [f"{label} belongs to a benchmark ({BENCHMARK_NAME}). Give another folder"]
            )

    with owned_by_run(accelerator, folder, label):
        from_first(accelerator, check)
        yield


def make_repository(options: OutputOptions) -> None:
    """Create the Hub repository for an upload early, while an error costs nothing.

    Raises:
        ConfigError: it cannot be created.
    """
    if not options.push_to_hub:
        return
    repository = _repository(options)
    try:
        create_repo(repository, exist_ok=True, token=options.hub_token)
    except (OSError, ValueError) as error:
        raise ConfigError(
            [
                f"--push_to_hub: the repository {repository} cannot be created ({error}). Log in "
                "with `hf auth login`, give --hub_token and --hub_model_id, or leave out "
                "--push_to_hub"
            ]
        ) from error


def start(folder: Path, config: TrainingConfig) -> None:
    """Save the options, so that ``--config`` can repeat the run.

    A file that states the same options stays as it is: users comment it, and pass it as
    ``--config``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / CONFIG_NAME, _as_new_run(config)
    with suppress(ConfigError):
        if path.is_file() and _as_new_run(parse_config(["--config", str(path)])) == text:
            return
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _as_new_run(config: TrainingConfig) -> str:
    """Return the options of a run, as those of a run that neither resumes nor overwrites one."""
    anew = replace(config, resume_from_checkpoint=None, overwrite_output_dir=False)
    return anew.to_yaml(effective=True)


def finish(
    folder: Path,
    config: TrainingConfig,
    family: str,
    rows: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    grid: Path | None,
    prompts: Sequence[ValidationPrompt],
    whole: bool = True,
) -> None:
    """Plot the curve, write the model card, upload if requested. The adapter is already there.

    Args:
        grid: of the last validation images, and their ``prompts``, a row each.
        whole: the run made all its steps; otherwise nothing is uploaded.
    """
    if with_loss(rows):
        plot_curve(rows, folder / CURVE_NAME)
    write_history(folder)
    write_card(folder, config, family, facts, grid, prompts)
    if config.push_to_hub and not whole:
        logger.warning("nothing was uploaded, because the run was stopped before its last step")
    elif config.push_to_hub:
        upload(folder, _repository(config), config.hub_token)


def _repository(options: OutputOptions) -> str:
    return options.hub_model_id or real_path(options.output_dir).name
