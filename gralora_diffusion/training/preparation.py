"""Finds and checks a run's base, checkpoint, images and initial values, alike in all processes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from gralora_diffusion.base_models.loading import find_base_family, find_pipeline_class
from gralora_diffusion.families import ModelFamily
from gralora_diffusion.options.fields import MayDiffer, Place, options_with
from gralora_diffusion.training.checkpoints.resume import check_before_loading, find_checkpoint
from gralora_diffusion.training.checkpoints.store import CheckpointStore
from gralora_diffusion.training.checks.base import check_without_weights
from gralora_diffusion.training.checks.controls import check_controls
from gralora_diffusion.training.checks.family import check_family_options
from gralora_diffusion.training.checks.options import validate
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.class_images import generate_class_images, missing_class_images
from gralora_diffusion.training.data.data_module import find_class_images, find_images
from gralora_diffusion.training.data.example_table import ExampleTable
from gralora_diffusion.training.data.held_out import find_held_out_images
from gralora_diffusion.training.data.image_folder import Example
from gralora_diffusion.training.optimization.initial_adapter import (
    InitialValues,
    find_initial_values,
)
from gralora_diffusion.training.runtime.acceleration import DTYPES
from gralora_diffusion.training.runtime.agreement import check_alike, from_first, together
from gralora_diffusion.training.runtime.offloading import NOTHING, Offloading
from gralora_diffusion.training.runtime.sharding import Sharding

logger = logging.getLogger(__name__)

#: How to give the processes on all machines the same files.
_SHARE = "Give all machines the same, in a folder that they share or as copies"


@dataclass(frozen=True)
class Beginning:
    """The inputs of a run, found before a model is loaded.

    Attributes:
        resume: step and path of the checkpoint to resume from.
        initial: values of ``--initial_adapter``, unless a checkpoint is resumed.
    """

    family: ModelFamily
    resume: tuple[int, Path] | None
    images: Sequence[Example]
    class_images: Sequence[Example]
    held_out: list[Example]
    initial: InitialValues


def find_beginning(
    config: TrainingConfig, store: CheckpointStore, accelerator: Accelerator
) -> Beginning:
    """Find and check the inputs of a run; every process must call it.

    Raises:
        ConfigError, DataError, CheckpointError: an input has a problem, or differs between
            processes.
        OtherProcessFailed: only another process has a problem.
    """
    decoded: Beginning | None = None
    if accelerator.num_processes > 1 and config.latent_cache_dir and not config.dry_run:
        # one process on each machine decodes the images, and the others read what it found
        decoded = together(
            accelerator,
            lambda: (
                _find(config, store, accelerator) if accelerator.is_local_main_process else None
            ),
        )
    found = together(accelerator, lambda: decoded or _find(config, store, accelerator))
    if accelerator.num_processes > 1:
        of_a_process = options_with(type(config), Place).keys() | {
            name for name, may in options_with(type(config), MayDiffer).items() if may.processes
        }
        options = {
            f"--{name} is": value
            for name, value in config.as_record().items()
            if name not in of_a_process
        }
        check_alike(accelerator, options, "Give the same options to every process")
        facts = {
            "the checkpoint to resume is": together(accelerator, lambda: _described(found.resume)),
            "the images and captions are": digest_of(found.images),
            "the class images are": digest_of(found.class_images),
            "the held-out images are": digest_of(found.held_out),
        }
        check_alike(accelerator, facts, _SHARE)
    return found


def _find(config: TrainingConfig, store: CheckpointStore, accelerator: Accelerator) -> Beginning:
    for warning in validate(config):
        logger.warning(warning)
    resume = find_checkpoint(config, store)
    family = find_base_family(config)
    for warning in check_family_options(config, family):
        logger.warning(warning)
    initial: InitialValues = {}
    if resume is not None:
        _, path = resume
        check_before_loading(path, config.with_defaults(family.training_defaults), family)
    images = find_images(config)
    class_images = find_class_images(config, images)
    trained = {
        _place_of_images(config): images,
        "--class_data_dir": class_images,
    }
    held_out = find_held_out_images(config, trained)
    pipeline_class = find_pipeline_class(config, family)
    for warning in check_controls(
        config, family, pipeline_class, ExampleTable(chain(images, held_out))
    ):
        logger.warning(warning)
    if resume is None:
        dtype = DTYPES[accelerator.mixed_precision]
        initial = find_initial_values(config, family, dtype)
    return Beginning(family, resume, images, class_images, held_out, initial)


def _place_of_images(config: TrainingConfig) -> str:
    """Return the option that says where the images are that are trained on."""
    if config.data_config:
        return "--data_config"
    return "--instance_data_dir" if config.instance_data_dir else "--dataset_name"


def complete_class_images(
    config: TrainingConfig,
    found: Beginning,
    accelerator: Accelerator,
    offloading: Offloading = NOTHING,
    sharding: Sharding | None = None,
) -> Sequence[Example]:
    """Generate the missing class images and return all of them; every process must call it.

    Raises:
        ConfigError, DataError: they cannot be generated, or differ between processes.
    """
    if not from_first(accelerator, lambda: missing_class_images(config)):
        return found.class_images
    family, precision = found.family, accelerator.mixed_precision
    together(accelerator, lambda: check_without_weights(config, family, precision))
    streamed = offloading.denoiser is not None
    generate_class_images(config, family, accelerator, streamed=streamed, sharding=sharding)
    images = together(accelerator, lambda: find_class_images(config))
    check_alike(accelerator, {"the class images are": digest_of(images)}, _SHARE)
    return images


def digest_of(examples: Sequence[Example]) -> str:
    """Return the number of images and a hash of all that belongs to them, and their order."""
    facts: list[Any] = [
        [e.cache_key, e.captions, list(e.size), e.repeats, *(c.content_key for c in e.controls)]
        for e in examples
    ]
    facts += [s.facts() for s in {id(e.image_set): e.image_set for e in examples}.values()]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return f"{len(examples)} of hash {digest[:16]}"


def _described(resume: tuple[int, Path] | None) -> str:
    """Describe a checkpoint by its step and a hash of all its files; "none" if there is none."""
    if resume is None:
        return "none"
    digest = hashlib.sha256()
    # accelerate's files of random states differ between processes, and are not read
    for path in sorted(resume[1].iterdir()):
        if path.is_file() and not path.name.startswith("random_states_"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return f"step {resume[0]} of hash {digest.hexdigest()[:16]}"
