"""Checks of the sets in a data file: those of the options, with the values that each set has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.file_names import real_path
from gralora_diffusion.training.config.data_file import DataSection, read_data_file
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.captions import count_images

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
    prepared, seen = config, set(check(config))
    of_others: dict[int, list[str]] = {}
    for number, section in enumerate(sections):
        if section.role != "train":
            own = replace(config, **section.changes)
            of_others[number] = [text for text in check(own) if text not in seen]
            if section.role == "prior":
                prepared = own
    seen.update(*of_others.values())
    found: list[str] = []
    for number, section in enumerate(sections):
        found += section.problems
        if section.role != "train":
            found += section.located(of_others[number])
        elif {"instance_data_dir", "dataset_name"} & section.changes.keys():
            own = replace(prepared, data_config=None, **section.changes)
            found += section.located([text for text in check(own) if text not in seen])
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
        if folder and not wanted and not (Path(folder).is_dir() and count_images(Path(folder))):
            yield (
                f"{section.parsed.place}: the folder {folder!r} has no image. Put images of the "
                "class into it, or give num_class_images to generate that many"
            )
    yield from _held_out_contradictions(config, sections)
    defaults = {f.name: f.default for f in fields(config)}
    for section in sections:
        if section.role != "prior":
            continue
        for name, value in section.changes.items():
            given = getattr(config, name)
            if given not in (defaults[name], value):
                yield (
                    f"--{name} is {given!r}, but a set of {config.data_config} has the role "
                    f"{section.role}. Leave one of them out"
                )


def _held_out_contradictions(
    config: TrainingConfig, sections: Sequence[DataSection]
) -> Iterator[str]:
    """Report images that are measured and trained on, or that nothing names."""
    measured = [section for section in sections if section.role == "held_out"]
    folders = [section.changes.get("held_out_data_dir") for section in measured]
    given = config.held_out_data_dir
    if measured and given not in (None, *folders):
        yield (
            f"--held_out_data_dir is {given!r}, but a set of {config.data_config} has the role "
            "held_out. Leave one of them out"
        )
    if config.stop_when and not (measured or given):
        yield (
            f"--stop_when {config.stop_when} needs images that are not trained on. Give a set of "
            f"{config.data_config} the role held_out, or give --held_out_data_dir"
        )
    trained = {
        real_path(folder): section
        for section in sections
        if section.role == "train" and (folder := section.changes.get("instance_data_dir"))
    }
    for section, folder in zip(measured, folders, strict=True):
        if folder and (other := trained.get(real_path(folder))):
            yield (
                f"{section.parsed.lines.get('folder', section.parsed.place)}: folder is {folder!r},"
                f" which the set at {other.parsed.place} trains on. Held-out images are never "
                "trained on: give a folder with other images of the subject"
            )
