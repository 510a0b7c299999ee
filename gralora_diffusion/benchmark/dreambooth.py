"""The DreamBooth benchmark: its subjects, their classes and its prompts, word for word.

They come from a clone of https://github.com/google/dreambooth, which was published with arXiv
2208.12242: 30 subjects of 15 classes with 4 to 6 images each, 25 prompts for objects and 25 for
live subjects.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.io.image_files import folder_images
from gralora_diffusion.io.regular_files import read_regular
from gralora_diffusion.training.data.captions import one_line

PROMPTS_NAME = "prompts_and_classes.txt"
#: The repository's README, but not the file, says which subjects are live: dogs and cats.
LIVE_CLASSES = frozenset({"cat", "dog"})

_TABLE_HEAD = "subject_name,class"
_PARTS = {"Object Prompts": False, "Live Subject Prompts": True}  # heading -> live
_PROMPT = re.compile(r"'(?P<template>.*)'\.format\(unique_token, class_token\),?")
#: Bytes of the file at most, and of a folder's name.
_MOST_BYTES, _LONGEST_NAME = 1 << 20, 255
_BETWEEN = {"", "Classes", "Prompts", "prompt_list = [", "]"}


@dataclass(frozen=True)
class Subject:
    """A subject to learn, and the prompts for it.

    Attributes:
        name: of the subject and of its folder.
        class_name: the class noun, such as "stuffed animal".
        folder: contains the training images.
        held_out: contains other images of it, which generated ones are compared with. Without such
            images, the training images are used, as in DreamBooth (section 4.1).
        templates: one for each prompt, with {0} for the unique token and {1} for the class noun.
    """

    name: str
    class_name: str
    folder: Path
    templates: tuple[str, ...]
    held_out: Path | None = None

    @property
    def live(self) -> bool:
        """Whether it is an animal; animals have their own prompts."""
        return self.class_name in LIVE_CLASSES

    @property
    def images(self) -> list[Path]:
        """The training images, sorted by name."""
        return _images(self.folder)

    @property
    def class_prompt(self) -> str:
        """The prompt for the class in prior preservation: "a dog"."""
        return f"a {self.class_name}"

    def instance_prompt(self, unique_token: str) -> str:
        """Return the prompt that the subject is trained with: "a sks dog" (paper, section 3.2)."""
        return one_line(f"a {unique_token} {self.class_name}")

    def prompts(self, unique_token: str = "") -> list[str]:
        """Return the prompts for generation; without a token, those that CLIP compares.

        The paper does not say whether CLIP should read the token, too. To CLIP, it means nothing,
        or something other than the subject, and published evaluations leave it out.
        """
        return [one_line(t.format(unique_token, self.class_name)) for t in self.templates]


def read_subjects(
    folder: str | Path, names: Sequence[str] = (), names_from: str = "--subjects"
) -> list[Subject]:
    """Return the subjects of the benchmark, in the order of its file.

    A subject's folder contains its images. In a set with held-out images, unlike the published set,
    it contains the folders ``train`` and ``held_out`` instead.

    Args:
        folder: a clone of google/dreambooth, or its folder ``dataset``.
        names: of the subjects wanted; all if empty.
        names_from: the option that names them, for errors.

    Raises:
        DataError: there is no such folder, file or subject, or the file or the subjects' folders
            have problems. The error lists all of them.
    """
    folder = Path(folder)
    dataset = folder / "dataset" if (folder / "dataset").is_dir() else folder
    path = dataset / PROMPTS_NAME
    if not path.is_file():
        advice = (
            "Give a clone of https://github.com/google/dreambooth, or a folder like its dataset"
        )
        missing = (
            f"there is no {PROMPTS_NAME} in it" if folder.is_dir() else "there is no such folder"
        )
        raise DataError(str(folder), [f"{missing}. {advice}"])
    classes, templates = read_prompts(path)
    if unknown := [name for name in names if name not in classes]:
        raise DataError(
            str(path),
            [
                f"there is no subject {', '.join(unknown)}, which {names_from} names. The subjects "
                f"are: {', '.join(classes)}. Give some of these as --subjects"
            ],
        )
    subjects = [
        _subject(dataset / name, class_name, templates[class_name in LIVE_CLASSES])
        for name, class_name in classes.items()
        if not names or name in names
    ]
    if problems := [
        f"{s.name}: {'no image in it' if s.folder.is_dir() else 'there is no such folder'}"
        for s in subjects
        if not s.folder.is_dir() or not s.images
    ]:
        raise DataError(str(dataset), problems)
    return subjects


def _subject(folder: Path, class_name: str, templates: tuple[str, ...]) -> Subject:
    split = (folder / "train").is_dir() and (folder / "held_out").is_dir()
    train, held_out = (folder / "train", folder / "held_out") if split else (folder, None)
    return Subject(folder.name, class_name, train, templates, held_out)


def _images(folder: Path) -> list[Path]:
    return [folder / name for name in folder_images(path.name for path in folder.iterdir()).images]


def read_prompts(path: Path) -> tuple[dict[str, str], dict[bool, tuple[str, ...]]]:
    """Read ``prompts_and_classes.txt``.

    Returns:
        Subject -> class noun, and templates of prompts: for objects under False, for live subjects
        under True.

    Raises:
        DataError: lines are not understood, or a part is missing. The error lists all of them.
    """
    try:
        lines = read_regular(path, _MOST_BYTES).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(path), [f"cannot be read as UTF-8 text: {error}"]) from error
    classes: dict[str, str] = {}
    templates: dict[bool, list[str]] = {False: [], True: []}
    part: bool | str | None = None  # the table's head, or whether the prompts are for live subjects
    problems = []
    for number, line in enumerate(map(str.strip, lines), 1):
        name, _, class_name = line.partition(",")
        prompt = _PROMPT.fullmatch(line)
        if line in _PARTS or line == _TABLE_HEAD:
            part = _PARTS.get(line, line)
        elif line in _BETWEEN:
            part = None if line == "Prompts" else part
        elif part == _TABLE_HEAD and class_name and _is_folder(name) and name not in classes:
            classes[name] = class_name
        elif isinstance(part, bool) and prompt and _takes_two(prompt["template"]):
            templates[part].append(prompt["template"])
        else:
            problems.append(f"line {number} is not understood: {line}")
    if not classes:
        problems.append(f"there are no subjects. List them below a line {_TABLE_HEAD!r}")
    for heading, live in _PARTS.items():
        if not templates[live]:
            problems.append(f"there are no prompts below {heading!r}")
    if problems:
        raise DataError(str(path), problems)
    return classes, {live: tuple(found) for live, found in templates.items()}


def _is_folder(name: str) -> bool:
    """Return whether a subject's name can be the name of a folder, here and in a run's folder."""
    if name in ("", ".", "..") or len(name.encode()) > _LONGEST_NAME:
        return False
    return name.isprintable() and "/" not in name and "\\" not in name


def _takes_two(template: str) -> bool:
    """Return whether the template takes a token and a class noun, and nothing else."""
    return "{0}" in template and "{1}" in template and len(re.findall(r"[{}]", template)) == 4
