"""The options of a run: read from a command line, a file or a suite, and kept in its folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ..tensor_files import replacing
from ..training.config import TrainingConfig
from ..training.config_checks import ConfigError
from ..training.option_parsing import arguments_of, parse_options
from .options import BENCHMARK_GROUPS, SET_BY_THE_BENCHMARK, training_groups
from .settings import BenchmarkSettings

SETTINGS_NAME = "benchmark.yaml"
ROOT = Path(__file__).parents[2]
SUITES = {"tiny": "samples/configs/benchmark_tiny.yaml"}
#: What may differ between two commands of one run: they add units to it, or change none.
_FREE = {
    *("methods", "seeds", "subjects", "title", "keep_adapters", "retry_failed", "report_only"),
    *("output_dir", "suite", "config", "cache_dir", "dataloader_num_workers", "latent_cache_dir"),
}


def parse_settings(argv: Sequence[str] | None = None) -> BenchmarkSettings:
    """Read the options from a command line, a suite, and the YAML file of ``--config``.

    Raises:
        ConfigError: see ``option_parsing.parse_options``; a suite that is not there.
    """
    groups = (*BENCHMARK_GROUPS, *training_groups())
    said = {name: f"is not for the benchmark: {why}" for name, why in SET_BY_THE_BENCHMARK.items()}
    parse = partial(parse_options, groups, not_carried=said, prog="gralora benchmark")
    options = parse(argv)
    if options["suite"]:
        options = parse(argv, before=_suite_arguments(groups, options["suite"]))
    if options["report_only"] and options["config"] is None:
        kept = Path(options["output_dir"]) / SETTINGS_NAME
        if not kept.is_file():
            raise ConfigError([f"--report_only: there is no {kept}. Give a run's --output_dir"])
        given = list(sys.argv[1:] if argv is None else argv)
        options = parse(["--config", str(kept), *given])
    own = {f.name for group in BENCHMARK_GROUPS for f in fields(group)}
    training = {name: value for name, value in options.items() if name not in own}
    return BenchmarkSettings(
        **{name: value for name, value in options.items() if name in own},
        training=TrainingConfig(**{**training, "config": None}, report_to="none"),
    )


def _suite_arguments(groups: Sequence[type], name: str) -> list[str]:
    """The options of a suite, its paths from wherever the command is run."""
    path = ROOT / SUITES[name]
    if not path.is_file():
        raise ConfigError(
            [
                f"--suite {name}: there is no {path}. It is part of the repository, not of the "
                "installed package: clone it, and install it by `pip install -e .`"
            ]
        )
    return [_from_here(argument) for argument in arguments_of(groups, path)]


def _from_here(text: str) -> str:
    """A path below samples/, also behind the name of an option or encoder, from where one is."""
    name, equals, source = text.rpartition("=")
    is_path = source.startswith("samples/")
    return f"{name}{equals}{os.path.relpath(ROOT / source)}" if is_path else text


def check_same_run(settings: BenchmarkSettings) -> None:
    """Check that the run's folder has no units of other options.

    Raises:
        ConfigError: it has, and units of both would be mixed.
    """
    _earlier(settings)


def write_down(settings: BenchmarkSettings) -> None:
    """Keep the options in the run's folder, to be read again with ``--config``.

    Raises:
        ConfigError: as ``check_same_run``; the folder cannot be written to.
    """
    folder, record = settings.folder, settings.record()
    if earlier := _earlier(settings):
        for name in ("methods", "seeds", "subjects"):  # what was asked for before stays
            record[name] = _union(earlier.get(name), record.get(name))
        record = {name: value for name, value in record.items() if value is not None}
    text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=100)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / SETTINGS_NAME) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            [f"--output_dir {folder} cannot be written to ({error}). Give another"]
        ) from error


def _earlier(settings: BenchmarkSettings) -> dict[str, Any]:
    """The options kept in the run's folder; none if there are none.

    Raises:
        ConfigError: they are others than these.
    """
    path, record = settings.folder / SETTINGS_NAME, settings.record()
    if not path.exists():
        return {}
    earlier = parse_settings(["--config", str(path)]).record()
    if differing := sorted(
        name for name in {*earlier, *record} - _FREE if earlier.get(name) != record.get(name)
    ):
        raise ConfigError(
            [
                f"--{name} is {record.get(name, 'its default')}, but "
                f"{earlier.get(name, 'its default')} in {path}: units of both would be "
                "mixed. Give another --output_dir, or the same option"
                for name in differing
            ]
        )
    return earlier


def _union(before: list[Any] | None, now: list[Any] | None) -> list[Any] | None:
    """Both, in order; None, which stands for all, if one is None."""
    if before is None or now is None:
        return None
    return [*before, *(value for value in now if value not in before)]
