"""The loss of held-out images during training, beside that of the frozen base on the same noise.

Each image has noises of its own at fixed noise levels, which never change, so that two measurements
differ only by the adapter. The interval is over the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from math import isfinite
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from gralora_diffusion.adapters.injection import adapters_disabled
from gralora_diffusion.adapters.placement.layer_config import is_finite_number, is_integer
from gralora_diffusion.io.student_t import Interval, t_interval
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.data_module import Batches
from gralora_diffusion.training.data.dataset import collate
from gralora_diffusion.training.data.seeds import seed_from
from gralora_diffusion.training.runtime.agreement import from_all, together

from .objectives import LEVELS, AtLevels
from .step import BatchBuilder, DenoisingStep

#: Of each image, its loss at each of ``LEVELS``.
Losses = list[list[float]]


class HeldOutLoss:
    """Measures the loss of held-out images, with the adapter or without.

    Nothing that training depends on is changed: no random state is used, and every module gets its
    mode back.

    Args:
        step: the unwrapped step of the training.
        data: the held-out images, of ``config``.
        config: of ``held_out_config``, with the base's defaults.
        dtype: of noisy latents, the denoiser's.
    """

    def __init__(
        self,
        step: DenoisingStep,
        data: Batches,
        config: TrainingConfig,
        dtype: torch.dtype,
    ) -> None:
        self.step, self.data, self.config = step, data, config
        self.accelerator = data.accelerator
        objective = AtLevels(step.objective)
        self.builder = BatchBuilder(step, data, config, self.accelerator.device, dtype, objective)

    def measure(self, *, adapted: bool) -> Losses:
        """Return the mean losses over the noises; every process must call it.

        The processes share the images. Each computes as many passes as the others, which a sharded
        base needs.

        Args:
            adapted: with the adapter as it is now; otherwise those of the frozen base.
        """
        count, processes = len(self.data.instance.examples), self.accelerator.num_processes
        rank, rounds = self.accelerator.process_index, -(-count // processes)
        numbers = [(turn * processes + rank) % count for turn in range(rounds)]

        def mine() -> Losses:
            base = nullcontext() if adapted else adapters_disabled(*self.step.trained.values())
            with _evaluating(self.step), self._uncompiled(), torch.no_grad(), base:
                losses = torch.stack([self._losses_of(number) for number in numbers])
            return [  # read from the device at once, which waits for it
                [fmean(row[level :: len(LEVELS)]) for level in range(len(LEVELS))]
                for row in losses.tolist()
            ]

        shared = from_all(self.accelerator, together(self.accelerator, mine))
        return [shared[number % processes][number // processes] for number in range(count)]

    def _uncompiled(self) -> Any:
        """Return a context without compiled code, which other shapes would make torch compile anew.

        It might then compute the shapes of the training by other code, too.
        """
        compiled = self.config.torch_compile
        return torch.compiler.set_stance("force_eager") if compiled else nullcontext()

    def _losses_of(self, number: int) -> Tensor:
        """Return the losses of an image at all levels with one noise, then with the next."""
        samples, key = self.data.instance, self.data.instance.examples[number].content_key
        positions = [
            seed_from(key, noise) * len(LEVELS) + level
            for noise in range(self.config.held_out_noises)
            for level in range(len(LEVELS))
        ]
        size = min(self.config.train_batch_size, len(LEVELS))
        losses = []
        for start in range(0, len(positions), size):
            chosen = positions[start : start + size]
            batch = collate([samples.sample(number, position) for position in chosen])
            groups = self.builder.build(batch)
            with self.accelerator.autocast():
                losses.append(self.step(groups))
        return torch.cat(losses)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in evaluation mode, so that nothing is dropped out."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@dataclass(frozen=True)
class Measurement:
    """The held-out loss at a step.

    Attributes:
        step: optimizer steps done.
        difference: of the images' losses to those of the frozen base; below 0 is better.
        loss, base: the mean losses.
        levels: name of a noise level -> the mean difference there.
        images: number of images.
    """

    step: int
    difference: Interval
    loss: float
    base: float
    levels: Mapping[str, float]
    images: int

    def to_dict(self) -> dict[str, Any]:
        """Return the values as ``metrics.jsonl`` has them, without the step."""
        mean, low, high = self.difference
        return {
            "difference": mean,
            "low": low,
            "high": high,
            "loss": self.loss,
            "base": self.base,
            "levels": dict(self.levels),
            "images": self.images,
        }

    def to_log(self) -> dict[str, float]:
        """Return the numbers for trackers."""
        numbers = {"loss": self.loss, **self.difference._asdict()}
        numbers |= {f"difference/{name}": value for name, value in self.levels.items()}
        numbers["difference"] = numbers.pop("mean")
        return {f"held_out/{name}": v for name, v in numbers.items() if v is not None}

    def __str__(self) -> str:
        mean, low, _ = self.difference
        return f"{mean:+.4f}" + (f"±{mean - low:.4f}" if low is not None else "")


@dataclass
class HeldOutRecord:
    """What a run has measured so far, as its checkpoints contain it.

    Attributes:
        digest: hash of everything that the measurements depend on.
        base: the frozen base's losses; empty before the first measurement.
        best_step: of the best measurement; None if there is none.
        best: its losses.
        worse: number of the last measurements in a row that were worse than the best by more than
            the interval of the difference.
        last: the last measurement; it is not kept in checkpoints.
    """

    digest: str
    base: Losses = field(default_factory=list)
    best_step: int | None = None
    best: Losses = field(default_factory=list)
    worse: int = 0
    last: Measurement | None = None

    def add(self, step: int, losses: Losses) -> Measurement | None:
        """Add the losses measured at a step; None, and nothing is added, if they are not finite."""
        if not all(isfinite(loss) for losses_ in (*losses, *self.base) for loss in losses_):
            return None
        if self.best_step is None or _mean(losses) < _mean(self.best):
            self.best_step, self.best, self.worse = step, losses, 0
        else:
            low = t_interval(_differences(losses, self.best)).low
            self.worse = self.worse + 1 if low is not None and low > 0 else 0
        self.last = self._measurement(step, losses)
        return self.last

    def of_best(self) -> Measurement | None:
        """Return the best measurement."""
        return None if self.best_step is None else self._measurement(self.best_step, self.best)

    def _measurement(self, step: int, losses: Losses) -> Measurement:
        return Measurement(
            step,
            t_interval(_differences(losses, self.base)),
            _mean(losses),
            _mean(self.base),
            {
                name: fmean(now[level] - base[level] for now, base in _pairs(losses, self.base))
                for level, name in enumerate(LEVELS)
            },
            len(losses),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the values as a checkpoint contains them."""
        values = asdict(self)
        del values["last"]
        return values

    def resume(self, values: Any) -> bool:
        """Take over what a checkpoint contains, and return whether that was possible.

        It is not if the checkpoint has none, or measured other images or in another way.

        Raises:
            ValueError: the values are damaged.
        """
        if values is None or (isinstance(values, dict) and values.get("digest") != self.digest):
            return False
        try:
            base, best = (_checked(values[name]) for name in ("base", "best"))
            step, worse = values["best_step"], values["worse"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"its held-out losses are damaged: {error!r}") from error
        whole = is_integer(step) and step >= 0 and len(base) == len(best) > 0
        if not (is_integer(worse) and worse >= 0) or not (whole or (step is None and not best)):
            raise ValueError("its held-out losses are damaged")
        self.base, self.best, self.best_step, self.worse = base, best, step, worse
        return True


def _checked(losses: Any) -> Losses:
    if not all(
        isinstance(row, list) and len(row) == len(LEVELS) and all(map(_is_loss, row))
        for row in losses
    ):
        raise ValueError("its held-out losses are damaged")
    return [[float(loss) for loss in row] for row in losses]


def _is_loss(value: Any) -> bool:
    """Whether a value from JSON may be a loss in fp32, so that means are finite."""
    return is_finite_number(value) and abs(value) < 1e39


_pairs = partial(zip, strict=True)


def _mean(losses: Losses) -> float:
    return fmean(map(fmean, losses))


def _differences(losses: Losses, others: Losses) -> list[float]:
    """Return the difference of each image's loss, which is the mean over the noise levels."""
    return [fmean(now) - fmean(other) for now, other in _pairs(losses, others)]
