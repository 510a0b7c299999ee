"""The parts of the rehearsal by name, such as ``training/flux/cached`` or ``export``."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from gralora_diffusion.training.runtime.acceleration import accelerate_left_as_it_was
from tests.models import PIPELINES
from tests.rehearsal import adapters, commands, more_training, planted, training
from tests.rehearsal.device import DeviceMismatch, Gpu, pretended_gpu


@dataclass(frozen=True)
class Outcome:
    """A part and what is wrong with it; nothing if it passed."""

    name: str
    problems: list[str]


def all_parts() -> dict[str, Callable[[Gpu, Path, dict[str, Any]], Iterator[str]]]:
    """Return name -> what yields the problems of a part."""
    found: dict[str, Callable[[Gpu, Path, dict[str, Any]], Iterator[str]]] = {"device": _device}
    for family in sorted(PIPELINES):
        for setting in training.SETTINGS:
            found[f"training/{family}/{setting}"] = partial(_training, family, setting)
    for kind in more_training.KINDS:
        found[f"training/{kind}"] = partial(more_training.rehearse, kind)
    found["stopped"] = lambda gpu, folder, changes: more_training.stopped(folder, changes)
    found["overflow"] = lambda gpu, folder, _: training.overflow(folder)
    for family in sorted(PIPELINES):
        for placement in adapters.PLACEMENTS:
            found[f"adapters/{family}/{placement}"] = partial(_adapters, family, placement)
    found["export"] = lambda gpu, folder, _: commands.export_verified(gpu, folder)
    found["sample"] = lambda gpu, folder, _: commands.generate(gpu, folder)
    found["benchmark"] = lambda gpu, folder, _: commands.trials(folder)
    for fault in planted.FAULTS:
        found[f"planted/{fault}"] = partial(_planted, fault)
    return found


def rehearse(names: list[str], changes: dict[str, Any]) -> Iterator[Outcome]:
    """Run parts one after the other; ``changes`` are options for all that train."""
    parts = all_parts()
    with TemporaryDirectory() as place:
        for name in names:
            folder = Path(place) / name.replace("/", "-")
            folder.mkdir()
            gc.collect()
            gc.freeze()  # what is imported by now is left out of the trainer's collections
            torch.manual_seed(0)
            problems = []
            with pretended_gpu() as gpu, accelerate_left_as_it_was():
                try:
                    problems += parts[name](gpu, folder, changes)
                except Exception as error:
                    problems.append(_described(error))
            yield Outcome(name, problems)


def _training(
    family: str, setting: str, gpu: Gpu, folder: Path, changes: dict[str, Any]
) -> Iterator[str]:
    return training.rehearse(family, setting, gpu, folder, changes)


def _adapters(
    family: str, placement: str, gpu: Gpu, folder: Path, changes: dict[str, Any]
) -> Iterator[str]:
    return adapters.rehearse(family, placement, folder)


def _planted(fault: str, gpu: Gpu, folder: Path, changes: dict[str, Any]) -> Iterator[str]:
    return planted.rehearse(fault, gpu, folder)


def _described(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{frame.filename}:{frame.lineno}" for frame in frames]
    lines = [line for line in lines if "/torch/" not in line]
    return f"{type(error).__name__}: {str(error)[:600]}\n    " + "\n    ".join(lines[-8:])


def _device(gpu: Gpu, folder: Path, changes: dict[str, Any]) -> Iterator[str]:
    """The pretended GPU itself refuses what a real one refuses."""
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    if there.device != torch.device("cuda:0") or not there.is_cuda:
        yield f"a tensor for the GPU is on {there.device}"
    refused: dict[str, Callable[[], object]] = {
        "tensors of two devices": lambda: there + here,
        "indices of another device": lambda: here[torch.zeros(1, dtype=torch.long, device="cuda")],
        "a generator of another device": lambda: torch.randn(
            3, device="cuda", generator=torch.Generator()
        ),
    }
    for what, call in refused.items():
        try:
            call()
        except DeviceMismatch:
            continue
        except RuntimeError as error:  # torch's own
            if "generator" in str(error):
                continue
            raise
        yield f"{what} are not refused"
    if not torch.equal((there * 2 + 1).cpu(), torch.full((3,), 3.0)):
        yield "the values are wrong"
