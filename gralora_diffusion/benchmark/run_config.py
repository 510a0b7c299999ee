"""The options of a run: read from a command line, a file or a suite, and saved in its folder."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import yaml

from gralora_diffusion.io.bundled import config_names, samples_folder
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.file_names import public_name, real_path
from gralora_diffusion.io.tensor_files import replacing
from gralora_diffusion.options.fields import MayDiffer, Place, in_each, options_with
from gralora_diffusion.options.parsing import arguments_of, read_options
from gralora_diffusion.training.config.other_programs import OTHER_NAMES
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.runtime.folder_lock import BENCHMARK_NAME, CONFIG_NAME

from .options import BENCHMARK_GROUPS, set_by_benchmark, training_groups
from .settings import BenchmarkSettings

logger = logging.getLogger(__name__)

SETTINGS_NAME = BENCHMARK_NAME
#: Name of a suite -> its file of options in the bundled samples.
SUITES = {
    "tiny": "configs/benchmark_tiny.yaml",
    "peft-image-gen": "configs/benchmark_peft_image_gen.yaml",
}
#: Options that the first command of a run decides for all later ones, also by not giving them.
DECIDED_ONCE = ("seeding", "endpoint", "comparisons")


def _places() -> dict[str, Place]:
    """Return the options of the benchmark and of the trainer that are a file or folder."""
    return options_with(TrainingConfig, Place) | options_with(BenchmarkSettings, Place)


def _free() -> set[str]:
    """Return the options that may differ between two commands of one run.

    They add trials to it, or change none.
    """
    may = options_with(TrainingConfig, MayDiffer) | options_with(BenchmarkSettings, MayDiffer)
    return {name for name, between in may.items() if between.commands}


def parse_settings(argv: Sequence[str] | None = None) -> BenchmarkSettings:
    """Read the options from a command line, a suite, and the YAML file of ``--config``.

    Methods and seeds that none of them sets are those saved in the run's folder.

    Raises:
        ConfigError: an option has a problem, or the suite does not exist.
    """
    options = _parsed(argv)
    path = Path(options["output_dir"]) / SETTINGS_NAME
    reports = [name for name in ("report_only", "blind", "blind_answers") if options[name]]
    if reports and options["config"] is None:
        if not path.is_file():
            raise ConfigError([f"--{reports[0]}: there is no {path}. Give a run's --output_dir"])
        given = list(sys.argv[1:] if argv is None else argv)
        options = _parsed(["--config", str(path), *given])
    kept = _kept_in(path)
    if kept and (missing := [name for name in ("methods", "seeds") if options[name] is None]):
        options |= {name: list(getattr(kept, name)) for name in missing}
        some = "; ".join(f"{name} {' '.join(map(str, options[name]))}" for name in missing)
        logger.info("using the options saved in %s: %s", path, some)
    if kept:  # decided by the run's first command
        options |= {n: getattr(kept, n) for n in DECIDED_ONCE if options[n] is None}
    settings = _settings(options)
    if not kept:
        settings.declare()
    return settings


def _parsed(argv: Sequence[str] | None) -> dict[str, Any]:
    """Return every option's value by its name, from a command line and the files that it names.

    Raises:
        ConfigError: there are problems. The error lists those that ``BenchmarkSettings.check``
            finds, too.
    """
    groups = (*BENCHMARK_GROUPS, *training_groups())
    said = {name: f"cannot be set here: {why}" for name, why in set_by_benchmark().items()}
    read = partial(
        read_options,
        groups,
        other_names=OTHER_NAMES | said,
        prog="gralora benchmark",
        configs=config_names(benchmark=True),
        sources=("config", "suite"),
    )
    parsed = read(argv)
    given = parsed.values
    if name := given["suite"]:
        try:
            suite = samples_folder() / SUITES[name]
        except FileNotFoundError as error:
            raise ConfigError([f"--suite {name}: {error}"]) from error
        parsed = read(argv, before=arguments_of(groups, suite))
        theirs = []  # what of the suite is about other data or methods than the given ones
        if given["captioned_dir"] or given["dataset_name"]:
            theirs.append("protocols")
        if given["methods"]:
            theirs += ["endpoint", "comparisons"]
        parsed.values |= {name: given[name] for name in theirs}
    if parsed.problems:
        more = parsed.located(_settings(parsed.values).problems())
        raise ConfigError([*parsed.problems, *more])
    return parsed.values


def _settings(options: dict[str, Any]) -> BenchmarkSettings:
    own = {f.name for group in BENCHMARK_GROUPS for f in fields(group)}
    training = {name: value for name, value in options.items() if name not in own}
    return BenchmarkSettings(
        **{name: value for name, value in options.items() if name in own},
        training=TrainingConfig(**{**training, "config": None}, report_to="none"),
    )


def _kept_in(path: Path) -> BenchmarkSettings | None:
    """Return the options saved in this file, or None if it does not exist.

    Raises:
        ConfigError: the file cannot be used.
    """
    try:
        facts = path.stat()
    except OSError:
        return None
    return _read(path.absolute(), (facts.st_ino, facts.st_mtime_ns, facts.st_size))


@lru_cache(maxsize=1)  # read several times per command
def _read(path: Path, version: tuple[int, ...]) -> BenchmarkSettings:
    settings = _settings(_parsed(["--config", str(path)]))
    settings.seeding = settings.seeding or "shared"  # as in version 0.1, which had no other
    return settings


def check_same_run(settings: BenchmarkSettings) -> None:
    """Check that the run's folder has no trials with other options, and is not a training's.

    Raises:
        ConfigError: its trials have other options, so that both would be mixed, or it is a
            training's.
    """
    _earlier(settings)


def save_run_config(settings: BenchmarkSettings) -> None:
    """Save the options in the run's folder, so that ``--config`` can read them from anywhere.

    Raises:
        ConfigError: as ``check_same_run``, or the folder cannot be written to.
    """
    folder, record = settings.folder, resolve_paths(settings.record())
    if earlier := _earlier(settings):
        for name in ("methods", "seeds", "subjects"):  # earlier values are kept
            record[name] = _union(earlier.get(name), record.get(name))
        record = {name: value for name, value in record.items() if value is not None}
    text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=100)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / SETTINGS_NAME) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            [f"--output_dir {folder} cannot be written to ({error}). Give another folder"]
        ) from error


def _earlier(settings: BenchmarkSettings) -> dict[str, Any]:
    """Return the options saved in the run's folder, if there are any.

    Raises:
        ConfigError: they differ from these.
    """
    path = settings.folder / SETTINGS_NAME
    kept = _kept_in(path)
    if kept is None:
        if (settings.folder / CONFIG_NAME).exists():
            raise ConfigError(
                [
                    f"--output_dir {settings.output_dir!r} belongs to a training ({CONFIG_NAME}). "
                    "Give another folder"
                ]
            )
        if unknown := settings.undeclared_methods():
            raise ConfigError(unknown)
        return {}
    earlier, record = kept.record(), resolve_paths(settings.record())
    if differing := sorted(
        name
        for name in {*earlier, *record} - _free()
        if not _same(name, earlier.get(name), record.get(name))
    ):
        raise ConfigError(
            [
                f"--{name} is {record.get(name, 'its default')}, but "
                f"{earlier.get(name, 'its default')} in {path}: {_why_not(name)}. Give another "
                "--output_dir, or the same option"
                for name in differing
            ]
        )
    return earlier


def _why_not(name: str) -> str:
    """Return why an option cannot differ from an earlier command's."""
    if name in ("endpoint", "comparisons"):
        return "what a run decides is declared before its first trial"
    return "trials with both would be mixed"


