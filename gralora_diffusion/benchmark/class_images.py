"""Class images for prior preservation, generated once for all trials."""

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
    """Generate the missing class images, if any are needed.

    One process generates them while the others wait, since they would otherwise train on only some
    of them, or on none. The noise does not depend on the trial's seed, because it is a matter of
    chance which seed comes first.
    """
    folder = Path(config.class_data_dir or "")
    while missing_class_images(config):
        mine = claim(folder.with_name(f".{folder.name}"))
        if mine is None:
            time.sleep(WAIT_SECONDS)
            continue
        with mine:
            generate_class_images(replace(config, seed=0), family, accelerator)
