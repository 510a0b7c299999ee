"""The result of a trial, ``result.json``: written whole or not at all, checked when it is read."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from gralora_diffusion.adapters.placement.layer_config import is_finite_number
from gralora_diffusion.io.json_files import read_object
from gralora_diffusion.io.tensor_files import replacing

FORMAT = 1
#: Fields that have another key in files of format 1.
FILE_KEYS = {"images": "pictures", "generation_seconds": "draw_seconds"}
RESULT_NAME = "result.json"
TRIALS_FOLDER = "units"
#: No measurement and no count is larger. Means, variances and cubes of such numbers are finite.
_LARGEST, _MOST = 1e60, 2**63 - 1


class ResultFileError(ValueError):
    """A result file cannot be used; the message says where and why."""


class TrialKey(NamedTuple):
    """The identity of a trial."""

    protocol: str
    subject: str
    method: str
    seed: int

    @property
    def path(self) -> PurePosixPath:
        """The trial's folder within the folder of a run."""
        return PurePosixPath(
            TRIALS_FOLDER, self.protocol, self.subject, self.method, f"seed{self.seed}"
        )

    def __str__(self) -> str:
        return f"{self.protocol}, {self.subject}, {self.method}, seed {self.seed}"


@dataclass(frozen=True)
class PromptResult:
    """The images of one prompt.

    Attributes:
        images: files, relative to the trial's folder and within it.
        scores: means over these images.
        real: the real image with the prompt as its caption, relative to the trial's folder or
            absolute; None if there is none.
    """

    prompt: str
    images: tuple[str, ...]
    scores: Mapping[str, float] = field(default_factory=dict)
    real: str | None = None


#: Measures of a layer at a step -> what they say. The outlier is the input channel with the largest
#: norm in the step; shares of its column are relative to an even share, one of all input channels.
ALIGNMENT = {
    "full_share": "the outlier's share of the squared norm of the full gradient",
    "gradient_share": "the same share of the method's gradient",
    "step_share": "the same share of the optimizer's step",
    "gradient_cosine": "cosine of the method's gradient with the full gradient",
    "step_cosine": "cosine of the optimizer's step with the full gradient",
}


@dataclass(frozen=True)
class Diagnostics:
    """Data on the mechanism that the paper claims, logged while a trial was trained.

    Attributes:
        gradient_norms: layer -> {"steps": [s], "norms": [s][k][k]}: at each of these steps, the
            Frobenius norms of the k x k blocks of the gradient of the dense update. Rows are
            output blocks, columns are input blocks.
        effective_rank: layer -> effective rank of the learned update.
        input_outliers: layer -> the largest norm of an input channel over the median one.
        stable_rank: layer -> stable rank of the learned update.
        step_norms: as ``gradient_norms``, of what the optimizer's step took from the dense update.
        alignment: layer -> name in ``ALIGNMENT`` -> {"steps": [s], "values": [s]}.
    """

    gradient_norms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    effective_rank: Mapping[str, float] = field(default_factory=dict)
    input_outliers: Mapping[str, float] = field(default_factory=dict)
    stable_rank: Mapping[str, float] = field(default_factory=dict)
    step_norms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    alignment: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialResult:
    """A trial that was trained, sampled and evaluated.

    Attributes:
        parameters: number of trained parameters.
        update_rank: the maximum rank of the method's update of a layer; None for full rank.
        steps: optimizer steps.
        train_seconds, generation_seconds: wall clock.
        peak_memory_gib: of the device; None if it was not measured.
        scores: name -> value; the names depend on protocol and options.
        layers: number of adapted layers; None if the method adapts none, or it is not known.
        lowered_k: k -> number of layers whose widths require this k instead of the method's.
        update_norm: the Frobenius norm of the dense updates of all layers; None if unknown.
        folder: of the trial; not part of the file.
    """

    protocol: str
    subject: str
    method: str
    seed: int
    parameters: int
    update_rank: int | None
    steps: int
    train_seconds: float
    generation_seconds: float
    peak_memory_gib: float | None
    scores: Mapping[str, float]
    prompts: tuple[PromptResult, ...] = ()
    mechanism: Diagnostics | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    layers: int | None = None
    lowered_k: Mapping[int, int] = field(default_factory=dict)
    update_norm: float | None = None
    folder: Path | None = field(default=None, compare=False)

    @property
    def key(self) -> TrialKey:
        return TrialKey(self.protocol, self.subject, self.method, self.seed)


