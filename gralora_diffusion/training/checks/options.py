"""What can be wrong with the training options, found before any model is loaded.

A problem is what cannot be done or contradicts itself; all of them are collected, and each says
which flag, what it got, what is allowed and what to do. A remark is about what has no effect.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

from gralora_diffusion.adapters.placement.path_patterns import PatternError, path_pattern
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.options.fields import Needs, options_with, value_problems
from gralora_diffusion.training.checkpoints.store import CheckpointStore
from gralora_diffusion.training.config.layer_patterns import check_patterns
from gralora_diffusion.training.config.options import OPTIMIZERS
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.buckets import listed_buckets

from .paths import check_base, check_data, check_output, nearby


def validate(config: TrainingConfig) -> list[str]:
    """Check all that can be checked before a model is loaded.

    Returns:
        Remarks for the user about options that have no effect or an unusual value.

    Raises:
        ConfigError: with every problem, each naming the flag, the value, and what to do.
    """
    if problems := find_problems(config):
        raise ConfigError(problems)
    return find_warnings(config)


def find_problems(config: TrainingConfig) -> list[str]:
    """Return what is wrong with ``config``, one text per problem, in the options' order."""
    checks = (
        _values,
        check_base,
        _quantization,
        check_data,
        _prior,
        _adapter,
        check_patterns,
        _optimizer,
        _schedule,
        check_output,
    )
    return [problem for check in checks for problem in check(config)]


def _values(config: TrainingConfig) -> Iterator[str]:
    yield from value_problems(config)
    yield from size_problems(config)


def _quantization(config: TrainingConfig) -> Iterator[str]:
    if config.quantizes:
        from gralora_diffusion.base_models.quantization import check_quantization

        yield from check_quantization(config)


def _prior(config: TrainingConfig) -> Iterator[str]:
    if not config.with_prior_preservation:
        return
    if not config.class_prompt:
        yield (
            "--class_prompt is missing, which --with_prior_preservation needs. Give a prompt of "
            "the class without the subject's name, such as --class_prompt 'a photo of a dog'"
        )
    if config.prior_source != "images":
        return
    if not config.class_data_dir:
        yield (
            "--class_data_dir is missing, which --with_prior_preservation needs to keep the class "
            "pictures. Give a folder (it is made and filled), or --prior_source teacher, which "
            "needs no class pictures"
        )
    elif Path(config.class_data_dir).exists() and not Path(config.class_data_dir).is_dir():
        yield f"--class_data_dir is {config.class_data_dir!r}: this is a file. Give a folder"
    elif (
        config.instance_data_dir
        and Path(config.class_data_dir).resolve() == Path(config.instance_data_dir).resolve()
    ):
        yield (
            f"--class_data_dir is {config.class_data_dir!r}, which is --instance_data_dir too: the "
            "subject's pictures are none of its class in general. Give another folder"
        )


def _adapter(config: TrainingConfig) -> Iterator[str]:
    rank, k = config.rank, config.gralora_k
    if rank >= 1 and k >= 1 and rank % k:
        below, above = rank - rank % k, rank - rank % k + k
        nearest = f"{below} or {above}" if below else str(above)
        divisors = ", ".join(str(d) for d in range(1, rank + 1) if rank % d == 0)
        yield (
            f"--rank is {rank} and --gralora_k is {k}; k must divide the rank. Give --rank "
            f"{nearest}, or one of these for --gralora_k: {divisors}"
        )
    for name, layers, otherwise in (
        ("lora_layers", config.target_modules, "for the preset"),
        ("exclude_modules", config.excluded_modules, "for all"),
    ):
        given = getattr(config, name)
        if isinstance(layers, str):
            try:
                path_pattern(layers)
            except PatternError as error:
                yield f"--{name} is {given!r}: {error}"
        if given is not None and not layers:
            yield f"--{name} is empty. Name layers such as to_q,to_v, or leave it out {otherwise}"