def resolve_paths(record: dict[str, Any]) -> dict[str, Any]:
    """Return the options with absolute paths, which mean the same everywhere."""

    def placed(value: str, place: Place) -> str:
        return value if place.hub_id and not os.path.exists(value) else os.path.abspath(value)

    return _with_places(record, placed)


def with_absolute_paths(settings: BenchmarkSettings) -> BenchmarkSettings:
    """Return the same settings for a process with another working directory."""
    own = {f.name: getattr(settings, f.name) for group in BENCHMARK_GROUPS for f in fields(group)}
    default = TrainingConfig(report_to="none")
    training = {
        f.name: getattr(settings.training, f.name)
        for f in fields(TrainingConfig)
        if getattr(settings.training, f.name) != getattr(default, f.name)
    }
    placed = resolve_paths({**training, **own, "rates": None})  # which the methods have already
    return _settings(placed)


def public_paths(record: dict[str, Any]) -> dict[str, Any]:
    """Return the options with the names of files and folders in place of their paths."""

    def placed(value: str, place: Place) -> str:
        return public_name(value) if place.hub_id else real_path(value).name

    return _with_places(record, placed)


def _with_places(record: dict[str, Any], placed: Callable[[str, Place], str]) -> dict[str, Any]:
    """Return the options with each file, folder and Hub id replaced by what ``placed`` gives."""
    places = _places()

    def changed(name: str, value: Any) -> Any:
        place = places.get(name)
        return value if place is None else in_each(value, lambda path: placed(path, place))

    record = {name: changed(name, value) for name, value in record.items()}
    if "encoders" in record:
        pairs = (text.partition("=") for text in record["encoders"])
        encoder = Place(read=True, hub_id=True)
        record["encoders"] = [f"{n}={placed(source, encoder)}" for n, _, source in pairs]
    return record


def _same(name: str, kept: Any, given: Any) -> bool:
    """Return whether two values mean the same; ``given`` comes from :func:`resolve_paths`."""
    if name == "encoders" and kept and given and len(kept) == len(given):
        pairs = [(k.partition("="), g.partition("=")) for k, g in zip(kept, given, strict=True)]
        return all(k[0] == g[0] and _same_place(k[2], g[2]) for k, g in pairs)
    if name in _places() and kept and given:
        return _same_place(kept, given)
    return bool(kept == given)


def _same_place(kept: str, given: str) -> bool:
    there, here = Path(kept), Path(given)
    if kept == given or real_path(there) == real_path(here):
        return True
    # saved on another machine, or moved: compared by name, which is what results record
    return there.is_absolute() and not there.exists() and here.exists() and there.name == here.name


def _union(before: list[Any] | None, now: list[Any] | None) -> list[Any] | None:
    """Return both lists in order, or None, which stands for all, if one is None."""
    if before is None or now is None:
        return None
    return [*before, *(value for value in now if value not in before)]
