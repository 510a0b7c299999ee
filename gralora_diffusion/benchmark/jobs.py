"""What the machines of a cluster send each other: a job, its files, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from gralora_diffusion.benchmark.evaluation.results import Failure, TrialResult
from gralora_diffusion.io.tensor_files import replacing

from .node_check import Requirements
from .settings import BenchmarkSettings

#: A file's path, relative to the folder of the run or of the trial -> its content.
Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Job:
    """A trial, or images that several trials share.

    Attributes:
        settings: with absolute paths.
        requirements: what the machine must have.
        subject: of the task.
        digest: of the task where the benchmark was started.
        method: of the trial; None to generate shared images.
        share: the folder of the shared images to generate, relative to the run's folder.
    """

    settings: BenchmarkSettings
    requirements: Requirements
    subject: str
    digest: str
    seed: int
    method: str | None = None
    share: str | None = None


@dataclass(frozen=True)
class Reply:
    """What a machine made of a job.

    Attributes:
        node: name of the machine.
        kind: "done"; "failed", which is the trial's; "lost", where another machine may do better;
            "disk", the same, where the machine's disk is full or gone; "refused", if this machine
            cannot run any job.
        failure: why it failed or was lost.
        problems: why the machine is refused.
        result: of a trial.
        files: of the trial, or the shared images with paths relative to the run's folder.
        warnings: logged meanwhile.
    """

    node: str
    kind: Literal["done", "failed", "lost", "disk", "refused"]
    failure: Failure | None = None
    problems: tuple[str, ...] = ()
    result: TrialResult | None = None
    files: Files = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def read_files(folder: Path) -> Files:
    """Return all files in a folder by their paths relative to it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def write_files(files: Files, folder: Path) -> None:
    """Write files into a folder, each of which appears when it is complete.

    Raises:
        ValueError: a path leads out of the folder.
    """
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name:
            raise ValueError(f"{name!r} is not a path within a folder")
    for name, data in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, sync=False) as temporary:
            temporary.write_bytes(data)
