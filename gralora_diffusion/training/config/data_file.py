"""The sets of images that a run trains on, with settings of their own.

A data file is a YAML list of sets. A set has options of the trainer, some of them under a shorter
name, and the few of ``SetOptions``. What it does not give, it has from the run. A run without a
data file has one set, which gives nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from math import isclose
from pathlib import Path
from typing import Any

from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.file_names import public_name, real_path
from gralora_diffusion.options.command_parser import must_be, without_hyphens
from gralora_diffusion.options.fields import choices_of, value_problems
from gralora_diffusion.options.parsing import ParsedOptions, read_sections, read_text

from .data_options import SetOptions
from .other_programs import OTHER_NAMES
from .training_config import OPTION_GROUPS, TrainingConfig, names_in_set

_MOST_SETS = 1000
#: After so many problems no further set is checked: each may need a search for similar names.
_MOST_PROBLEMS = 100


#: Settings of other programs' data files -> how the message goes on after them.
_OTHER_NAMES = {
    **dict.fromkeys(
        ("instance_data_dir", "folder_path", "image_dir", "path", "class_data_dir"),
        "is called --folder here",
    ),
    **dict.fromkeys(("dataset_name", "dataset_path"), "is called --dataset here"),
    **dict.fromkeys(
        ("instance_prompt", "class_prompt", "class_tokens", "default_caption"),
        "is called --prompt here",
    ),
    **dict.fromkeys(("num_repeats", "balancing"), "is called --repeats here"),
    **dict.fromkeys(("is_reg", "is_prior"), "is written as --role prior here"),
    "prior_loss_weight": "is called --loss_weight here",
    **dict.fromkeys(("flip_aug", "flip_x", "enable_random_flip"), "is called --random_flip here"),
    "probability": "is called --share here, and the shares of all sets are compared",
}


@dataclass(frozen=True)
class ImageSet:
    """A set of images to train on; without arguments, that of a run without a data file.

    Attributes:
        changes: option -> its value for this set, where that may differ from the run's.
        share: fraction of the run's samples; None to follow from the number of images and repeats.
        loss_weight: relative to other sets.
        place: "file:line" of the data file.
    """

    changes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    share: float | None = None
    loss_weight: float = 1.0
    place: str | None = None

    def options(self, config: TrainingConfig) -> TrainingConfig:
        """Return the options of a run, as they are for this set."""
        return replace(config, data_config=None, **self.changes) if self.changes else config

    def name(self, config: TrainingConfig) -> str:
        """Return the name of its folder or dataset."""
        own = self.options(config)
        if own.instance_data_dir:
            return real_path(own.instance_data_dir).name
        return public_name(str(own.dataset_name))

    def facts(self) -> list[Any]:
        """Return what it adds to what the options decide, as JSON values."""
        return [self.share, self.loss_weight, sorted(self.changes.items())]


#: The only set of a run without a data file.
ALL_IMAGES = ImageSet()


def with_data_file(config: TrainingConfig) -> TrainingConfig:
    """Return the options with those that the data file's sets of other roles stand for.

    Each held-out set has options of its own; the run's only say that there is one, and name the
    folder of the first.

    Raises:
        ConfigError: as for ``sound_sections``.
    """
    if config.data_config is None:
        return config
    for section in sound_sections(config, "prior"):
        config = replace(config, **section.changes)
    for section in sound_sections(config, "held_out")[:1]:
        folder = config.held_out_data_dir or section.changes["held_out_data_dir"]
        config = replace(config, held_out_data_dir=folder)
    return config


def without_held_out_sets(config: TrainingConfig) -> TrainingConfig:
    """Return the options without what ``with_data_file`` says of held-out sets.

    Each of them is checked with its own options.
    """
    try:
        sections = read_data_file(config) if config.data_config else []
    except ConfigError:  # which is reported with the file
        return config
    folders = [section.changes.get("held_out_data_dir") for section in sections]
    of_file = config.held_out_data_dir in filter(None, folders)
    return replace(config, held_out_data_dir=None) if of_file else config


@dataclass(frozen=True)
class DataSection:
    """A set of a data file as it was read.

    Attributes:
        changes: option -> value.
        problems: of reading it, each with its line.
    """

    role: str
    changes: Mapping[str, Any]
    share: float | None
    loss_weight: float
    problems: tuple[str, ...]
    parsed: ParsedOptions

    @property
    def image_set(self) -> ImageSet:
        return ImageSet(self.changes, self.share, self.loss_weight, self.parsed.place)

    def located(self, problems: Sequence[str]) -> list[str]:
        """Return problems that name options as the file does, each with its line."""
        return [without_hyphens(text) for text in self.parsed.located(self.renamed(problems))]

    def renamed(self, problems: Sequence[str]) -> list[str]:
        """Return problems that name options as the file does."""
        names = names_in_set(self.role)
        return [
            re.sub(r"--(\w+)", lambda found: f"--{names.get(found[1], found[1])}", problem)
            for problem in problems
        ]


def sound_sections(config: TrainingConfig, role: str) -> list[DataSection]:
    """Return the sets of a role in a data file that has no problem, in the file's order.

    Raises:
        ConfigError: it has problems. The error lists all of them, each with its line.
    """
    sections = read_data_file(config)
    if problems := [problem for section in sections for problem in section.problems]:
        raise ConfigError(problems)
    return [section for section in sections if section.role == role]


def read_data_file(config: TrainingConfig) -> Sequence[DataSection]:
    """Read the sets of the data file, and check what each says by itself and their shares.

    Raises:
        ConfigError: it cannot be read, or is no list of sets.
    """
    path = Path(str(config.data_config))
    return _sections(path, read_text(path, "--data_config"))


@lru_cache(maxsize=4)  # a run asks for its sets several times before it begins
def _sections(path: Path, text: str) -> Sequence[DataSection]:
    called = {f.name: f.name for f in fields(SetOptions)}
    for role in choices_of(SetOptions)["role"]:  # which share some names
        for name, there in names_in_set(role).items():
            if there not in called.values():
                called[name] = there
    parsed = read_sections(
        (SetOptions, *OPTION_GROUPS),
        path,
        text,
        "--data_config",
        called=called,
        other_names={**_other_names(set(called.values())), **_OTHER_NAMES},
    )
    if len(parsed) > _MOST_SETS:
        raise ConfigError([f"{path}: it has {len(parsed):,} sets, of {_MOST_SETS:,} at most"])
    sections = []
    for part in parsed:
        sections.append(_section(part))
        if sum(len(section.problems) for section in sections) >= _MOST_PROBLEMS:
            break
    if any(section.problems for section in sections):
        return sections
    trained = [section for section in sections if section.role == "train"]
    if not trained:
        raise ConfigError([f"{path}: no set has the role train, so there is nothing to learn"])
    priors = [section for section in sections if section.role == "prior"]
    more = {id(s): problem for s, problem in (*_unmet_shares(path, trained), *_further(priors))}
    return [
        replace(section, problems=(more[id(section)],)) if id(section) in more else section
        for section in sections
    ]


def _other_names(known: set[str]) -> dict[str, str]:
    """Return what other programs call options that sets have."""
    return {
        name: text
        for name, text in OTHER_NAMES.items()
        if name not in known and (found := re.match(r"is called --(\w+) here", text))
        if found[1] in known
    }


def _section(parsed: ParsedOptions) -> DataSection:
    given, problems = dict(parsed.values), list(parsed.problems)
    own = SetOptions(**{f.name: given.pop(f.name) for f in fields(SetOptions) if f.name in given})
    problems += parsed.located([*value_problems(own)])
    names = {there: name for name, there in names_in_set(own.role).items()}
    more = list(_misplaced(own, given, parsed, names))
    problems += [without_hyphens(text) for text in parsed.located(more)]
    changes = {names[there]: value for there, value in given.items() if there in names}
    if own.role == "prior":
        changes |= {
            "with_prior_preservation": True,
            "prior_source": "images",
            # those that are in the folder are enough
            "num_class_images": changes.get("num_class_images", 1),
            "prior_loss_weight": own.loss_weight,
        }
    shown = tuple(map(without_hyphens, problems))
    return DataSection(own.role, changes, own.share, own.loss_weight, shown, parsed)


def _misplaced(
    own: SetOptions, given: Mapping[str, Any], parsed: ParsedOptions, names: Mapping[str, str]
) -> Iterator[str]:
    """Yield a problem for each setting that a set of this role does not have."""
    weighted = ["loss_weight"] if own.role != "held_out" else []
    for name in given:
        if name not in names:
            allowed = [*names, "role", *weighted]
            yield f"--{name} cannot be set for a set of role {own.role}; {must_be(name, allowed)}"
    places = [name for name in ("folder", "dataset") if given.get(name)]
    wanted = "--folder" + (" or --dataset" if "dataset" in names else "")
    unread = not (given or parsed.lines) or parsed.faulty & {"folder", "dataset"}
    if not places and not unread:
        yield f"the set has no {wanted}. Give the place of its images"
    if own.role == "train" and own.share is not None and "repeats" in given:
        yield "--share and --repeats exclude each other. Leave one out"
    refused = {"prior": ["share"], "held_out": ["share", "loss_weight"]}.get(own.role, [])
    for name in refused:
        if name in parsed.values:
            yield f"--{name} cannot be set for a set of role {own.role}. Leave it out"


def _unmet_shares(path: Path, sections: Sequence[DataSection]) -> Iterator[tuple[DataSection, str]]:
    """Yield a problem with shares that cannot all be met, of the first set that has one."""
    shares = [section.share for section in sections if section.share is not None]
    if not shares:
        return
    total = sum(shares)
    first = next(section for section in sections if section.share is not None)
    where = first.parsed.lines.get("share", str(path))
    if len(shares) == len(sections) and not isclose(total, 1, abs_tol=1e-6):
        yield (
            first,
            f"{where}: every set has a share, and their sum is {total:g}; it must be 1. Leave out "
            "the share of one set, which then gets the rest",
        )
    elif len(shares) < len(sections) and total > 1 - 1e-6:
        yield (
            first,
            f"{where}: the shares have the sum {total:g}; it must be below 1, since other sets "
            "have none and get the rest",
        )


def _further(priors: Sequence[DataSection]) -> Iterator[tuple[DataSection, str]]:
    """Yield a problem for each prior but the first, since a run has one."""
    for section in priors[1:]:
        yield (
            section,
            f"{section.parsed.place}: a second set of role prior. Put its images into the folder "
            f"of the first one ({priors[0].parsed.place})",
        )
