"""A run in stages: models, data and optimizer, the steps, what is saved. For any family."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing
from functools import partial
from itertools import chain
from math import ceil, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel, free_memory
from torch import Tensor, nn
from tqdm.auto import tqdm

from gralora_diffusion.adapters.adapter_file import WEIGHTS_NAME, save_adapter
from gralora_diffusion.adapters.compatibility import gralora_layers
from gralora_diffusion.base_models.loading import existing_models, load_base
from gralora_diffusion.base_models.quantization import quantization_facts
from gralora_diffusion.base_models.streaming import StreamedBlocks, Streaming
from gralora_diffusion.base_models.unread_weights import UnreadModels, unread_models
from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.deprecated_paths import names_of
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.checkpoints.best import keep_best, restore_best
from gralora_diffusion.training.checkpoints.resume import describe_base, past_the_end
from gralora_diffusion.training.checkpoints.state import RunState
from gralora_diffusion.training.checkpoints.store import CheckpointStore
from gralora_diffusion.training.checks.base import resolve_defaults
from gralora_diffusion.training.checks.controls import (
    check_controls_of_base,
    check_sharded_controls,
)
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.config.validation_prompts import validation_prompts
from gralora_diffusion.training.data.data_module import Batches
from gralora_diffusion.training.data.example_table import ExampleTable
from gralora_diffusion.training.data.held_out import held_out_config, held_out_digest
from gralora_diffusion.training.data.image_folder import Example
from gralora_diffusion.training.data.sampler import Prefetcher
from gralora_diffusion.training.data.seeds import seed_from
from gralora_diffusion.training.data.sets import described_sets
from gralora_diffusion.training.optimization.adapters import (
    adapter_facts,
    adapter_parameters,
    add_adapters,
    inference_weights,
    second_factors,
)
from gralora_diffusion.training.optimization.held_out import (
    HeldOutLoss,
    HeldOutRecord,
    Measurement,
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
from gralora_diffusion.training.outputs.metadata import (
    FILLS,
    control_facts,
    time_metadata,
    training_metadata,
)
from gralora_diffusion.training.outputs.metrics import MetricsFile, StepNumbers
from gralora_diffusion.training.outputs.output_dir import finish, start
from gralora_diffusion.training.outputs.summary import (
    summary_of_held_out,
    summary_of_masks,
    summary_of_training,
    why_overfitting_ends,
)
from gralora_diffusion.training.outputs.validation import generate_validation
from gralora_diffusion.training.runtime.acceleration import (
    DTYPES,
    PeakMemory,
    device_name,
    enable_memory_savings,
    share_only_what_is_trained,
    start_trackers,
)
from gralora_diffusion.training.runtime.agreement import check_alike, from_all, from_first, together
from gralora_diffusion.training.runtime.control import RunControl
from gralora_diffusion.training.runtime.offloading import NOTHING, Offloading
from gralora_diffusion.training.runtime.sharding import (
    Sharding,
    parts_to_shard,
    warn_of_whole,
)

if not TYPE_CHECKING:
    __getattr__ = names_of(__name__)

logger = logging.getLogger(__name__)

#: fp16 steps in a row that may overflow. The scale begins at 2^16 and is halved each time.
_SKIPPED_STEPS = 20


class Trainer:
    """A run in stages: ``set_up``, perhaps ``resume``, ``train``, ``save``, ``clean_up``.

    Construction is cheap, because ``set_up`` loads the base. ``steps`` is the part of ``train``
    that does not write files of its own.

    Args:
        initial: the adapter's initial values, in place of random ones.
        held_out: images whose loss is measured.
        pipe: the bare, frozen base if it is already loaded; by default it is loaded.
        attach: attaches an adapter to the base, and returns the components that have it.
        sharding: how the denoiser's frozen weights are shared out over the processes, if they are.
        offloading: what is streamed from the CPU's memory.
        control: what the run is asked to do meanwhile; by default nobody can ask.

    Attributes:
        stopped: the run was asked to stop, and did so before its last step.
    """

    def __init__(
        self,
        config: TrainingConfig,
        family: ModelFamily,
        images: Sequence[Example],
        class_images: Sequence[Example],
        accelerator: Accelerator,
        store: CheckpointStore,
        initial: InitialValues | None = None,
        *,
        held_out: Sequence[Example] = (),
        pipe: Any = None,
        attach: Callable[[Any, ModelFamily, TrainingConfig], tuple[str, ...]] = add_adapters,
        sharding: Sharding | None = None,
        offloading: Offloading = NOTHING,
        control: RunControl | None = None,
    ) -> None:
        self.config, self.family = config, family
        self.images, self.class_images, self.held_out = images, class_images, list(held_out)
        self.accelerator, self.store = accelerator, store
        self.initial, self.pipe, self.attach = initial or {}, pipe, attach
        self.sharding, self.offloading = sharding, offloading
        self.streamed: StreamedBlocks | None = None
        self.unread = UnreadModels()  # until they are sharded
        self.dtype = DTYPES[accelerator.mixed_precision]
        self.memory = PeakMemory(accelerator.device)
        self.control = control or RunControl()
        self.asked = self.stopped = False
        self.skipped = 0  # steps in a row
        self.metrics: MetricsFile | None = None  # only the first process writes it

    # -- set up ------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Load the base, attach the adapter, encode the data, make the optimizer."""
        self._set_up_models()
        self._set_up_data()
        self._set_up_optimizer()
        self.state = RunState(
            self.config,
            self.pipe,
            self.base,
            self.family,
            self.components,
            self.parameters,
            self.optimizer,
            self.lr_scheduler,
            self.ema,
            self.accelerator,
            self.data.digest,
            partial(
                training_metadata, self.config, self.family, self.pipe, self.data, self.max_steps
            ),
            HeldOutRecord(self.held_out_digest) if self.held_out else None,
        )

    def _set_up_models(self) -> None:
        """Load the frozen base and attach the adapter."""
        family, accelerator = self.family, self.accelerator
        if self.pipe is None:
            if self.sharding is not None:
                names = parts_to_shard(self.config, family)
                self.unread = unread_models(self.config, family, names, self.dtype)
            self.pipe = load_base(self.config, family, self.dtype, models=self.unread.models)
            if accelerator.is_main_process:
                warn_of_whole(self.pipe, self.unread)
        self.config = resolve_defaults(self.config, family, self.pipe, accelerator.mixed_precision)
        self.components = self.attach(self.pipe, family, self.config)
        set_initial_values(self.pipe, self.initial)
        models = [getattr(self.pipe, name) for name in self.components]
        denoiser = getattr(self.pipe, family.denoiser)
        enable_memory_savings(self.config, denoiser, models, accelerator.device)

    def _set_up_data(self) -> None:
        """Encode the data, and move only the models that the steps need to the device."""
        config, family, accelerator = self.config, self.family, self.accelerator
        every_image = ExampleTable(chain(self.images, self.held_out))
        self.prompts = from_first(accelerator, lambda: validation_prompts(config))
        self.controls = together(
            accelerator,
            lambda: check_controls_of_base(config, family, self.pipe, every_image, self.prompts),
        )
        if self.sharding is not None:
            check_sharded_controls(config, family.control_count(self.pipe), every_image)
        self.base = describe_base(self.pipe, config, self.unread.weights)  # before it is in parts
        shared = False
        if self.sharding is not None:
            shared = self.sharding.shard_encoders(
                self.pipe, family, accelerator.device, self.unread
            )
        batches = partial(Batches, stream_encoders=self.offloading.encoders, encode_together=shared)
        self.data = batches(config, family, self.pipe, self.images, self.class_images, accelerator)
        if self.held_out:
            measured = held_out_config(config)
            self.held_out_data = batches(
                measured, family, self.pipe, self.held_out, [], accelerator
            )
            self.held_out_digest = held_out_digest(measured, self.held_out_data)
        self.steps_per_epoch = ceil(len(self.data) / self.data.samples_per_step)
        self.max_steps = config.max_train_steps or config.num_train_epochs * self.steps_per_epoch
        needed = {*self.components}
        if config.train_text_encoder:
            needed.update(family.all_text_encoders)
        if not config.cache_latents:
            needed.add("vae")
        denoiser = getattr(self.pipe, family.denoiser)
        for model in existing_models(self.pipe, needed):
            if model is denoiser and self.sharding is not None:
                unread = self.unread.weights.get(family.denoiser)
                self.sharding.shard(model, accelerator.device, unread)
            elif model is denoiser and self.offloading.denoiser is not None:
                self.streamed = self._stream(self.offloading.denoiser, denoiser)
            else:
                model.to(accelerator.device)
        free_memory()
        if accelerator.num_processes > 1:
            base = {k: v for k, v in self.base.items() if k != "source"}
            facts = {"the base is": base, "the hash of the samples is": self.data.digest}
            check_alike(accelerator, facts, "Give the same base and data to every process")

    def _stream(self, streaming: Streaming, denoiser: nn.Module) -> StreamedBlocks:
        try:
            return streaming.start(denoiser, self.accelerator.device)
        except ValueError as error:
            raise ConfigError(
                [f"--offload_base: {error}. Leave it out, or give --offload_base none"]
            ) from error

    def _set_up_optimizer(self) -> None:
        """Make the step as one module, its optimizer and its schedule."""
        config, family, accelerator = self.config, self.family, self.accelerator
        objective = make_objective(config, family, self.pipe)
        step = DenoisingStep(self.pipe, family, objective, self.components, config.encoding)
        step.train()
        denoiser, *encoders = (adapter_parameters(self.pipe, name) for name in self.components)
        encoder_parameters = [parameter for group in encoders for parameter in group]
        self.parameters = [*denoiser, *encoder_parameters]
        optimizer = build_optimizer(
            config,
            denoiser,
            encoder_parameters,
            second_factors=[p for n in self.components for p in second_factors(self.pipe, n)],
            samples_per_step=self.data.samples_per_step,
        )
        self.lr_scheduler = build_lr_scheduler(config, optimizer, self.max_steps)
        share_only_what_is_trained(step)
        # loader and schedule are not prepared, because they already handle processes and steps
        # all models are on the device already, but for parts of a base that stay on the CPU
        whole = self.sharding is None and self.streamed is None
        self.step, self.optimizer = accelerator.prepare(
            step, optimizer, device_placement=[whole, True]
        )
        self.batch_builder = BatchBuilder(step, self.data, config, accelerator.device, self.dtype)
        if self.held_out:
            measured = self.held_out_data
            self.held_out_loss = HeldOutLoss(step, measured, measured.config, self.dtype)
        self.ema = None
        if config.use_ema:
            self.ema = EMAModel(self.parameters, decay=config.ema_decay, foreach=True)
            self.ema.to(accelerator.device)

    def summary(self) -> str:
        """Describe the adapter and the steps, after ``set_up``."""
        models = {name: getattr(self.pipe, name) for name in self.components}
        return summary_of_training(
            self.max_steps,
            self.steps_per_epoch,
            self.data.samples_per_step,
            {name: sum(1 for _ in gralora_layers(model)) for name, model in models.items()},
            sum(parameter.numel() for parameter in self.parameters),
            self.data.instance.fill,
        )

    def resume(self, step: int, path: Path) -> None:
        """Resume from the checkpoint of ``step``.

        Raises:
            ConfigError: the run ends before that step.
            CheckpointError: it is not readable or belongs to another run.
        """
        if step > self.max_steps:
            raise ConfigError([past_the_end(path, self.max_steps)])
        self.state.load(path)
        if (record := self.state.held_out) is not None and self.accelerator.is_main_process:
            restore_best(self.config.output_dir, path if record.base else None)
        if step == self.max_steps:
            logger.warning(
                "nothing is left to train: step %d is the last. To continue, give a higher "
                "--max_train_steps",
                step,
            )

    # -- train -------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run the remaining steps, with checkpoints and validation images in between."""
        config, accelerator, state = self.config, self.accelerator, self.state
        self.first_step, self.began = state.step, time.time()
        from_first(accelerator, self._start_output)
        start_trackers(accelerator, config)
        self.control.begin(state.step, self.max_steps)
        began = time.perf_counter()
        self._validate_if_due()
        self._measure_first()
        with closing(self.steps(self.metrics)) as steps:
            for step in () if self.overfits() else steps:
                requests = self._requests() if self.asked else frozenset[str]()
                asked = requests & {"save", "stop"} or self.overfits()
                if asked or step % config.checkpointing_steps == 0:
                    from_first(accelerator, partial(self.store.write, step, state.save))
                if "save" in requests:
                    self.control.answer("save", f"wrote checkpoint-{step}")
                if "stop" in requests and step < self.max_steps:
                    if "sample" in requests:
                        self.control.answer("sample", "generated no images, because the run stops")
                    self.stopped = True
                    break
                self._validate_if_due("sample" in requests)
                if self.overfits():
                    break
        self.seconds = time.perf_counter() - began

    def _start_output(self) -> None:
        folder = Path(self.config.output_dir)
        start(folder, self.config)
        self.store.clean()
        self.metrics = MetricsFile(folder, self.state.step)

    def steps(
        self, metrics: MetricsFile | None = None, *, progress: bool = True
    ) -> Generator[int, None, None]:
        """Run the remaining optimizer steps one by one; yield the number of finished steps.

        Args:
            metrics: file for the numbers of each step; only one process may have it.
            progress: show a bar.
        """
        state = self.state
        data = self.data.steps(state.step, self.max_steps)
        batches = Prefetcher(self.batch_builder.build(*samples) for samples in data)
        bar = tqdm(
            initial=state.step,
            total=self.max_steps,
            desc="training",
            unit="step",
            disable=not (progress and self.accelerator.is_local_main_process),
        )
        with bar:  # closed before an error is printed on its own line
            while state.step < self.max_steps:
                began = time.perf_counter()
                with self.memory:
                    loss, norm = self._optimizer_step(batches)
                speed = self.data.samples_per_step / (time.perf_counter() - began)
                lr = self.optimizer.param_groups[0]["lr"]
                # if fp16 overflowed, the scaler has skipped the step; schedule and average follow
                if self.lr_scheduler is not None and isfinite(norm):
                    self.lr_scheduler.step()
                if self.ema is not None and isfinite(norm):
                    self.ema.step(self.parameters)
                state.step += 1
                numbers = StepNumbers(
                    state.step, loss, norm, lr, speed, self.memory.gib, self._measure_if_due()
                )
                if metrics is not None:
                    metrics.add(numbers.row())
                self.control.progress(state.step, loss if isfinite(loss) else None)
                self.accelerator.log(numbers.to_log(), step=state.step)
                # update redraws the bar now and then
                bar.set_postfix_str(str(numbers), refresh=False)
                bar.update()
                yield state.step

    def _optimizer_step(self, ahead: Prefetcher[list[DenoisingBatch]]) -> tuple[float, float]:
        """Run the forward and backward passes of one step, and the step itself.

        Returns the mean loss over all processes, and the norm of its gradient before clipping.
        """
        config, accelerator = self.config, self.accelerator
        total = torch.zeros((), device=accelerator.device)
        for micro in range(config.gradient_accumulation_steps):
            with accelerator.accumulate(self.step):
                batches = next(ahead)
                # dropout alone uses the global generator, and must depend on the step alone
                process = accelerator.process_index
                torch.manual_seed(seed_from(config.seed, "step", self.state.step, micro, process))
                loss = mean_loss(self.step(batches), batches)
                accelerator.backward(loss)
                total += loss.detach() / config.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm)
                ahead.prepare()  # while the device still computes; reading the loss waits for it
                if accelerator.sync_gradients:
                    numbers = self._checked(total, norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return numbers

    def _checked(self, loss: Tensor, gradient_norm: Tensor) -> tuple[float, float]:
        """Return the mean loss and the norm as numbers, read from the device together.

        Whether any process was asked for something travels along, so that all of them learn of it
        in the same step and without another message.
        """
        mine = torch.full_like(loss, float(self.control.is_asked()))
        shared = self.accelerator.reduce(torch.stack([loss, mine]), "mean")
        mean, asked, norm = torch.cat([shared, gradient_norm.reshape(1)]).tolist()
        self.asked = asked > 0
        # with fp16, values overflow now and then; the scaler skips these steps and lowers its scale
        skips = self.accelerator.scaler is not None and not isfinite(norm)
        self.skipped = self.skipped + 1 if skips else 0
        if (isfinite(mean) and isfinite(norm)) or 0 < self.skipped <= _SKIPPED_STEPS:
            return mean, norm
        repeated = f" after {self.skipped} such steps in a row" if skips else ""
        whole = self.store.list()
        kept = str(whole[-1][1]) if whole else "none was written yet"
        raise TrainingDiverged(
            f"step {self.state.step + 1}: the loss is {mean:g} and the norm of its gradient "
            f"{norm:g}; stopped before the adapter was updated{repeated}.",
            f"Last checkpoint: {kept}. Give a lower --learning_rate (it is "
            f"{self.config.learning_rate:g}) or --mixed_precision bf16 instead of fp16, and start "
            "again or resume.",
        )

    def _requests(self) -> frozenset[str]:
        """Return what any process was asked for; every process must call it."""
        return frozenset().union(*from_all(self.accelerator, self.control.take()))

    def _validate_if_due(self, requested: bool = False) -> None:
        """Generate images before the first step and at intervals; ``save`` does so at the end."""
        every = self.config.validation_steps
        every = every or self.config.validation_epochs * self.steps_per_epoch
        grid = None
        if requested or (self.state.step % every == 0 and self.state.step < self.max_steps):
            with self.inference_weights():
                grid = self._generate_validation()
        if requested:
            without = "interrupted" if self.prompts else "no --validation_prompt"
            where = grid and grid.relative_to(self.config.output_dir).as_posix()
            self.control.answer("sample", f"wrote {where}" if where else f"no images: {without}")

    def _generate_validation(self) -> Path | None:
        if not self.prompts:
            return None
        # a sharded denoiser computes in all processes at once, and cannot stop in one of them
        alone = self.sharding is None
        work = partial(
            generate_validation,
            self.pipe,
            self.family,
            self.config,
            self.prompts,
            self.state.step,
            self.accelerator,
            controls=self.controls,
            stream_encoders=self.offloading.encoders,
            stops=self.control.is_asked_to_stop if alone else lambda: False,
        )
        return (from_first if alone else together)(self.accelerator, work)

    # -- held-out images ---------------------------------------------------------------------------

    def _measure_first(self) -> None:
        """Measure before the first step, whose row in the metrics has nothing else."""
        if self.state.step == 0 and (measured := self._measure_if_due()) is not None:
            if self.metrics is not None:
                self.metrics.add({"step": 0, "loss": None, "held_out": measured.to_dict()})
            self.accelerator.log(measured.to_log(), step=0)

    def _measure_if_due(self) -> Measurement | None:
        """Measure the held-out images at intervals, and keep the adapter if it is the best."""
        step, record = self.state.step, self.state.held_out
        if record is None or step % self.config.held_out_steps:
            return None
        with self.inference_weights():
            if not record.base:
                record.base = self.held_out_loss.measure(adapted=False)
            measured = record.add(step, self.held_out_loss.measure(adapted=True))
            if measured is None:
                logger.warning(
                    "step %d: the loss of the held-out images is not finite; this measurement is "
                    "left out",
                    step,
                )
            elif record.best_step == step:
                from_first(
                    self.accelerator,
                    lambda: keep_best(self.config.output_dir, self.state.adapter()),
                )
        return measured

    def overfits(self) -> bool:
        """Whether the run has been worse than its best for as long as ``stop_when`` allows."""
        record = self.state.held_out
        if self.config.stop_when != "overfit" or record is None:
            return False
        return record.worse >= self.config.overfit_patience

    def why_it_ended(self) -> str:
        """Say why a run ended that overfits."""
        record = self.state.held_out
        assert record is not None
        folder = Path(self.config.output_dir)
        return why_overfitting_ends(folder, self.state.step, self.max_steps, record)

    def inference_weights(self) -> AbstractContextManager[None]:
        """Give the trained parameters the weights for inference, see ``inference_weights``."""
        return inference_weights(self.parameters, self.optimizer, self.ema)

    # -- save --------------------------------------------------------------------------------------

    def save(self) -> list[dict[str, Any]] | None:
        """Write the adapter, its validation images and its card, after ``train``.

        Returns the metrics of each step, and None in processes that do not write them.
        """
        folder = Path(self.config.output_dir)
        self.control.say("saving")
        with self.inference_weights():
            if self.accelerator.is_main_process:
                adapter = self.state.adapter()
                adapter.metadata |= time_metadata(self.began)
                save_adapter(adapter, folder / WEIGHTS_NAME)
            skips = self.config.skip_final_inference or self.stopped
            grid = None if skips else self._generate_validation()
        if self.metrics is None:
            return None
        rows, facts = self.metrics.read(), self._facts()
        whole = not self.stopped
        finish(folder, self.config, self.family.name, rows, facts, grid, self.prompts, whole)
        if self.stopped:
            self.control.answer("stop", f"wrote checkpoint-{self.state.step} and the adapter")
        self.control.discard_requests()
        self.control.say("stopped" if self.stopped else "finished")
        return rows

    def _facts(self) -> dict[str, Any]:
        """Return facts on the run for the model card."""
        config, steps, record = self.config, self.state.step, self.state.held_out
        sets = described_sets(config, self.images)
        facts = {
            "steps": steps,
            "samples per step": self.data.samples_per_step,
            **({"masks": summary_of_masks(config, self.images)} if config.masked_loss else {}),
            **({"sets of images": "; ".join(sets)} if sets else {}),
            **({"held-out loss": summary_of_held_out(record)} if record else {}),
            **control_facts(self.images),
            **({FILLS: self.data.instance.fill} if self.data.instance.fill else {}),
            "trained parameters": sum(p.numel() for p in self.parameters),
            **adapter_facts([getattr(self.pipe, name) for name in self.components], config),
            **quantization_facts(config, self.pipe),
            "seconds per step": round(self.seconds / max(1, steps - self.first_step), 3),
            "device": device_name(self.accelerator.device),
            "precision": self.accelerator.mixed_precision,
        }
        if self.memory.gib is not None:
            facts["peak memory of the steps, GiB"] = round(self.memory.gib, 3)
        return facts

    def clean_up(self) -> None:
        """Close the trackers, and the connections between processes; end the streaming."""
        if self.streamed is not None:
            self.streamed.close()
        self.accelerator.end_training()