def _optimizer(config: TrainingConfig) -> Iterator[str]:
    name = config.optimizer
    if name not in OPTIMIZERS:
        nearest = difflib.get_close_matches(name, OPTIMIZERS, n=1)
        hint = f". Did you mean {nearest[0]}?" if nearest else ""
        yield f"--optimizer is {name!r}; it must be one of {', '.join(OPTIMIZERS)}{hint}"
    elif (needed := OPTIMIZERS[name]) and importlib.util.find_spec(needed[0]) is None:
        yield f"--optimizer is {name!r}, which needs: pip install {needed[1]}"
    if config.use_8bit_adam and name != "adamw8bit":
        yield (
            f"--use_8bit_adam and --optimizer {name} exclude each other. Leave out "
            "--use_8bit_adam, or give --optimizer adamw8bit"
        )
    if name == "prodigy":
        if config.scale_lr:
            yield (
                "--scale_lr and --optimizer prodigy exclude each other: Prodigy finds the step "
                "size itself. Leave out --scale_lr"
            )
        rate, text_rate = config.learning_rate or 1.0, config.text_encoder_lr
        if config.train_text_encoder and text_rate is not None and text_rate != rate:
            yield (
                f"--text_encoder_lr is {text_rate} and --learning_rate is {rate}; Prodigy takes "
                "one learning rate for both. Leave out --text_encoder_lr"
            )
    if name == "schedulefree":
        if config.adam_beta1 == 0:
            yield "--adam_beta1 is 0; with --optimizer schedulefree it must be above 0, such as 0.9"
        if config.lr_scheduler not in ("constant", "constant_with_warmup"):
            yield (
                f"--lr_scheduler is {config.lr_scheduler!r}, but --optimizer schedulefree takes "
                "the place of a schedule. Give --lr_scheduler constant; --lr_warmup_steps still "
                "works"
            )
        if config.use_ema:
            yield (
                "--use_ema and --optimizer schedulefree exclude each other: schedule-free saves "
                "its own average. Leave out --use_ema"
            )
    if config.mixed_precision == "fp16":
        import torch  # takes a second

        if not torch.accelerator.is_available():
            yield "--mixed_precision is 'fp16', which needs a GPU. On the CPU give bf16 or no"
    if (
        config.enable_xformers_memory_efficient_attention
        and importlib.util.find_spec("xformers") is None
    ):
        yield (
            "--enable_xformers_memory_efficient_attention needs: pip install xformers. Without it "
            "torch's own attention is used, which is about as fast"
        )


def _schedule(config: TrainingConfig) -> Iterator[str]:
    steps, warmup = config.max_train_steps, config.lr_warmup_steps
    if steps is not None and warmup > 0 and warmup >= steps >= 1:
        yield (
            f"--lr_warmup_steps is {warmup} and --max_train_steps is {steps}; the learning rate "
            f"would never be reached. A tenth of the steps is usual: {max(1, steps // 10)}"
        )
    rules = config.lr_step_rules
    if config.lr_scheduler == "piecewise_constant" and not rules:
        yield (
            "--lr_step_rules is missing, which --lr_scheduler piecewise_constant needs, such as "
            "--lr_step_rules 1:100,0.1:200,0.01"
        )
    number = r"\d*\.?\d+(e-?\d+)?"
    if rules and not re.fullmatch(rf"({number}:\d+,)+{number}", rules, re.IGNORECASE):
        yield (
            f"--lr_step_rules is {rules!r}; it must be factor:step pairs and a last factor, with "
            "commas and no spaces, such as 1:100,0.1:200,0.01"
        )


def find_warnings(config: TrainingConfig) -> list[str]:
    """Return what the user should know about options that have no effect, or an unusual value."""
    return [*_without_effect(config), *_unusual(config)]


