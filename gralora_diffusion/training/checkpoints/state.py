"""The content of a checkpoint: the adapter, the optimizer's state, and the run's progress."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from gralora_diffusion.adapters.adapter_file import WEIGHTS_NAME, Adapter, save_adapter
from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import CheckpointError
from gralora_diffusion.io.regular_files import check_regular
from gralora_diffusion.io.tensor_files import read_safetensors, write_safetensors
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.optimization.adapters import extract, inference_weights, restore
from gralora_diffusion.training.optimization.held_out import HeldOutRecord

from .best import copy_best
from .resume import (
    PROGRESS_NAME,
    TRAINING_WEIGHTS_NAME,
    check_base,
    check_files,
    check_options,
    deciding_options,
    digests,
    read_progress,
    unreadable,
)

logger = logging.getLogger(__name__)

OPTIMIZER_NAME = "optimizer.bin"
EMA_NAME = "ema.safetensors"
#: What is restored from; the files for inference may be changed, such as their metadata.
_RESTORED = (TRAINING_WEIGHTS_NAME, OPTIMIZER_NAME, EMA_NAME)
_OF_SCHEDULE = ("last_epoch", "_step_count")


class RunState:
    """The part of a run that changes, which is saved and resumed.

    A checkpoint contains tensors, numbers and text, and is read as nothing else, so that reading
    one from somebody else never runs their code.

    Args:
        base: result of ``describe_base``.
        components: attributes of ``pipe`` with an adapter.
        parameters: of all adapters.
        optimizer: as prepared by ``accelerator``.
        ema: average of the adapter, if there is one.
        data_digest: hash that determines which samples each step gets.
        describe: step -> metadata of the adapter's file.
        held_out: what was measured of held-out images, if there are any.
    """

    def __init__(
        self,
        config: TrainingConfig,
        pipe: Any,
        base: dict[str, Any],
        family: ModelFamily,
        components: Sequence[str],
        parameters: Sequence[nn.Parameter],
        optimizer: Any,
        lr_scheduler: LRScheduler | None,
        ema: EMAModel | None,
        accelerator: Accelerator,
        data_digest: str,
        describe: Callable[[int], dict[str, str]],
        held_out: HeldOutRecord | None = None,
    ) -> None:
        self.step = 0  # optimizer steps done
        self.config, self.pipe, self.family, self.components = config, pipe, family, components
        self.parameters, self.optimizer, self.lr_scheduler = parameters, optimizer, lr_scheduler
        self.ema, self.accelerator, self.data_digest = ema, accelerator, data_digest
        self.describe, self.held_out = describe, held_out
        self.base = base

    def adapter(self) -> Adapter:
        """Copy the adapter's current weights out of the models."""
        adapter = extract(self.pipe, self.family, self.components)
        return replace(adapter, metadata=self.describe(self.step))

    def save(self, folder: Path) -> None:
        """Write the checkpoint into an empty folder. One process does this for all."""
        save_adapter(self.adapter(), folder / TRAINING_WEIGHTS_NAME)
        with inference_weights(self.parameters, self.optimizer, self.ema):
            save_adapter(self.adapter(), folder / WEIGHTS_NAME)
        torch.save(self.optimizer.state_dict(), folder / OPTIMIZER_NAME)
        numbers: dict[str, dict[str, Any]] = {"schedule": {}, "ema": {}, "scaler": {}}
        if self.lr_scheduler is not None:
            # the rest of its state follows from the options
            state = self.lr_scheduler.state_dict()
            numbers["schedule"] = {name: state[name] for name in _OF_SCHEDULE}
        if self.ema is not None:
            numbers["ema"] = self.ema.state_dict()
            averages = numbers["ema"].pop("shadow_params")
            write_safetensors(
                {str(i): tensor for i, tensor in enumerate(averages)}, folder / EMA_NAME, {}
            )
        if self.accelerator.scaler is not None:
            numbers["scaler"] = self.accelerator.scaler.state_dict()
        progress = {
            "step": self.step,
            "data_digest": self.data_digest,
            "options": deciding_options(self.config),
            "base": self.base,
            "state": numbers,
            "files": digests(folder, _RESTORED),
        }
        if self.held_out is not None:
            progress["held_out"] = self.held_out.to_dict()
            if self.held_out.best_step is not None:
                copy_best(self.config.output_dir, folder)
        (folder / PROGRESS_NAME).write_text(json.dumps(progress, indent=2) + "\n", encoding="utf-8")

    def load(self, path: Path) -> None:
        """Resume from a checkpoint. Learning rates, weight decay and the average's decay are set
        by this run's options.

        Raises:
            CheckpointError: it is not readable or belongs to another run.
        """
        groups = self.optimizer.param_groups
        rates = [(g.get("initial_lr", g["lr"]), g["weight_decay"]) for g in groups]
        try:
            progress = read_progress(path)
            check_options(path, progress, self.config)
            check_base(path, progress, self.base)
            check_files(path, progress, _RESTORED)
            restore(self.pipe, self.components, path / TRAINING_WEIGHTS_NAME)
            self._load_optimizer(path / OPTIMIZER_NAME)
            numbers = progress.get("state")
            self._set_numbers(path, self._of_accelerate(path) if numbers is None else numbers)
            self.step, digest = progress["step"], progress["data_digest"]
            self._resume_held_out(progress.get("held_out"))
        except CheckpointError:
            raise
        except Exception as error:  # libraries may raise anything when a file is damaged
            raise unreadable(path, error) from error
        # accelerate finds a step's last pass by this count, which depends on the accumulation
        self.accelerator.step = 0
        if self.ema is not None:
            self.ema.decay = self.config.ema_decay
        self._set_rates(rates)
        if digest != self.data_digest:
            logger.warning(
                "the images, captions, sizes, batch size or seed are not those of the "
                "checkpoint: the run continues, but its result will differ from an "
                "uninterrupted run's"
            )
        logger.info("resuming from %s at step %d", path, self.step)

    def _resume_held_out(self, measured: Any) -> None:
        if self.held_out is None or self.held_out.resume(measured):
            return
        logger.warning(
            "the checkpoint has no measurements of these held-out images at the same sizes and "
            "noises: the best one is looked for from here on"
        )

    def _set_rates(self, rates: Sequence[tuple[float, float]]) -> None:
        groups = self.optimizer.param_groups
        for group, (rate, weight_decay) in zip(groups, rates, strict=True):
            group["weight_decay"] = weight_decay
            group["initial_lr" if self.lr_scheduler is not None else "lr"] = rate
        if self.lr_scheduler is None:
            return
        # the schedule is this run's, too: another --max_train_steps stretches it
        scheduler: Any = self.lr_scheduler  # diffusers' schedulers are all LambdaLR
        scheduler.base_lrs[:] = [rate for rate, _ in rates]
        for group, (rate, _), rule in zip(groups, rates, scheduler.lr_lambdas, strict=True):
            group["lr"] = rate * rule(scheduler.last_epoch)

    def _load_optimizer(self, path: Path) -> None:
        self.optimizer.load_state_dict(_load_tensors(path))
        if "." in self.config.optimizer:
            return  # whose state may have other tensors of any shape
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                # 8-bit optimizers and Adafactor also have vectors
                alike = torch.is_tensor(value) and value.dim() == parameter.dim() > 1
                if alike and value.shape != parameter.shape:
                    shapes = f"{tuple(value.shape)} instead of {tuple(parameter.shape)}"
                    raise ValueError(f"{path.name} has a {name} of the wrong shape, {shapes}")

    def _set_numbers(self, path: Path, numbers: Mapping[str, Mapping[str, Any]]) -> None:
        """Set schedule, average and scaler to a checkpoint's values."""
        if self.lr_scheduler is not None:
            schedule = numbers["schedule"]
            vars(self.lr_scheduler).update({name: int(schedule[name]) for name in _OF_SCHEDULE})
        if self.ema is not None:
            state = dict(numbers["ema"])
            if "shadow_params" not in state:
                tensors, _ = read_safetensors(path / EMA_NAME)
                state["shadow_params"] = [tensors[str(i)] for i in range(len(tensors))]
            averages = state["shadow_params"]
            if [t.shape for t in averages] != [p.shape for p in self.parameters]:
                raise ValueError("its average belongs to another adapter")
            self.ema.load_state_dict(state)
            self.ema.to(self.accelerator.device)
        if self.accelerator.scaler is not None and (state := dict(numbers["scaler"])):
            self.accelerator.scaler.load_state_dict(state)

    def _of_accelerate(self, path: Path) -> dict[str, Any]:
        """Return the same from a checkpoint whose schedule, average and scaler accelerate wrote."""
        numbers: dict[str, Any] = {"scaler": {}}
        parts = {"schedule": self.lr_scheduler, "ema": self.ema}
        for i, name in enumerate(name for name, part in parts.items() if part is not None):
            numbers[name] = _load_tensors(path / f"custom_checkpoint_{i}.pkl")
        if self.accelerator.scaler is not None:
            numbers["scaler"] = _load_tensors(path / "scaler.pt")
        return numbers


def _load_tensors(path: Path) -> Any:
    """Read tensors, numbers, text, and lists and dicts of them, that torch.save wrote."""
    check_regular(path)
    problem = f"{path.name} is damaged, or contains code that could run; it was not read"
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":  # torch would unpack its old formats into a folder
            raise ValueError(problem)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to load it anyway, which could run a program
        raise ValueError(problem) from error
