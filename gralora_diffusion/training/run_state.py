"""All that a checkpoint holds: the adapter, the optimizer's state, and how far the run is."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..families import ModelFamily
from ..state import WEIGHTS_NAME, Adapter, save_adapter
from .adapters import put_back, read_out, weights_for_use
from .checkpoint import CheckpointError
from .config import TrainingConfig
from .same_run import (
    PROGRESS_NAME,
    check_base,
    check_options,
    deciding_options,
    describe_base,
    read_progress,
    unreadable,
)

logger = logging.getLogger(__name__)

TRAINING_WEIGHTS_NAME = "training_weights.safetensors"


class RunState:
    """What changes in a run, to be saved and to be gone on with.

    Args:
        components: attributes of ``pipe`` with an adapter.
        parameters: of all adapters.
        optimizer: as prepared by ``accelerator``.
        ema: average of the adapter, if there is one.
        data_digest: tells which samples each step gets.
        describe: step -> what the adapter's file says of itself.
    """

    def __init__(
        self,
        config: TrainingConfig,
        pipe: Any,
        family: ModelFamily,
        components: Sequence[str],
        parameters: Sequence[nn.Parameter],
        optimizer: Any,
        lr_scheduler: LRScheduler | None,
        ema: EMAModel | None,
        accelerator: Accelerator,
        data_digest: str,
        describe: Callable[[int], dict[str, str]],
    ) -> None:
        self.step = 0  # optimizer steps done
        self.config, self.pipe, self.family, self.components = config, pipe, family, components
        self.parameters, self.optimizer, self.lr_scheduler = parameters, optimizer, lr_scheduler
        self.ema, self.accelerator, self.data_digest = ema, accelerator, data_digest
        self.describe = describe
        self.base = describe_base(pipe, config)
        for part in (lr_scheduler, ema):
            if part is not None:
                accelerator.register_for_checkpointing(part)
        accelerator.register_save_state_pre_hook(self._save_adapter)
        accelerator.register_load_state_pre_hook(self._load_adapter)

    def adapter(self) -> Adapter:
        """Copy the adapter's present weights out of the models."""
        adapter = read_out(self.pipe, self.family, self.components)
        return replace(adapter, metadata=self.describe(self.step))

    def save(self, folder: Path) -> None:
        """Write the checkpoint into an empty folder. Every process calls it."""
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. Learning rates, weight decay and the average's
        decay are those of this run's options.

        Raises:
            CheckpointError: it is not readable or is of another run.
        """
        groups = self.optimizer.param_groups
        rates = [(g.get("initial_lr", g["lr"]), g["weight_decay"]) for g in groups]
        try:
            progress = read_progress(path)
            check_options(path, progress, self.config)
            check_base(path, progress, self.base)
            self.accelerator.load_state(str(path))
            self.step, digest = progress["step"], progress["data_digest"]
        except CheckpointError:
            raise
        except (
            OSError,
            KeyError,
            ValueError,
            RuntimeError,
            EOFError,
            pickle.UnpicklingError,
        ) as error:
            raise unreadable(path, error) from error
        # passes, by which it tells the last of a step; another accumulation counts them otherwise
        self.accelerator.step = 0
        if self.ema is not None:
            self.ema.to(self.accelerator.device)  # accelerate loads it to the CPU
            self.ema.decay = self.config.ema_decay
        self._set_rates(rates)
        if digest != self.data_digest:
            logger.warning(
                "the pictures, captions, sizes, batch size or seed are not those of the "
                "checkpoint: the run goes on, but will not end as an uninterrupted one would"
            )
        logger.info("resuming from %s at step %d", path, self.step)

    def _set_rates(self, rates: Sequence[tuple[float, float]]) -> None:
        groups = self.optimizer.param_groups
        for group, (rate, weight_decay) in zip(groups, rates, strict=True):
            group["weight_decay"] = weight_decay
            group["initial_lr" if self.lr_scheduler is not None else "lr"] = rate
        if self.lr_scheduler is None:
            return
        # the schedule, too, is this run's: another --max_train_steps stretches it
        scheduler: Any = self.lr_scheduler  # diffusers' are all LambdaLR
        scheduler.base_lrs[:] = [rate for rate, _ in rates]
        for group, (rate, _), rule in zip(groups, rates, scheduler.lr_lambdas, strict=True):
            group["lr"] = rate * rule(scheduler.last_epoch)

    def _save_adapter(self, models: Any, weights: list[Any], folder: str) -> None:
        weights.clear()  # the base need not be saved
        if not self.accelerator.is_main_process:
            return
        target = Path(folder)
        save_adapter(self.adapter(), target / TRAINING_WEIGHTS_NAME)
        with weights_for_use(self.parameters, self.optimizer, self.ema):
            save_adapter(self.adapter(), target / WEIGHTS_NAME)
        progress = {
            "step": self.step,
            "data_digest": self.data_digest,
            "options": deciding_options(self.config),
            "base": self.base,
        }
        (target / PROGRESS_NAME).write_text(json.dumps(progress, indent=2) + "\n", encoding="utf-8")

    def _load_adapter(self, models: list[Any], folder: str) -> None:
        models.clear()
        put_back(self.pipe, self.components, Path(folder) / TRAINING_WEIGHTS_NAME)
