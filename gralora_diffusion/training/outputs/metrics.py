"""The numbers of a run step by step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gralora_diffusion.adapters.placement.layer_config import is_finite_number, is_integer
from gralora_diffusion.io.json_files import parse_object
from gralora_diffusion.io.regular_files import read_regular
from gralora_diffusion.io.tensor_files import replacing

if TYPE_CHECKING:
    from gralora_diffusion.training.optimization.held_out import Measurement

METRICS_NAME = "metrics.jsonl"
#: Maximum size of the file in bytes, which is more than any run needs.
_MOST_BYTES = 1 << 28


@dataclass(frozen=True)
class StepNumbers:
    """The numbers of an optimizer step.

    Attributes:
        step: steps done, with this one.
        loss, grad_norm: not finite if fp16 overflowed.
        peak_memory_gib: on a GPU.
        held_out: the loss of held-out images, if it was measured after the step.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    samples_per_second: float
    peak_memory_gib: float | None = None
    held_out: Measurement | None = None

    def row(self) -> dict[str, Any]:
        """Return the step's row for :class:`MetricsFile`."""
        row = {"step": self.step, **self._exact(), "performance": self._performance()}
        return row if self.held_out is None else {**row, "held_out": self.held_out.to_dict()}

    def to_log(self) -> dict[str, float | None]:
        """Return the numbers for trackers."""
        measured = {} if self.held_out is None else self.held_out.to_log()
        return {**self._exact(), **self._performance(), **measured}

    def _exact(self) -> dict[str, float | None]:
        """Return what is the same for the same options; JSON has no infinity."""
        finite = {"loss": self.loss, "grad_norm": self.grad_norm}
        return {k: v if isfinite(v) else None for k, v in finite.items()} | {"lr": self.lr}

    def _performance(self) -> dict[str, float]:
        gib = self.peak_memory_gib
        memory = {} if gib is None else {"peak_memory_gib": gib}
        return {"samples_per_second": self.samples_per_second, **memory}

    def __str__(self) -> str:
        shown = f"loss={self.loss:.4f}, lr={self.lr:.2e}, grad_norm={self.grad_norm:.2e}"
        shown += f", samples/s={self.samples_per_second:.3g}"
        if self.peak_memory_gib is not None:
            shown += f", peak memory={self.peak_memory_gib:.1f} GiB"
        return shown if self.held_out is None else f"{shown}, held out={self.held_out}"


def with_loss(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of the steps whose loss did not overflow."""
    return [row for row in rows if row["loss"] is not None]


def held_out_points(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, float, float]]:
    """Return (step, difference, low, high) of the rows with a measurement of held-out images.

    A single image has no interval; its ``low`` and ``high`` are the difference.
    """
    points: list[tuple[int, float, float, float]] = []
    for row in rows:
        measured = row.get("held_out")
        found: Mapping[str, Any] = measured if isinstance(measured, Mapping) else {}
        numbers = {name: float(value) for name, value in found.items() if is_finite_number(value)}
        if (mean := numbers.get("difference")) is not None:
            low, high = numbers.get("low", mean), numbers.get("high", mean)
            points.append((row["step"], mean, low, high))
    return points


class MetricsFile:
    """A file with a JSON object for each optimizer step, appended during training.

    Numbers that depend on the machine and the time are in "performance"; the others are the same
    for the same options. Rows of earlier versions have neither "grad_norm" nor "performance". If
    fp16 overflowed, "grad_norm" is null, and "loss" may be. A step at which held-out images were
    measured has "held_out", and a row of step 0 has nothing else.

    Args:
        folder: output folder.
        first_step: steps already done; later lines are from a run that was killed, and deleted.

    Raises:
        OSError: the file cannot be read or written.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        self.path = folder / METRICS_NAME
        lines = _lines(self.path) if first_step else ()
        kept = [text for text, row in lines if row["step"] <= first_step]
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:  # if the process is killed now, no line is lost
            temporary.write_bytes(b"".join(text + b"\n" for text in kept))

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; it has a "step"."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Return the rows, as :func:`read_metrics` does."""
        return read_metrics(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; damaged lines and an incomplete last line are ignored.

    Raises:
        OSError: the file cannot be read.
    """
    return [row for _, row in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the lines that contain a row, and the rows."""
    if not path.exists():
        return
    for line in read_regular(path, _MOST_BYTES).split(b"\n"):
        try:
            row = parse_object(line)
        except ValueError:
            continue
        loss = row.get("loss", "missing")
        if is_integer(row.get("step")) and (loss is None or is_finite_number(loss)):
            yield line, row
