"""Held-out images: of the subject, never trained on, measured as they are."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.io.student_t import MIN_VALUES
from gralora_diffusion.training.config.data_file import sound_sections
from gralora_diffusion.training.config.training_config import TrainingConfig

from .controls import ControlPlaces
from .data_module import Batches, facts_of_samples, find_in_sets
from .image_folder import MAX_NAMES, Example, find_examples
from .masks import MaskPlaces
from .seeds import seed_from
from .sets import by_set

logger = logging.getLogger(__name__)


def find_held_out_images(
    config: TrainingConfig, trained: Mapping[str, Sequence[Example]]
) -> list[Example]:
    """Find and check the held-out images, by the rules for the subject's; none without a folder.

    Args:
        trained: flag of a folder or dataset -> the images of it that are trained on.

    Raises:
        ConfigError: the data file has problems.
        DataError: there are problems with them, or an image of the same bytes is trained on or is
            there twice. The error lists all of them.
    """
    if not config.held_out_data_dir:
        return []
    sets = sound_sections(config, "held_out") if config.data_config else []
    held_out = find_in_sets(config, sets, _find_images) if sets else _find_images(config)
    place = "--data_config" if sets else f"--held_out_data_dir {config.held_out_data_dir!r}"
    problems = _duplicates(held_out, trained)
    if config.stop_when and len(held_out) < MIN_VALUES:
        problems.append(
            f"--stop_when {config.stop_when} needs an interval over the images, and there is only "
            "one. Hold out more, or leave it out"
        )
    if problems:
        raise DataError(place, problems)
    whole = [example.name for example in held_out if example.mask is None]
    if (config.masked_loss or config.inpaint_given_masks) and whole:
        logger.warning(
            "held-out images without a mask, which are measured as a whole (%d): %s",
            len(whole),
            first_few(whole, MAX_NAMES),
        )
    return held_out


def _find_images(config: TrainingConfig) -> list[Example]:
    masks = None
    if config.masked_loss or config.inpaint_given_masks:
        folder = config.held_out_mask_data_dir
        own = Path(folder) if folder else None
        masks = MaskPlaces(own, config.mask_column, config.mask_from_alpha)
    return find_examples(
        str(config.held_out_data_dir),
        config.instance_prompt,
        caption_column=config.caption_column,
        skip_bad_images=config.skip_bad_images,
        caption_per_line=config.caption_per_line,
        cache_dir=config.latent_cache_dir,
        remember=not config.dry_run,
        role="held_out",
        masks=masks,
        controls=ControlPlaces(
            tuple(Path(folder) for folder in config.held_out_control_data_dir or ()),
            tuple(config.control_column) if config.control_column else None,
            "--held_out_control_data_dir",
        ),
    )


def _duplicates(held_out: Sequence[Example], trained: Mapping[str, Sequence[Example]]) -> list[str]:
    """Return the images that are held out and trained on, and those that are held out twice."""
    places = {
        example.content_key: f"{example.name} of {flag}"
        for flag, examples in trained.items()
        for example in examples
    }
    problems = [
        f"{example.name} is the same image as {places[example.content_key]}. An image that is "
        "trained on cannot be held out: remove one of them"
        for example in held_out
        if example.content_key in places
    ]
    again: dict[str, list[str]] = defaultdict(list)
    for example in held_out:
        again[example.content_key].append(example.name)
    problems += [
        f"{' and '.join(names)} are the same image, which would count {len(names)} times. Keep one"
        for names in again.values()
        if len(names) > 1
    ]
    return problems


def held_out_config(config: TrainingConfig) -> TrainingConfig:
    """Return the options by which held-out images become samples: as trained, but never at random.

    Their random numbers are none that training uses.
    """
    return replace(
        config,
        seed=seed_from(config.seed, "held out"),
        repeats=1,
        resolutions=None,
        center_crop=True,
        random_flip=False,
        cached_crops=1,
        caption_dropout=0.0,
        shuffle_tags=False,
        tag_dropout=0.0,
        control_dropout=0.0,
        with_prior_preservation=False,
        validation_prompt=None,  # so that a prompt that is too long is reported once
        validation_prompts_file=None,
    )


def held_out_digest(config: TrainingConfig, data: Batches) -> str:
    """Hash everything but the models that the measurements depend on.

    Args:
        config: of ``held_out_config``, with the base's defaults.
        data: the held-out images.
    """
    facts: list[Any] = [data.instance.digest, *facts_of_samples(config)]
    facts += [config.held_out_noises, config.train_batch_size, config.mixed_precision]
    facts += [
        facts_of_samples(own)
        for image_set, own, _ in by_set(config, data.instance.examples)
        if image_set.changes
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
