"""Whole runs of the trainer on the pretended GPU: trained, resumed, compared; their waits."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gralora_diffusion.families import get_family
from gralora_diffusion.training import loop
from gralora_diffusion.training.checkpoints.resume import PROGRESS_NAME
from gralora_diffusion.training.data import class_images
from gralora_diffusion.training.loop import Trainer
from gralora_diffusion.training.optimization.held_out import HeldOutLoss, Losses, Measurement
from gralora_diffusion.training.optimization.step import TrainingDiverged
from tests.models import PIPELINES
from tests.rehearsal.device import WAITS, Gpu
from tests.training.runs import adapter, learned, make_shapes, metrics, run

#: The first step is not counted; in the second, the third's batch is prepared.
STEPS, CHECKPOINT = 3, 2
#: Options of each run.
SHORT: dict[str, Any] = {
    "resolution": 32,
    "train_batch_size": 1,
    "max_train_steps": STEPS,
    "checkpointing_steps": CHECKPOINT,
}
_PRIOR: dict[str, Any] = {"with_prior_preservation": True, "class_prompt": "a dog"}
_VALIDATION: dict[str, Any] = {
    "validation_prompt": "a dog",
    "num_validation_images": 1,
    "validation_steps": 2,
    "validation_inference_steps": 1,
    "skip_final_inference": True,
}
#: Setting -> options of a run.
SETTINGS: dict[str, dict[str, Any]] = {
    "cached": {"mixed_precision": "bf16", "use_ema": True, **_VALIDATION},
    "encoders": {
        "mixed_precision": "fp16",
        "train_text_encoder": True,
        "cache_latents": False,
        "gradient_checkpointing": True,
        **_VALIDATION,
    },
    "teacher": {"mixed_precision": "bf16", **_PRIOR, "prior_source": "teacher"},
    "images": {
        "mixed_precision": "bf16",
        **_PRIOR,
        "num_class_images": 1,
        "sample_batch_size": 1,
        "aspect_ratio_buckets": "32,48;64,32",
        "cache_latents": False,
    },
}
#: Families whose text encoders are not trained.
_WITHOUT_ENCODERS = [name for name in PIPELINES if not get_family(name).text_encoders]


def options(family: str, setting: str, changes: dict[str, Any]) -> dict[str, Any]:
    values = {**SETTINGS[setting], **changes}
    if family in _WITHOUT_ENCODERS:
        values.pop("train_text_encoder", None)
    if get_family(family).max_sequence_length is not None:
        values = {"max_sequence_length": 128, **values}  # not the usual hundreds of tokens
    return values


def rehearse(
    family: str, setting: str, gpu: Gpu, folder: Path, changes: dict[str, Any]
) -> Iterator[str]:
    """Train, resume from the checkpoint in the middle, and yield what is wrong."""
    base, images = folder / "bases" / family, folder / "images"
    if not base.exists():
        PIPELINES[family]().save_pretrained(base)
    if not images.exists():
        make_shapes(images, [(48, 32)] * 2)
    chosen = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        "output_dir": folder / "run",
        **SHORT,
        **options(family, setting, changes),
    }
    if chosen.get("num_class_images") and "class_data_dir" not in chosen:
        chosen["class_data_dir"] = folder / "class" / family
    if setting == "images":
        gpu.free = 1000  # class images are generated layer by layer
    yield from train_and_resume(gpu, chosen)


def train_and_resume(gpu: Gpu, chosen: dict[str, Any]) -> Iterator[str]:
    """Train with these options, resume from the checkpoint in the middle; yield what is wrong."""
    if chosen.get("cache_latents", True):
        chosen = {"cached_crops": 1, **chosen}
    out = chosen["output_dir"]
    shutil.rmtree(out, ignore_errors=True)
    with counted_waits() as waits, quick_images():
        run(**chosen)
    gpu.free = gpu.total
    if chosen.get("optimizer", "adamw") != "adamw":
        waits.clear()  # the others are from libraries, which read numbers
    whole, numbers = adapter(out), learned(out)
    for step, found in waits.items():
        if problem := more_than_one_wait(found):
            yield f"step {step}: {problem}"
    for number, found in enumerate(waits.measurements[1:], start=1):
        if problem := more_than_one_wait(found):
            yield f"measurement {number}: {problem}"
    if not all(tensor.isfinite().all() for tensor in whole.values()):
        yield "the adapter is not finite"
    if not any(tensor.any() for name, tensor in whole.items() if "_B" in name):
        yield "nothing was trained"
    shutil.rmtree(out / f"checkpoint-{chosen['max_train_steps']}", ignore_errors=True)
    run(**{**chosen, "resume_from_checkpoint": "latest"})
    again = adapter(out)
    different = [name for name in whole if not torch.equal(whole[name], again[name])]
    if different:
        yield f"the resumed run differs in {len(different)} tensors, {different[0]} among them"
    if learned(out) != numbers:
        yield "the resumed run's metrics differ"


def overflow(folder: Path) -> Iterator[str]:
    """A step whose loss overflows in fp16 is skipped, with schedule and average; many end a run.

    Three in a row, here.
    """
    make_shapes(folder / "images", [(32, 32)])
    PIPELINES["stable-diffusion"]().save_pretrained(folder / "base")
    chosen = {
        "pretrained_model_name_or_path": folder / "base",
        "instance_data_dir": folder / "images",
        "mixed_precision": "fp16",
        "max_train_steps": 4,
        "checkpointing_steps": 4,
        "train_batch_size": 1,
        "lr_scheduler": "linear",
        "use_ema": True,
    }
    with _overflowing(range(2, 3)):
        run(**chosen, output_dir=folder / "once")
    rows = metrics(folder / "once")
    if [row["loss"] is None for row in rows] != [False, True, False, False]:
        yield f"losses {[row['loss'] for row in rows]}: only the second should be null"
    if (rates := [row["lr"] for row in rows]) != [1e-2, 7.5e-3, 7.5e-3, 5e-3]:
        yield f"learning rates {rates}: the schedule should not move in the second step"
    if not all(tensor.isfinite().all() for tensor in adapter(folder / "once").values()):
        yield "the adapter is not finite"
    progress = json.loads((folder / "once" / "checkpoint-4" / PROGRESS_NAME).read_text())
    if (averaged := progress["state"]["ema"]["optimization_step"]) != 3:
        yield f"the average has seen {averaged} steps, not 3"
    try:
        with _overflowing(range(2, 100)), mock.patch.object(loop, "_SKIPPED_STEPS", 3):
            run(**{**chosen, "max_train_steps": 8}, output_dir=folder / "always")
    except TrainingDiverged as error:
        if "step 5:" not in str(error):
            yield f"ended otherwise: {error}"
    else:
        yield "a run whose every step overflows does not end"


@contextmanager
def _overflowing(steps: range) -> Iterator[None]:
    """Multiply the loss by infinity in these steps."""
    plain, count = loop.mean_loss, itertools.count(1)

    def mean_loss(*args: Any) -> Any:
        loss = plain(*args)
        return loss * torch.inf if next(count) in steps else loss

    with mock.patch.object(loop, "mean_loss", mean_loss):
        yield


@contextmanager
def quick_images() -> Iterator[None]:
    """Generate class images in one step and small, because a pretended GPU takes long."""
    load = class_images.load_base

    def loaded(*args: Any, **named: Any) -> Any:
        pipe: Any = load(*args, **named)
        kind = type(pipe)
        call = partialmethod(kind.__call__, num_inference_steps=1, height=32, width=32)
        pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call})
        return pipe

    with mock.patch.object(class_images, "load_base", loaded):
        yield


class StepWaits(dict[int, Counter[tuple[str, str]]]):
    """Step -> (kind of wait, line) -> how often; the first step of a run is left out.

    Attributes:
        measurements: the same of each measurement of held-out images; in the first, the
            scheduler's tables move to the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.measurements: list[Counter[tuple[str, str]]] = []


