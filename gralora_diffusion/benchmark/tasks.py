"""What to train on and what to generate: a task for each subject, or one for a captioned set."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from gralora_diffusion.io.errors import ConfigError, DataError
from gralora_diffusion.training.checks.options import validate
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.data_module import find_images
from gralora_diffusion.training.data.image_folder import Example

from .captioned import split, split_as_peft, write_examples
from .dreambooth import Subject, read_subjects
from .settings import BenchmarkSettings

logger = logging.getLogger(__name__)

#: Folders of class images and of held-out images, within the run's folder.
CLASS_FOLDER, HELD_OUT_FOLDER = "class_pictures", "held_out"


@dataclass(frozen=True)
class Task:
    """Something that each method learns with each seed.

    Attributes:
        protocol: "subject" or "captioned".
        subject: its name, which is also a folder's.
        config: the trainer's options, except for method and seed.
        examples: the training images.
        prompts: the prompts for generation.
        texts: the texts that CLIP compares the images with, one for each prompt.
        real: the images to compare with: those of the subject, or the one of each caption.
        class_prompt: "" for a captioned set.
    """

    protocol: str
    subject: str
    config: TrainingConfig
    examples: tuple[Example, ...]
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    real: tuple[Path, ...]
    class_prompt: str = ""

    @cached_property
    def digest(self) -> str:
        """What its images, captions and prompts are, whatever their places."""
        learned = [(e.cache_key, e.caption, e.repeats, e.concept) for e in self.examples]
        real = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.real]
        facts = [self.subject, self.prompts, self.texts, self.class_prompt, learned, real]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def read_tasks(settings: BenchmarkSettings) -> list[Task]:
    """Find everything to learn, and decode every image once.

    Raises:
        DataError: files have problems. The error lists all of them, for all subjects.
        ConfigError: the trainer's options have problems.
    """
    if "captioned" in (settings.protocols or ()):
        return [_captioned(settings)]
    # a suite names its own subjects, even if another folder is given
    names_from = f"--suite {settings.suite}, or --subjects," if settings.suite else "--subjects"
    subjects = read_subjects(str(settings.dreambooth_dir), settings.subjects or (), names_from)
    tasks, problems = [], []
    for subject in subjects:
        try:
            tasks.append(_subject(settings, subject))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(str(settings.dreambooth_dir), problems)
    for warning in validate(tasks[0].config):
        logger.warning(warning)
    return tasks


def folder_name(text: str) -> str:
    """Return a folder's name for a prompt that no other prompt has."""
    name = re.sub(r"\W+", "_", text).strip("_")
    if name.replace("_", " ") == text:
        return name
    return f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _subject(settings: BenchmarkSettings, subject: Subject) -> Task:
    config = replace(
        settings.training,
        instance_data_dir=str(subject.folder),
        instance_prompt=subject.instance_prompt(settings.unique_token),
        output_dir=str(settings.folder),
    )
    if config.with_prior_preservation:
        drawn = settings.folder / CLASS_FOLDER / folder_name(subject.class_prompt)
        config = replace(config, class_prompt=subject.class_prompt, class_data_dir=str(drawn))
    number = settings.max_prompts
    examples, real = _images_of(subject, config, Path(str(settings.dreambooth_dir)))
    return Task(
        "subject",
        subject.name,
        config,
        tuple(examples),
        tuple(subject.prompts(settings.unique_token)[:number]),
        tuple(subject.prompts()[:number]),
        tuple(Path(str(example.source)) for example in real),
        subject.class_prompt,
    )


def _images_of(
    subject: Subject, config: TrainingConfig, root: Path
) -> tuple[list[Example], list[Example]]:
    """Return the images to learn and those to compare with, which may be the same.

    Raises:
        DataError: there are problems with them. The error lists all, with folders below ``root``.
    """
    found, problems = [], []
    for folder in (subject.folder, subject.held_out):
        if folder is not None:
            try:
                found.append(list(find_images(replace(config, instance_data_dir=str(folder)))))
            except DataError as error:
                place = folder.relative_to(root)
                problems += [f"{place}: {problem}" for problem in error.problems]
    if problems:
        raise DataError(str(root), problems)
    return found[0], found[-1]


def _captioned(settings: BenchmarkSettings) -> Task:
    config = replace(
        settings.training,
        instance_data_dir=settings.captioned_dir,
        output_dir=str(settings.folder),
    )
    # a caption that stands for those of the rows, which no option of the trainer names
    found = replace(config, instance_prompt="-") if settings.captions else config
    for warning in validate(found):
        logger.warning(warning)
    examples = find_images(found)
    if settings.captions:
        examples = _captioned_rows(list(examples), settings.captions)
    left_out = settings.validation
    try:
        if settings.split == "peft":
            parts = split_as_peft(examples, settings.held_out, left_out)
        else:
            # the same for every training seed, since their trials are compared with each other
            parts = split(examples, settings.held_out, seed=0, validation=left_out)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise ConfigError([f"--{error}"]) from error
    captions = tuple(example.caption for example in parts.held_out)
    folder = settings.folder / HELD_OUT_FOLDER
    return Task(
        "captioned",
        # absolute, because . and .. are not the names of folders
        Path(os.path.abspath(str(settings.captioned_dir or config.dataset_name))).name or "set",
        config,
        parts.train,
        captions,
        captions,
        tuple(write_examples(parts.held_out, folder)),
    )


def _captioned_rows(examples: list[Example], captions: list[str]) -> list[Example]:
    """Give each row of a dataset its caption.

    Raises:
        ConfigError: their numbers differ.
    """
    if len(examples) != len(captions):
        raise ConfigError(
            [
                f"--captions has {len(captions)} texts, but the dataset has {len(examples)} "
                "images. Give one for each, in their order"
            ]
        )
    return [replace(e, caption=text) for e, text in zip(examples, captions, strict=True)]
