"""What stands in the output folder at the start and at the end of a run, and its upload."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import create_repo, upload_folder

from .config import TrainingConfig
from .config_checks import ConfigError
from .records import CURVE_NAME, draw_curve, write_card

logger = logging.getLogger(__name__)

CONFIG_NAME = "training_config.yaml"


def make_repository(config: TrainingConfig) -> None:
    """Make the Hub repository, if there is to be an upload, while an error costs nothing.

    Raises:
        ConfigError: it cannot be made.
    """
    if not config.push_to_hub:
        return
    repository = _repository(config)
    try:
        create_repo(repository, exist_ok=True, token=config.hub_token)
    except (OSError, ValueError) as error:
        raise ConfigError(
            [
                f"--push_to_hub: the repository {repository} cannot be made ({error}). Log in by "
                "`hf auth login`, give --hub_token and --hub_model_id, or leave out --push_to_hub"
            ]
        ) from error


def start(folder: Path, config: TrainingConfig) -> None:
    """Write down the options, to be read again with ``--config`` for the same run."""
    folder.mkdir(parents=True, exist_ok=True)
    anew = replace(config, resume_from_checkpoint=None, overwrite_output_dir=False)
    (folder / CONFIG_NAME).write_text(anew.to_yaml(), encoding="utf-8")


def finish(
    folder: Path,
    config: TrainingConfig,
    family: str,
    rows: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    grid: Path | None,
) -> None:
    """Draw the curve, write the model card, upload if asked. The adapter is already there."""
    if rows:
        draw_curve(rows, folder / CURVE_NAME)
    write_card(folder, config, family, facts, grid, config.validation_prompt or ())
    if config.push_to_hub:
        upload_folder(
            repo_id=_repository(config),
            folder_path=folder,
            commit_message="GraLoRA adapter",
            # the card holds the options without this machine's paths
            ignore_patterns=[
                *("checkpoint-*", ".unfinished-*"),
                *(f"{config.logging_dir}/*", CONFIG_NAME),
            ],
            token=config.hub_token,
        )
    logger.info("done: %s", folder)


def _repository(config: TrainingConfig) -> str:
    return config.hub_model_id or Path(config.output_dir).resolve().name
