"""A training from its options to its output folder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from gralora_diffusion.io.precision import tf32_products
from gralora_diffusion.io.process import are_several, print_safely
from gralora_diffusion.io.stop_signals import StopSignals
from gralora_diffusion.training.checkpoints.best import restore_best
from gralora_diffusion.training.checkpoints.store import CheckpointStore
from gralora_diffusion.training.checks.options import validate
from gralora_diffusion.training.config.data_file import with_data_file
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.outputs.output_dir import make_repository, own_output_dir
from gralora_diffusion.training.outputs.summary import (
    how_to_resume,
    summary_of_inputs,
    summary_of_result,
)
from gralora_diffusion.training.runtime.acceleration import (
    accelerate_left_as_it_was,
    check_sharding,
    device_name,
    make_accelerator,
)
from gralora_diffusion.training.runtime.agreement import from_first, together
from gralora_diffusion.training.runtime.control import RunControl
from gralora_diffusion.training.runtime.memory import DeviceMemory, device_memory
from gralora_diffusion.training.runtime.offloading import Offloading, check_offloading, obstacles
from gralora_diffusion.training.runtime.sharding import Sharding, requested_sharding

from .loop import Trainer
from .preparation import Beginning, complete_class_images, find_beginning


def train(config: TrainingConfig, signals: StopSignals | None = None) -> Path:
    """Train an adapter with the options in ``config``; return the output folder.

    With ``dry_run``, only print what would be trained and how much memory it would need.

    Args:
        signals: signals that end the run after a step, with a checkpoint and the adapter; by
            default only a request in the output folder does, see ``runtime.control``.

    Raises:
        ConfigError: the options or the base have problems, or a checkpoint has other options;
            nothing was written.
        DataError: images or captions have problems; nothing was written.
        TrainingDiverged: the loss is no longer a number.
        CheckpointError: a checkpoint could not be written or read, or has another base.
        OtherProcessFailed: one of these was raised in another process of the run.
    """
    if not are_several():
        validate(config)  # before accelerate is asked
    config = with_data_file(config)
    with (
        accelerate_left_as_it_was(),
        tf32_products(config.allow_tf32),
        requested_sharding() as sharding,
    ):
        accelerator = make_accelerator(config)
        if sharding is not None:
            check_sharding(config, accelerator)
        check_offloading(config, accelerator, sharding)
        if config.dry_run:
            _print_plan(config, accelerator, sharding)
        else:
            with own_output_dir(config, accelerator):
                _train(config, accelerator, sharding, signals)
    return Path(config.output_dir)


def _train(
    config: TrainingConfig,
    accelerator: Accelerator,
    sharding: Sharding | None,
    signals: StopSignals | None,
) -> None:
    folder = Path(config.output_dir)
    control = RunControl(folder if accelerator.is_main_process else None, signals)
    control.discard_requests()
    store = CheckpointStore(folder, config.checkpoints_total_limit)
    found = find_beginning(config, store, accelerator)
    offloading = from_first(accelerator, lambda: _inputs(config, found, accelerator, sharding))
    from_first(accelerator, lambda: make_repository(config))
    # before the base for training is loaded, because two bases may not fit into memory
    class_images = complete_class_images(config, found, accelerator, offloading, sharding)
    trainer = Trainer(
        config,
        found.family,
        found.images,
        class_images,
        accelerator,
        store,
        found.initial,
        held_out=found.held_out,
        sharding=sharding,
        offloading=offloading,
        control=control,
    )
    trainer.set_up()
    from_first(accelerator, lambda: print_safely(trainer.summary()))
    if found.resume is not None:
        together(accelerator, partial(trainer.resume, *found.resume))
    else:
        from_first(accelerator, lambda: _delete_earlier(store))
    trainer.train()
    rows = trainer.save()
    trainer.clean_up()
    if rows is not None:
        print_safely(summary_of_result(folder, rows, trainer.seconds, trainer.state.held_out))
        if trainer.overfits():
            print_safely(trainer.why_it_ended())
        if trainer.stopped:
            print_safely(how_to_resume(folder, trainer.state.step, trainer.max_steps))


def _delete_earlier(store: CheckpointStore) -> None:
    """Delete what an earlier run in the folder would be resumed from, and its best adapter."""
    store.delete_all()
    restore_best(store.folder, None)


def _inputs(
    config: TrainingConfig, found: Beginning, accelerator: Accelerator, sharding: Sharding | None
) -> Offloading:
    """Check the memory, and print what is known before anything is loaded.

    Returns what is to be streamed from the CPU's memory.

    Raises:
        ConfigError: the run needs far more memory than there is.
    """
    from gralora_diffusion.training.dry_run.memory_check import check_memory

    family, images, classes = found.family, found.images, found.class_images
    memory, offloading = check_memory(
        config, family, images, classes, accelerator, sharding, held_out=found.held_out
    )
    device = device_name(accelerator.device)
    print_safely(
        summary_of_inputs(
            config, family.name, images, classes, device, memory, held_out=len(found.held_out)
        )
    )
    return offloading


def _print_plan(
    config: TrainingConfig, accelerator: Accelerator, sharding: Sharding | None
) -> None:
    # only a dry run needs these modules, which take long to import
    from gralora_diffusion.training.dry_run.fitting import find_fit, format_fit
    from gralora_diffusion.training.dry_run.formatting import format_plan
    from gralora_diffusion.training.dry_run.memory_check import memory_problem, with_offloading
    from gralora_diffusion.training.dry_run.plan import Plan, plan_run

    store = CheckpointStore(config.output_dir, config.checkpoints_total_limit)
    found = find_beginning(config, store, accelerator)
    family, images, classes = found.family, found.images, found.class_images
    size = config.device_bytes

    def plan_of(changed: TrainingConfig) -> Plan:
        plan = plan_run(
            changed,
            family,
            images,
            classes,
            accelerator,
            sharding,
            size is not None,
            held_out=found.held_out,
        )
        return plan if size is None else replace(plan, device=f"a GPU of {size / 2**30:.3g} GiB")

    there = device_memory(accelerator.device) if size is None else DeviceMemory(size, size)
    plan = with_offloading(plan_of(config), config, sharding, there.free)
    if accelerator.is_main_process:
        print_safely(format_plan(plan))
        if size is None:
            if problem := memory_problem(plan, there):
                print_safely(f"\nwarning: {problem}")
        else:
            streams = not any(obstacles(config, sharding))
            fit = find_fit(config, plan_of, size, streams=streams)
            print_safely("\n" + format_fit(size, *fit))