def more_than_one_wait(found: Counter[tuple[str, str]]) -> str | None:
    """Say what was found, unless the host waited once to read a number."""
    kinds: Counter[str] = Counter()
    for (kind, _), count in found.items():
        kinds[kind] += count
    if kinds == {"read by the host": 1}:
        return None
    lines = [f"\n    {count} x {kind}: {line}" for (kind, line), count in sorted(found.items())]
    return f"{dict(kinds)}, not one wait{''.join(lines)}"


@contextmanager
def counted_waits() -> Iterator[StepWaits]:
    """Count the waits of each step of the trainer: not those of checkpoints and validation."""
    waits, plain = StepWaits(), Trainer.steps

    def steps(trainer: Trainer, *args: Any, **named: Any) -> Iterator[int]:
        running = plain(trainer, *args, **named)
        first = trainer.state.step + 1  # it allocates the optimizer's state
        while True:
            found: Counter[tuple[str, str]] = Counter()
            with WAITS.counted(found):
                step = next(running, None)
            if step is None:
                return
            if step > first:
                waits[step] = found
            yield step

    measure_if_due, measure = Trainer._measure_if_due, HeldOutLoss.measure

    def uncounted(trainer: Trainer) -> Measurement | None:
        with WAITS.counted(None):  # it may write the best adapter
            return measure_if_due(trainer)

    def measured(loss: HeldOutLoss, *, adapted: bool) -> Losses:
        waits.measurements.append(Counter())
        with WAITS.counted(waits.measurements[-1]):
            return measure(loss, adapted=adapted)

    with (
        mock.patch.object(Trainer, "steps", steps),
        mock.patch.object(Trainer, "_measure_if_due", uncounted),
        mock.patch.object(HeldOutLoss, "measure", measured),
    ):
        yield waits
