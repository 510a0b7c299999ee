"""accelerate as the trainer uses it: devices, precision, processes, trackers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    parse_flag_from_env,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gralora_diffusion.io.dtypes import torch_dtype
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.config.options import LengthOptions
from gralora_diffusion.training.config.training_config import TrainingConfig

logger = logging.getLogger(__name__)

DTYPES = {name: torch_dtype(name) for name in ("no", "fp16", "bf16")}


#: Environment variables by which `accelerate launch` turns on sharding of the model -> its name.
_SHARDED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Return the accelerator of a run.

    Raises:
        ConfigError: accelerate's settings are not supported: a precision, or processes that each
            hold a part of the model.
    """
    # checked first because accelerate would ask for their libraries
    if sharded := [name for key, name in _SHARDED.items() if parse_flag_from_env(key)]:
        raise ConfigError([_not_shared(" and ".join(sharded))])
    folder = Path(config.output_dir)
    try:
        accelerator = Accelerator(
            # as a plugin, because an environment variable overrides the plain argument
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            mixed_precision=config.mixed_precision,
            # the pipelines do not use the last layer of some text encoders
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=config.train_text_encoder)
            ],
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(
                project_dir=str(folder), logging_dir=str(folder / config.logging_dir)
            ),
        )
    except (ImportError, ValueError) as error:
        raise ConfigError(
            [
                f"accelerate cannot be used with its settings: {error}. Change them with "
                "`accelerate config`, or change the environment variables that begin with "
                "ACCELERATE_"
            ]
        ) from error
    if accelerator.mixed_precision not in DTYPES:
        raise ConfigError(
            [
                f"accelerate is set to mixed precision {accelerator.mixed_precision}, which is not "
                f"supported. Give --mixed_precision {' or '.join(DTYPES)}"
            ]
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # on the CPU, accelerate silently leaves autocast off
        raise ConfigError(
            ["mixed precision is fp16, which needs a GPU. Give --mixed_precision bf16 on the CPU"]
        )
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ConfigError([_not_shared(kind)])
    return accelerator


def check_sharding(config: TrainingConfig, accelerator: Accelerator) -> None:
    """Check that a base can be sharded over the processes of a run.

    Raises:
        ConfigError: there is only one process, or an option does not work with it.
    """
    problems = []
    if accelerator.num_processes == 1:
        problems.append(
            "accelerate is set to FSDP, which shards the base over several processes, but there is "
            "only one. Start more with `accelerate launch --num_processes`, or leave out --use_fsdp"
        )
    if problem := _quantized_and_sharded(config):
        problems.append(problem)
    if config.torch_compile:
        problems.append(
            "--torch_compile cannot be used with FSDP: the two have not been tried together. Leave "
            "out one of them"
        )
    if problems:
        raise ConfigError(problems)


def _quantized_and_sharded(config: TrainingConfig) -> str | None:
    """Return why the quantized base of a run cannot be sharded, and what to take instead.

    Each reason was seen with two processes and FSDP2 (torch 2.13, torchao 0.18, bitsandbytes 0.50).
    """
    instead = (
        "give FSDP the base in 16 bits or as a file in scaled fp8, or leave out --use_fsdp and "
    )
    if config.is_gguf:
        why = "FSDP divides the bytes of GGUF's weights without their formats"
        return f"a GGUF base cannot be used with FSDP: {why}. Either {instead}stream the base"
    if not config.quantizes:
        return None
    flag = f"--quantization {config.quantization}"
    if (config.quantization or "").startswith("torchao"):
        why = "torchao's weights do not have the operations by which FSDP divides them"
        return f"{flag} cannot be used with FSDP: {why}. Either {instead}stream the base"
    if config.quantization is None:
        flag = "--bnb_quantization_config_path"
    why = (
        "bitsandbytes loses the scales of 8-bit weights in it, and 4-bit weights have not been "
        "tried with it on GPUs"
    )
    return (
        f"{flag} cannot be used with FSDP: {why}. Either {instead}hold the whole base on each GPU"
    )


def _not_shared(kind: str) -> str:
    return (
        f"accelerate is set to {kind}, which shards the model. Only FSDP can shard the base here. "
        "Use `accelerate launch --use_fsdp`, or `accelerate launch --multi_gpu` for a whole base "
        "in each process"
    )


class PeakMemory:
    """The most memory that tensors held on a CUDA device while this was entered.

    Attributes:
        gib: in GiB; None before that, and on the CPU, which has no such counter.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gib: float | None = None

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
            self.gib = max(self.gib or 0.0, peak)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def enable_memory_savings(
    options: LengthOptions, denoiser: Any, trained: Iterable[Any], device: torch.device
) -> None:
    """Turn on the savings of memory and time in ``options``; ``trained`` are all trained models."""
    if options.gradient_checkpointing:
        for model in trained:
            checkpoint_gradients(model)
    if options.enable_xformers_memory_efficient_attention:
        denoiser.enable_xformers_memory_efficient_attention()
    if options.torch_compile:
        if problem := compiler_problem(device):
            logger.warning("--torch_compile is ignored, since compiling fails here: %s", problem)
        else:
            compile_repeated_blocks(denoiser)


def compiler_problem(device: torch.device) -> str | None:
    """Return why torch.compile does not work here, or None, by compiling something small.

    It needs Triton on CUDA and a C++ compiler on the CPU.
    """
    config: Any = torch._dynamo.config
    try:
        with config.patch(suppress_errors=False):
            torch.compile(lambda x: x.sin() + x.cos())(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler, or its absence, raises
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def compile_repeated_blocks(model: Any) -> None:
    """Compile the blocks of a denoiser in place, once for each kind of block.

    This follows diffusers, except that a model that does not list its repeated blocks has those
    compiled that it does not allow to be split. torch reports a block that cannot be compiled, and
    runs it uncompiled.
    """
    config: Any = torch._dynamo.config
    config.suppress_errors = True
    # one version for each width of a UNet's blocks, each with and without gradients
    config.recompile_limit = max(config.recompile_limit, 64)
    if not getattr(model, "_repeated_blocks", None):
        model._repeated_blocks = list(model._no_split_modules)
    model.compile_repeated_blocks()


def checkpoint_gradients(model: Any) -> None:
    """Make a diffusers or transformers model recompute activations in the backward pass."""
    if hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def without_fp16_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Turn fp16 autocast off inside, since T5 and VAEs overflow in fp16.

    bf16 has the range of fp32, so its autocast stays on.
    """
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    fp16 = on and torch.get_autocast_dtype(kind) == torch.float16
    return torch.autocast(kind, enabled=False) if fp16 else nullcontext()


def share_only_what_is_trained(model: nn.Module) -> None:
    """Keep DistributedDataParallel from sending frozen weights and buffers to every process.

    Each process has loaded the same weights. Sending them takes long, and torchao's tensors cannot
    be sent. All buffers are the base's and would be sent before every pass: the table of positions
    in Stable Diffusion 3.5 medium is 450 MB.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    frozen += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


@contextmanager
def accelerate_left_as_it_was() -> Iterator[None]:
    """Let a program train again with other settings: accelerate keeps the first ones forever."""
    ours = not PartialState._shared_state
    try:
        yield
    finally:
        if ours:
            AcceleratorState._reset_state(reset_partial_state=True)


def start_trackers(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Start the trackers, and give them the options.

    accelerate would write the options for TensorBoard as a second run beside the run itself.
    """
    accelerator.init_trackers("gralora-dreambooth")
    values = {
        key: value if isinstance(value, (int, float, str, bool)) else str(value)
        for key, value in config.as_record().items()
    }
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":
            tracker.store_init_configuration(values)
        elif accelerator.is_main_process:
            from torch.utils.tensorboard.summary import hparams

            for summary in hparams(values, {}):
                tracker.tracker.file_writer.add_summary(summary)
