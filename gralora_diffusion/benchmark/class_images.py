"""Class images of prior preservation, drawn once for all units."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from gralora_diffusion.families import ModelFamily
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.class_images import (
    generate_class_images,
    missing_class_images,
)

from .trial_locks import WAIT_SECONDS, claim


def share_class_images(
    config: TrainingConfig, family: ModelFamily, accelerator: Accelerator
) -> None:
    """Draw the class images that lack, if there are to be any.

    One process draws them while the others wait, which would otherwise train on a part of them, or
    on none. Their noise is not of the unit's seed: which of the seeds comes first is chance.
    """
    folder = Path(config.class_data_dir or "")
    while missing_class_images(config):
        mine = claim(folder.with_name(f".{folder.name}"))
        if mine is None:
            time.sleep(WAIT_SECONDS)
            continue
        with mine:
            generate_class_images(replace(config, seed=0), family, accelerator)
