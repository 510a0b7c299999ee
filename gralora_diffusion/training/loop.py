"""DreamBooth training with GraLoRA, top to bottom. Knows no family of models by name."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel, free_memory
from torch import Tensor
from tqdm.auto import tqdm

from gralora_diffusion.adapters.adapter_file import WEIGHTS_NAME, save_adapter
from gralora_diffusion.base_models.loading import existing_models, load_base
from gralora_diffusion.base_models.quantization import quantization_facts
from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.process import are_several, print_safely
from gralora_diffusion.training.checkpoints.resume import describe_base
from gralora_diffusion.training.checkpoints.state import RunState
from gralora_diffusion.training.checkpoints.store import CheckpointStore
from gralora_diffusion.training.checks.base import resolve_defaults
from gralora_diffusion.training.checks.options import validate
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.data_module import Batches
from gralora_diffusion.training.data.image_folder import Example
from gralora_diffusion.training.data.sampler import Prefetcher
from gralora_diffusion.training.data.seeds import seed_from
from gralora_diffusion.training.optimization.adapters import (
    adapter_facts,
    adapter_parameters,
    add_adapters,
    inference_weights,
)
from gralora_diffusion.training.optimization.initial_adapter import (
    InitialValues,
    set_initial_values,
)
from gralora_diffusion.training.optimization.objectives import make_objective
from gralora_diffusion.training.optimization.optimizers import build_lr_scheduler, build_optimizer
from gralora_diffusion.training.optimization.step import (
    BatchBuilder,
    DenoisingBatch,
    DenoisingStep,
    TrainingDiverged,
    mean_loss,
)
from gralora_diffusion.training.outputs.metadata import time_metadata, training_metadata
from gralora_diffusion.training.outputs.metrics import MetricsFile
from gralora_diffusion.training.outputs.output_dir import finish, make_repository, own_folder, start
from gralora_diffusion.training.outputs.validation import generate_validation
from gralora_diffusion.training.runtime.acceleration import (
    DTYPES,
    PeakMemory,
    accelerate_left_as_it_was,
    device_name,
    enable_memory_savings,
    make_accelerator,
    share_only_what_is_trained,
    trackable,
)
from gralora_diffusion.training.runtime.agreement import check_alike, from_first, together

from .preparation import complete_class_images, find_beginning

logger = logging.getLogger(__name__)


def train(config: TrainingConfig) -> Path:
    """Train an adapter as ``config`` says; return the output folder.

    With ``dry_run`` only say what would be trained and what memory it would take; see ``plan``.

    Raises:
        ConfigError: something in the options or the base is wrong; nothing was written.
        DataError: the same of the pictures and captions.
        TrainingDiverged: the loss is no number any more.
        CheckpointError: a checkpoint could not be written, or is none of this run.
        OtherProcessFailed: one of these was raised in another process of the run.
    """
    if not are_several():
        validate(config)  # before accelerate is asked
    store = CheckpointStore(config.output_dir, config.checkpoints_total_limit)
    with accelerate_left_as_it_was(), ExitStack() as held:
        accelerator = make_accelerator(config)
        if not config.dry_run:
            from_first(accelerator, lambda: own_folder(config, held))
        found = find_beginning(config, store, accelerator)
        family = found.family
        if config.dry_run:
            # which themselves look at how a run goes
            from gralora_diffusion.training.dry_run.formatting import format_plan
            from gralora_diffusion.training.dry_run.plan import plan_run

            plan = plan_run(config, family, found.images, found.class_images, accelerator)
            if accelerator.is_main_process:
                print_safely(format_plan(plan))
            return Path(config.output_dir)
        from_first(accelerator, lambda: make_repository(config))
        # before the base is loaded to be trained: two of them would be too much for some
        class_images = complete_class_images(config, found, accelerator)
        trainer = Trainer(
            config, family, found.images, class_images, accelerator, store, found.initial
        )
        if found.resume is not None:
            together(accelerator, partial(trainer.resume, *found.resume))
        else:
            from_first(accelerator, store.delete_all)
        trainer.run()
        accelerator.end_training()
    return Path(config.output_dir)


class Trainer:
    """A run, ready to go: base, adapter, data, optimizer.

    Args:
        pipe: the base if it is loaded already, bare and frozen; by default it is loaded.
        put_on: puts what is to be trained on it, and returns the components that have it.
    """

    def __init__(
        self,
        config: TrainingConfig,
        family: ModelFamily,
        images: list[Example],
        class_images: list[Example],
        accelerator: Accelerator,
        store: CheckpointStore,
        initial: InitialValues | None = None,
        *,
        pipe: Any = None,
        attach: Callable[[Any, ModelFamily, TrainingConfig], tuple[str, ...]] = add_adapters,
    ) -> None:
        self.family, self.accelerator, self.store = family, accelerator, store
        device, dtype = accelerator.device, DTYPES[accelerator.mixed_precision]

        # --- the frozen base, and the adapter on it
        self.pipe = load_base(config, family, dtype) if pipe is None else pipe
        self.config = config = resolve_defaults(
            config, family, self.pipe, accelerator.mixed_precision
        )
        components = attach(self.pipe, family, config)
        set_initial_values(self.pipe, initial or {})
        models = [getattr(self.pipe, name) for name in components]
        enable_memory_savings(config, getattr(self.pipe, family.denoiser), models, device)

        # --- encode what stays the same; of the encoders only what is needed later stays
        self.data = data = Batches(config, family, self.pipe, images, class_images, accelerator)
        needed = {*components, *(family.all_text_encoders if config.train_text_encoder else ())}
        if not config.cache_latents:
            needed.add("vae")
        for model in existing_models(self.pipe, needed):
            model.to(device)
        free_memory()

        if accelerator.num_processes > 1:
            base = {k: v for k, v in describe_base(self.pipe, config).items() if k != "source"}
            facts = {"the base is": base, "what each step trains on is": data.digest}
            check_alike(accelerator, facts, "Give every process the same")

        # --- objective and optimizer
        objective = make_objective(config, family, self.pipe)
        step = DenoisingStep(self.pipe, family, objective, components, config.encoding)
        step.train()
        denoiser, *encoders = (adapter_parameters(self.pipe, name) for name in components)
        encoder_parameters = [parameter for group in encoders for parameter in group]
        self.parameters = [*denoiser, *encoder_parameters]
        optimizer = build_optimizer(
            config, denoiser, encoder_parameters, world_size=accelerator.num_processes
        )
        self.steps_per_epoch = math.ceil(len(data) / data.samples_per_step)
        self.max_steps = config.max_train_steps or config.num_train_epochs * self.steps_per_epoch
        self.lr_scheduler = build_lr_scheduler(config, optimizer, self.max_steps)
        share_only_what_is_trained(step)
        # the loader and the schedule are ours alone: both already know of processes and steps
        self.step, self.optimizer = accelerator.prepare(step, optimizer)
        self.rows = BatchBuilder(step, data, config, device, dtype)
        self.memory = PeakMemory(device)
        self.ema = None
        if config.use_ema:
            self.ema = EMAModel(self.parameters, decay=config.ema_decay, foreach=True)
            self.ema.to(device)
        self.state = RunState(
            config,
            self.pipe,
            family,
            components,
            self.parameters,
            self.optimizer,
            self.lr_scheduler,
            self.ema,
            accelerator,
            data.digest,
            partial(training_metadata, config, family, self.pipe, data, self.max_steps),
        )

    def resume(self, step: int, path: Path) -> None:
        """Go on from the checkpoint of ``step``.

        Raises:
            ConfigError: the run is to end before that step.
            CheckpointError: it is not readable or of another run.
        """
        if step > self.max_steps:
            raise ConfigError(
                [
                    f"{path} is past the end of this run, step {self.max_steps}. Give a higher "
                    "--max_train_steps or --num_train_epochs"
                ]
            )
        self.state.load(path)
        if step == self.max_steps:
            logger.warning(
                "nothing is left to train: step %d is the last. To go on, give a higher "
                "--max_train_steps",
                step,
            )

    def run(self) -> None:
        """Train to the end, then write the adapter, its pictures and its card."""
        config, accelerator, state = self.config, self.accelerator, self.state
        folder, first_step = Path(config.output_dir), state.step
        metrics = None

        def begin() -> None:
            nonlocal metrics
            start(folder, config)
            self.store.clean()
            metrics = MetricsFile(folder, first_step)

        from_first(accelerator, begin)
        accelerator.init_trackers("gralora-dreambooth", config=trackable(config))
        started, began = time.time(), time.perf_counter()
        self._validate_if_due()
        with closing(self.steps(metrics)) as steps:
            for step in steps:
                if step % config.checkpointing_steps == 0:
                    from_first(accelerator, partial(self.store.write, step, state.save))
                self._validate_if_due()
        seconds = time.perf_counter() - began
        with inference_weights(self.parameters, self.optimizer, self.ema):
            if accelerator.is_main_process:
                adapter = state.adapter()
                adapter.metadata |= time_metadata(started)
                save_adapter(adapter, folder / WEIGHTS_NAME)
            grid = None if config.skip_final_inference else self._draw_validation()
        if metrics is not None:
            facts = {
                "steps": state.step,
                "samples per step": self.data.samples_per_step,
                "trained parameters": sum(p.numel() for p in self.parameters),
                **adapter_facts([getattr(self.pipe, name) for name in state.components], config),
                **quantization_facts(config, self.pipe),
                "seconds per step": round(seconds / max(1, state.step - first_step), 3),
                "device": device_name(accelerator.device),
                "precision": accelerator.mixed_precision,
            }
            if self.memory.bytes is not None:
                facts["peak memory of the steps, GiB"] = round(self.memory.bytes / 2**30, 3)
            finish(folder, config, self.family.name, metrics.read(), facts, grid)

    def steps(
        self, metrics: MetricsFile | None = None, *, progress: bool = True
    ) -> Generator[int, None, None]:
        """Make the optimizer steps that are left, one at a time; yield how many are done by then.

        Args:
            metrics: what is written down; the other processes write nothing.
            progress: show a bar.
        """
        accelerator, state = self.accelerator, self.state
        batches = self.data.steps(state.step, self.max_steps)
        rows = Prefetcher(self.rows.rows(*batch) for batch in batches)
        bar = tqdm(
            initial=state.step,
            total=self.max_steps,
            desc="training",
            unit="step",
            disable=not (progress and accelerator.is_local_main_process),
        )
        with bar:  # an error comes after it, on its own line
            while state.step < self.max_steps:
                with self.memory:
                    loss = self._optimizer_step(rows)
                lr = self.optimizer.param_groups[0]["lr"]
                if self.lr_scheduler is not None:
                    self.lr_scheduler.step()
                if self.ema is not None:
                    self.ema.step(self.parameters)
                state.step += 1
                if metrics is not None:
                    metrics.add({"step": state.step, "loss": loss, "lr": lr})
                accelerator.log({"loss": loss, "lr": lr}, step=state.step)
                # without drawing it, which update does now and then
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}", refresh=False)
                bar.update()
                yield state.step

    def _optimizer_step(self, ahead: Prefetcher[list[DenoisingBatch]]) -> float:
        """Forward and backward passes of one step; returns the mean loss over all processes."""
        config, accelerator = self.config, self.accelerator
        total = torch.zeros((), device=accelerator.device)
        for micro in range(config.gradient_accumulation_steps):
            with accelerator.accumulate(self.step):
                rows = next(ahead)
                # dropout, the only draw from the global generator, depends on the step alone
                process = accelerator.process_index
                torch.manual_seed(seed_from(config.seed, "step", self.state.step, micro, process))
                loss = mean_loss(self.step(rows), rows)
                accelerator.backward(loss)
                total += loss.detach() / config.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm)
                ahead.prepare()  # while the device still computes; to read the loss is to wait
                if accelerator.sync_gradients:
                    mean = self._checked(total, norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return mean

    def _checked(self, loss: Tensor, gradient_norm: Tensor) -> float:
        mean = float(self.accelerator.reduce(loss, "mean"))
        # with fp16 a gradient overflows now and then, which accelerate's scaler sees to
        scaled = self.accelerator.scaler is not None
        if math.isfinite(mean) and (scaled or math.isfinite(gradient_norm)):
            return mean
        whole = self.store.list()
        kept = str(whole[-1][1]) if whole else "none was written yet"
        raise TrainingDiverged(
            f"step {self.state.step + 1}: the loss is {mean:g} and the norm of its gradient "
            f"{float(gradient_norm):g}; stopped before that reached the adapter.",
            f"Last checkpoint: {kept}. Give a lower --learning_rate (it is "
            f"{self.config.learning_rate:g}) or --mixed_precision bf16 in place of fp16, and start "
            "again or resume.",
        )

    def _validate_if_due(self) -> None:
        """Draw before the first step and every so often, but not at the end, which has its own."""
        every = self.config.validation_steps
        every = every or self.config.validation_epochs * self.steps_per_epoch
        if self.state.step % every == 0 and self.state.step < self.max_steps:
            with inference_weights(self.parameters, self.optimizer, self.ema):
                self._draw_validation()

    def _draw_validation(self) -> Path | None:
        if not self.config.validation_prompt:
            return None
        step, accelerator = self.state.step, self.accelerator
        draw = partial(generate_validation, self.pipe, self.family, self.config, step, accelerator)
        return from_first(accelerator, draw)
