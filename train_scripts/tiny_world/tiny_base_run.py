"""Files, log, randomness and learning rate for all stages of the tiny base's training."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

CHECKPOINT_SECONDS = 120


@dataclass
class Run:
    """The work directory, log and process of a stage."""

    accelerator: Accelerator
    work_dir: Path
    seed: int

    def rng(self, stage: str, step: int) -> random.Random:
        """Return a generator for (seed, stage, step, rank), so that a resumed run is the same."""
        return random.Random(f"{self.seed}/{stage}/{step}/{self.accelerator.process_index}")

    def log(self, **record: float | str) -> None:
        """Append a line to `training_log.jsonl`, with floats rounded to five decimals."""
        if self.accelerator.is_main_process:
            rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()}
            line = json.dumps(rounded)
            print(line, flush=True)
            with (self.work_dir / "training_log.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write a file of the work directory; it appears only when it is complete."""
        if self.accelerator.is_main_process:
            part = self.work_dir / (name + ".part")
            torch.save(state, part)
            part.replace(self.work_dir / name)

    def load(self, name: str) -> dict[str, Any] | None:
        """Return the file's content, or None if the stage that writes it has not run."""
        path = self.work_dir / name
        return torch.load(path, weights_only=True) if path.exists() else None

    def require(self, name: str) -> dict[str, Any]:
        """Return the file's content; raise an error if the stage that writes it has not run."""
        state = self.load(name)
        if state is None:
            raise FileNotFoundError(
                f"{self.work_dir / name} is missing. Run the earlier stages first"
            )
        return state


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up over 200 steps, stay at the peak for 60% of the steps, then decrease linearly to 1%.

    If a resumed run has more or fewer steps, only the decrease moves.
    """
    fall = (steps - step) / (0.4 * steps)
    return peak * min(1.0, (step + 1) / 200) * min(1.0, max(0.01, fall))


class Clock:
    """Counts the seconds of a stage, including those before a resume, and says when to save."""

    def __init__(self, spent_seconds: float) -> None:
        self.start, self.saved = time.monotonic() - spent_seconds, spent_seconds

    @property
    def spent(self) -> float:
        return time.monotonic() - self.start

    def is_time_to_save(self) -> bool:
        """Return True once every `CHECKPOINT_SECONDS`."""
        if self.spent - self.saved < CHECKPOINT_SECONDS:
            return False
        self.saved = self.spent
        return True