def _without_effect(config: TrainingConfig) -> Iterable[str]:
    defaults = {f.name: f.default for f in fields(config)}
    idle_without: dict[str, list[str]] = {}
    for name, needed in options_with(type(config), Needs).items():
        if getattr(config, name) != defaults[name] and not getattr(config, needed.switch):
            idle_without.setdefault(needed.switch, []).append(f"--{name}")
    for switch, idle in idle_without.items():
        yield f"without --{switch} there is no use for {', '.join(idle)}"
    if config.with_prior_preservation and config.prior_source == "teacher":
        drawing = (
            "class_data_dir",
            "num_class_images",
            "prior_generation_precision",
            "sample_batch_size",
        )
        if idle := [f"--{n}" for n in drawing if getattr(config, n) != defaults[n]]:
            yield f"with --prior_source teacher there is no use for {', '.join(idle)}"
    if config.lora_layers is not None and config.target_preset != defaults["target_preset"]:
        yield "--lora_layers takes the place of --target_preset"
    if config.aspect_ratio_buckets is not None and config.resolution is not None:
        yield "with --aspect_ratio_buckets, --resolution is the size of validation pictures only"
    if config.max_train_steps and config.num_train_epochs != defaults["num_train_epochs"]:
        yield "--max_train_steps wins over --num_train_epochs"
    no_warmup = config.lr_scheduler in ("constant", "piecewise_constant")
    if config.lr_warmup_steps and no_warmup and config.optimizer != "schedulefree":
        yield (
            f"--lr_scheduler {config.lr_scheduler} has no warm-up, so there is no use for "
            "--lr_warmup_steps. Did you mean --lr_scheduler constant_with_warmup?"
        )


def _unusual(config: TrainingConfig) -> Iterable[str]:
    if (config.quantization or "").startswith("torchao") and not config.gradient_checkpointing:
        yield (
            f"--quantization {config.quantization} without --gradient_checkpointing: torchao keeps "
            "each layer's weight in the computing precision until the backward pass, which takes "
            "more memory than it saves"
        )
    rate = config.learning_rate
    if config.optimizer == "prodigy" and rate is not None and rate < 0.1:
        yield f"--learning_rate is {rate}; with Prodigy 1.0 is usual, for it finds the step size"
    if config.resume_from_checkpoint == "latest" and not CheckpointStore(config.output_dir).list():
        yield f"{config.output_dir!r} holds no checkpoint, so this run starts from the beginning"
    base = Path(config.pretrained_model_name_or_path)
    if not base.exists() and len(base.parts) == 2 and Path(base.parts[0]).is_dir():
        yield (
            f"--pretrained_model_name_or_path {str(base)!r} is taken as a Hub id, for there is no "
            f"such folder here{nearby(base)}"
        )


def size_problems(config: TrainingConfig, divisor: int = 8) -> Iterator[str]:
    """Tell which sizes a base cannot take whose heights and widths are multiples of ``divisor``."""
    wanted = "8, as the VAE shrinks by 8" if divisor == 8 else f"{divisor} for this base"
    for name in ("resolution", "validation_height", "validation_width"):
        side = getattr(config, name)
        if side is not None and side != (nearest := _multiple(side, divisor)):
            yield f"--{name} is {side}; it must be a multiple of {wanted}. The nearest is {nearest}"
    try:
        sizes = listed_buckets(config.aspect_ratio_buckets)
    except ValueError as error:
        yield (
            f"--aspect_ratio_buckets is {config.aspect_ratio_buckets!r}: {error} Give "
            "'height,width' with ; between, such as '512,512;640,384;384,640'"
        )
        return
    shapes: dict[float, tuple[int, int]] = {}
    for height, width in sizes:
        near = _multiple(height, divisor), _multiple(width, divisor)
        if (height, width) != near:
            yield (
                f"--aspect_ratio_buckets holds {height},{width}; height and width must be "
                f"multiples of {wanted}. The nearest is {near[0]},{near[1]}"
            )
        if earlier := shapes.get(height / width):
            yield (
                f"--aspect_ratio_buckets holds {earlier[0]},{earlier[1]} and {height},{width}, "
                "which are of one shape, and pictures are sorted by shape. Keep one of them"
            )
        shapes[height / width] = height, width


def _multiple(side: int, divisor: int) -> int:
    """Return the multiple of ``divisor`` that is nearest to ``side``, and not zero."""
    return max(divisor, round(side / divisor) * divisor)
