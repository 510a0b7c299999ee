"""What a training says at its start and at its end."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gralora_diffusion.io.durations import duration
from gralora_diffusion.io.file_names import BEST_NAME, WEIGHTS_NAME
from gralora_diffusion.io.process import are_several
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.image_folder import Example
from gralora_diffusion.training.data.sets import described_sets
from gralora_diffusion.training.optimization.held_out import HeldOutRecord, Measurement
from gralora_diffusion.training.optimization.masked_loss import MaskedLoss
from gralora_diffusion.training.runtime.folder_lock import CONFIG_NAME

from .curve import CURVE_NAME
from .metrics import METRICS_NAME, with_loss
from .published import CARD_NAME, HISTORY_NAME, VALIDATION_NAME

_WIDTH = 9
_FILLS = {
    "random": "random masks: the whole image, rectangles or strokes",
    "given": "the images' masks, and random ones of images without a mask",
}


def summary_of_inputs(
    config: TrainingConfig,
    family: str,
    images: Sequence[Example],
    class_images: Sequence[Example],
    device: str,
    memory: str,
    *,
    held_out: int = 0,
) -> str:
    """Return what is known before a model is loaded: base, images, memory, output.

    Args:
        held_out: number of held-out images.
    """
    every = f"their loss is measured every {config.held_out_steps} steps"
    captions = {caption for image in images for caption in image.captions}
    controls = sum(len(image.controls) for image in images)
    side = config.control_resolution
    reduced = f", of at most {side}x{side} pixels" if side else ""
    texts = f"{len(captions)} captions" if len(captions) > 1 else f"all with {captions.pop()!r}"
    rows = [
        ("base", f"{config.pretrained_model_name_or_path} ({family}), on {device}"),
        ("images", f"{len(images)}, {texts}"),
        *(("", text) for text in described_sets(config, images)),
        *([("masks", summary_of_masks(config, images))] if config.masked_loss else []),
        *([("edits", f"{controls} control images{reduced}")] if controls else []),
        *([("class", f"{len(class_images)} images")] if class_images else []),
        *([("held out", f"{held_out} images; {every}")] if held_out else []),
        ("memory", memory),
        ("output", str(Path(config.output_dir))),
    ]
    return _table(rows)


def summary_of_masks(config: TrainingConfig, images: Sequence[Example]) -> str:
    """Return how many images have a mask, and what the loss counts outside of it."""
    masked = sum(image.mask is not None for image in images)
    return f"for {masked} of {len(images)} images; {MaskedLoss.of(config)}"


def summary_of_training(
    steps: int,
    per_epoch: int,
    samples: int,
    layers: Mapping[str, int],
    parameters: int,
    fill: str | None = None,
) -> str:
    """Return what is known once the adapter is attached.

    Args:
        steps: number of optimizer steps.
        per_epoch: steps of an epoch.
        samples: per step.
        layers: component -> number of adapted layers.
        fill: what a base for inpainting fills: "random" or "given" masks.
    """
    epochs = steps / per_epoch
    epochs_text = f"{epochs:,.0f}" if epochs == int(epochs) else f"{epochs:,.1f}"
    where = ", ".join(f"{count} layers of the {name}" for name, count in layers.items())
    return _table(
        [
            ("adapter", f"{where}, {parameters:,} parameters"),
            ("steps", f"{steps:,} of {samples} samples, {epochs_text} epochs"),
            *([("fills", _FILLS[fill])] if fill else []),
        ]
    )


def summary_of_held_out(record: HeldOutRecord) -> str:
    """Return the best and the last difference of the held-out images to the frozen base."""
    best = record.of_best()
    if best is None:
        return "never measured"
    text = f"{_difference(best)} at step {best.step:,}, which is the best"
    if best.step == 0:
        text += ": no training made it better"
    if record.last is not None and record.last.step != best.step:
        text += f"; {_difference(record.last)} at step {record.last.step:,}"
    return text


def _difference(measured: Measurement) -> str:
    mean, low, high = measured.difference
    interval = f" (95%: {low:+.4f} to {high:+.4f})" if low is not None else ""
    return f"{mean:+.4f}{interval} compared with the base's {measured.base:.4f}"


def summary_of_result(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    seconds: float,
    held_out: HeldOutRecord | None = None,
) -> str:
    """Return what a training came to: time, loss and files.

    Args:
        rows: the metrics of each step.
        seconds: of the steps, with validation.
        held_out: what was measured of held-out images, if there are any.
    """
    found = [("time", duration(seconds))]
    if rows := with_loss(rows):
        losses = [row["loss"] for row in rows]
        width = max(1, len(losses) // 20)
        means = [
            sum(losses[end - width : end]) / width for end in range(width, len(losses) + 1, width)
        ]
        best = min(range(len(means)), key=means.__getitem__)
        first = rows[best * width]["step"]
        last = rows[best * width + width - 1]["step"]
        steps = f"steps {first} to {last}" if last > first else f"step {last}"
        found.append(("loss", f"{means[-1]:.4f} at the end; lowest {means[best]:.4f} in {steps}"))
    if held_out is not None:
        found.append(("held out", summary_of_held_out(held_out)))
    names = (
        WEIGHTS_NAME,
        BEST_NAME,
        CARD_NAME,
        CURVE_NAME,
        METRICS_NAME,
        HISTORY_NAME,
        VALIDATION_NAME,
    )
    files = [name for name in names if (folder / name).exists()]
    found.append(("files", f"{folder}{os.sep}"))
    found += [("", f"  {name}{os.sep if (folder / name).is_dir() else ''}") for name in files]
    return _table(found)


def how_to_resume(folder: Path, step: int, steps: int) -> str:
    """Return what a run says that was stopped: where, and the command that resumes it."""
    options = ["--config", str(folder / CONFIG_NAME), "--resume_from_checkpoint", "latest"]
    # Windows quotes otherwise
    line = subprocess.list2cmdline(options) if os.name == "nt" else shlex.join(options)
    how = "launch the same processes with" if are_several() else "run"
    program = "" if are_several() else "gralora train "
    return f"stopped at step {step:,} of {steps:,}. To resume, {how}\n  {program}{line}"


def why_overfitting_ends(folder: Path, step: int, steps: int, record: HeldOutRecord) -> str:
    """Say why a run ended before its last step, and where its best adapter is."""
    return (
        f"ended at step {step:,} of {steps:,}: the loss of the held-out images was worse than at "
        f"step {record.best_step:,} by more than its 95% interval in {record.worse} measurements "
        f"in a row. The adapter of step {record.best_step:,} is in {folder / BEST_NAME}{os.sep}"
    )


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<{_WIDTH}}{text}".rstrip() for name, text in rows)