@dataclass(frozen=True)
class Unreadable:
    """A result file that cannot be used, so that the trial has to be repeated."""

    path: Path
    reason: str


class Failure(NamedTuple):
    """Why a trial failed: the kind of error with its message, and where it was raised."""

    error: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describe an error that is being handled."""
        return cls(f"{type(error).__name__}: {error}", traceback.format_exc())


def write_result(result: TrialResult, folder: Path) -> Path:
    """Write ``result.json`` into the trial's folder, where it appears when it is complete.

    Raises:
        ResultFileError: the result could not be read back, for example because a score is NaN.
    """
    path = folder / RESULT_NAME
    content = {"format": FORMAT, **_plain(result)}
    _result(content, path)
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def read_result(path: Path) -> TrialResult:
    """Read one ``result.json``.

    Raises:
        ResultFileError: it does not exist, is truncated, or does not contain a result.
    """
    try:
        content = read_object(path)
    except (OSError, ValueError) as error:
        raise ResultFileError(f"{path}: not readable as JSON ({error})") from error
    return _result(content, path)


def read_results(output: Path) -> tuple[list[TrialResult], list[Unreadable]]:
    """Read all trials in a run's folder; return the usable results and the unusable files.

    A file that belongs to another trial than its folder is unusable, too, so that a copied folder
    does not count twice. Trials without a file are not finished and not named.
    """
    results, unreadable = [], []
    for path in sorted((output / TRIALS_FOLDER).glob(f"*/*/*/*/{RESULT_NAME}")):
        try:
            result = read_result(path)
            place = PurePosixPath(path.parent.relative_to(output).as_posix())
            if result.key.path != place:
                raise ResultFileError(
                    f"{path}: belongs to another trial ({result.key}) than its folder"
                )
        except ResultFileError as error:
            unreadable.append(Unreadable(path, str(error).removeprefix(f"{path}: ")))
        else:
            results.append(result)
    return results, unreadable


def _plain(value: Any) -> Any:
    """Turn dataclasses into dictionaries and tuples into lists, without the folder."""
    if isinstance(value, (TrialResult, PromptResult, Diagnostics)):
        names = [f.name for f in fields(value) if f.name != "folder"]
        return {FILE_KEYS.get(name, name): _plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


class _Reader:
    """Reads the entries of a JSON object and checks their types."""

    def __init__(self, content: Any, path: Path, where: str = "") -> None:
        self.path, self.where = path, where
        self.content: dict[str, Any] = content
        if not isinstance(content, dict):
            raise self.error("", "an object", content)

    def error(self, name: str, wanted: str, got: Any) -> ResultFileError:
        place = f"{self.where}.{name}".strip(".") or "the file"
        return ResultFileError(f"{self.path}: {place} must be {wanted}, but is {got!r:.80}")

    def take(self, name: str) -> Any:
        if name not in self.content:
            place = f"{self.where}.{name}".strip(".")
            raise ResultFileError(f"{self.path}: {place} is missing")
        return self.content[name]

    def text(self, name: str) -> str:
        if not isinstance(value := self.take(name), str) or not value:
            raise self.error(name, "text that is not empty", value)
        return value

    def count(self, name: str) -> int:
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
            wanted = "a whole number that is not negative and has 63 bits at most"
            raise self.error(name, wanted, value)
        return value

    def number(self, name: str) -> float:
        if not is_measured(value := self.take(name)):
            raise self.error(name, f"a finite number between -{_LARGEST:g} and {_LARGEST:g}", value)
        return float(value)

    def numbers(self, name: str) -> dict[str, float]:
        inner = self.inside(name)
        return {key: inner.number(key) for key in inner.content}

    def inside(self, name: str) -> _Reader:
        return _Reader(self.take(name), self.path, f"{self.where}.{name}".strip("."))

    def items(self, name: str) -> list[Any]:
        if not isinstance(value := self.take(name), list):
            raise self.error(name, "a list", value)
        return value


def _result(content: Any, path: Path) -> TrialResult:
    reader = _Reader(content, path)
    if (version := reader.take("format")) != FORMAT:
        raise reader.error("format", f"{FORMAT}, which this version reads", version)
    names = {name: reader.text(name) for name in ("protocol", "subject", "method")}
    for name, value in names.items():
        if value in (".", "..") or "/" in value or "\\" in value:
            raise reader.error(name, "the name of a folder", value)
    optional = {name: reader.take(name) for name in ("update_rank", "peak_memory_gib", "mechanism")}
    prompts = enumerate(reader.items("prompts"))
    versions = reader.inside("versions")
    return TrialResult(
        **names,
        seed=reader.count("seed"),
        parameters=reader.count("parameters"),
        update_rank=None if optional["update_rank"] is None else reader.count("update_rank"),
        steps=reader.count("steps"),
        train_seconds=reader.number("train_seconds"),
        generation_seconds=reader.number("draw_seconds"),
        peak_memory_gib=(
            None if optional["peak_memory_gib"] is None else reader.number("peak_memory_gib")
        ),
        scores=reader.numbers("scores"),
        prompts=tuple(_prompt(_Reader(item, path, f"prompts[{i}]")) for i, item in prompts),
        mechanism=None if optional["mechanism"] is None else _mechanism(reader.inside("mechanism")),
        settings=_settings(reader),
        versions={name: versions.text(name) for name in versions.content},
        # the first files did not have these
        layers=None if reader.content.get("layers") is None else reader.count("layers"),
        lowered_k=_lowered_k(reader) if "lowered_k" in reader.content else {},
        update_norm=(
            None if reader.content.get("update_norm") is None else reader.number("update_norm")
        ),
        folder=path.parent,
    )


def _settings(reader: _Reader) -> dict[str, Any]:
    settings = reader.inside("settings").content
    try:
        json.dumps(settings, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ResultFileError(
            f"{reader.path}: settings cannot be written as JSON ({error})"
        ) from error
    return settings


def _lowered_k(reader: _Reader) -> dict[int, int]:
    counts = reader.inside("lowered_k")
    if not all(re.fullmatch("[1-9][0-9]{0,8}", k) for k in counts.content):
        raise reader.error("lowered_k", "numbers of layers by k", counts.content)
    return {int(k): counts.count(k) for k in counts.content}


def _prompt(reader: _Reader) -> PromptResult:
    images = reader.items("pictures")
    for name in images:
        parts = PurePosixPath(name).parts if isinstance(name, str) else ("..",)
        if not parts or ".." in parts or PurePosixPath(name).is_absolute():
            raise reader.error("pictures", "files within the trial's folder", name)
    real = reader.text("real") if reader.content.get("real") is not None else None
    return PromptResult(reader.text("prompt"), tuple(images), reader.numbers("scores"), real)


def _mechanism(reader: _Reader) -> Diagnostics:
    return Diagnostics(
        _norms(reader.inside("gradient_norms")),
        reader.numbers("effective_rank"),
        reader.numbers("input_outliers"),
        # the first files did not have these
        reader.numbers("stable_rank") if "stable_rank" in reader.content else {},
        _norms(reader.inside("step_norms")) if "step_norms" in reader.content else {},
        _alignment(reader.inside("alignment")) if "alignment" in reader.content else {},
    )


def _alignment(layers: _Reader) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for layer in layers.content:
        measures = layers.inside(layer)
        if unknown := sorted(measures.content.keys() - ALIGNMENT.keys()):
            raise measures.error(unknown[0], f"one of {', '.join(ALIGNMENT)}", unknown[0])
        found[layer] = {}
        for name in measures.content:
            inner = measures.inside(name)
            steps, values = inner.items("steps"), inner.items("values")
            if len(steps) != len(values) or not all(map(is_finite_number, [*steps, *values])):
                raise inner.error("values", "a finite number for each of steps", values)
            found[layer][name] = {"steps": steps, "values": values}
    return found


def _norms(layers: _Reader) -> dict[str, Any]:
    norms: dict[str, Any] = {}
    for layer in layers.content:
        inner = layers.inside(layer)
        steps, maps = inner.items("steps"), inner.items("norms")
        if len(steps) != len(maps) or not all(map(is_measured, steps)):
            raise inner.error("steps", "a number for each of norms", steps)
        sizes = {len(rows) if isinstance(rows, list) else 0 for rows in maps}
        if len(sizes) > 1 or not all(_is_square(rows) for rows in maps):
            raise inner.error("norms", "k x k finite numbers for each step", maps)
        norms[layer] = {"steps": steps, "norms": maps}
    return norms


def is_measured(value: object) -> bool:
    """Whether a value from JSON is a number that may have been measured, so that means exist."""
    return is_finite_number(value) and abs(value) <= _LARGEST  # type: ignore[arg-type]


def _is_square(rows: Any) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, Sequence) and len(row) == len(rows) and all(map(is_measured, row))
        for row in rows
    )
