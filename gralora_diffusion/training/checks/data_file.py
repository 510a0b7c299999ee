"""Checks of the sets in a data file: those of the options, with the values that each set has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.image_files import folder_images
from gralora_diffusion.training.config.data_file import DataSection, read_data_file
from gralora_diffusion.training.config.training_config import TrainingConfig

#: Options -> the problems with them, or warnings about them.
Check = Callable[[TrainingConfig], list[str]]


def data_file_problems(config: TrainingConfig, check: Check) -> list[str]:
    """Return the problems with a data file, each with its line; none without a data file.

    Args:
        check: of the options of a set. What it says about the run's options is left out.
    """
    if config.data_config is None:
        return []
    try:
        sections = read_data_file(config)
    except ConfigError as error:
        return error.problems
    problems = list(_contradictions(config, sections))
    return problems + _of_sections(config, sections, check)


def data_file_warnings(config: TrainingConfig, check: Check) -> list[str]:
    """Return the warnings about a data file that has no problem."""
    if config.data_config is None:
        return []
    return _of_sections(config, read_data_file(config), check)


def _of_sections(
    config: TrainingConfig, sections: Sequence[DataSection], check: Check
) -> list[str]:
    found: list[str] = []
    others = {k: v for s in sections if s.role != "train" for k, v in s.changes.items()}
    prepared = replace(config, **others)
    of_run, of_others = set(check(config)), set(check(prepared))
    for section in sections:
        found += section.problems
        if section.role != "train":
            found += section.located(sorted(of_others - of_run))
        elif {"instance_data_dir", "dataset_name"} & section.changes.keys():
            own = check(replace(prepared, data_config=None, **section.changes))
            found += section.located([p for p in own if p not in of_run | of_others])
    return list(dict.fromkeys(found))


def _contradictions(config: TrainingConfig, sections: Sequence[DataSection]) -> Iterator[str]:
    """Report options of the run that a data file takes the place of."""
    for name in ("instance_data_dir", "dataset_name"):
        if value := getattr(config, name):
            yield (
                f"--data_config is {config.data_config!r} and --{name} is {value!r}, but the data "
                "file names the images. Leave one of them out"
            )
    for section in sections:
        folder = section.changes.get("class_data_dir")
        wanted = "num_class_images" in section.parsed.values
        if folder and not wanted and not _has_images(Path(folder)):
            yield (
                f"{section.parsed.place}: the folder {folder!r} has no image. Put images of the "
                "class into it, or give num_class_images to generate that many"
            )
    defaults = {f.name: f.default for f in fields(config)}
    for section in sections:
        if section.role == "train":
            continue
        for name, value in section.changes.items():
            given = getattr(config, name)
            if given not in (defaults[name], value):
                yield (
                    f"--{name} is {given!r}, but a set of {config.data_config} has the role "
                    f"{section.role}. Leave one of them out"
                )


def _has_images(folder: Path) -> bool:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return bool(folder_images(names).images)
