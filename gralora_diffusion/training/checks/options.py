"""Checks of the training options, made before any model is loaded.

A problem is an option that cannot be followed or contradicts another. All problems are collected,
and each names the flag, its value, what is allowed and what to do. A warning is about options that
have no effect or an unusual value.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from gralora_diffusion.adapters.placement.path_patterns import PatternError, path_pattern
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.file_names import nearby, real_path
from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.options.command_parser import must_be
from gralora_diffusion.options.fields import Needs, options_with, path_problems, value_problems
from gralora_diffusion.options.parsing import ParsedOptions
from gralora_diffusion.training.checkpoints.store import CheckpointStore
from gralora_diffusion.training.config.data_file import with_data_file, without_held_out_sets
from gralora_diffusion.training.config.layer_patterns import check_patterns
from gralora_diffusion.training.config.options import OPTIMIZERS
from gralora_diffusion.training.config.training_config import TrainingConfig, read_config
from gralora_diffusion.training.config.validation_prompts import validation_prompts
from gralora_diffusion.training.data.buckets import listed_buckets
from gralora_diffusion.training.data.captions import concept_folders, concept_name, count_images

from .data_file import data_file_problems, data_file_warnings
from .paths import check_base, check_controls, check_data, check_inputs, check_output


def validate(config: TrainingConfig) -> list[str]:
    """Check everything that can be checked before a model is loaded.

    Returns:
        Warnings about options that have no effect or an unusual value.

    Raises:
        ConfigError: there are problems. The error lists all of them, each with the flag, its
            value and what to do.
    """
    if problems := find_problems(config):
        raise ConfigError(problems)
    return find_warnings(config)


def read_and_check(
    argv: Sequence[str] | None = None, *, together: bool = False
) -> tuple[TrainingConfig, ParsedOptions]:
    """Read the options as ``read_config`` does, and check them as ``validate`` does.

    Args:
        together: several processes will check the options together, so they are only read here.

    Raises:
        ConfigError: there are problems. The error lists those of both, each with its flag, or its
            file and line.
    """
    config, parsed = read_config(argv)
    more = [] if together else parsed.located(find_problems(config))
    if problems := [*parsed.problems, *more]:
        raise ConfigError(problems)
    return config, parsed


def find_problems(config: TrainingConfig, *, imports: bool = True) -> list[str]:
    """Return the problems with ``config``, one text each, in the options' order.

    Args:
        imports: import and try an optimizer that the options name by its import path. Without it,
            no code that options name is run.
    """
    if unusable := list(path_problems(config)):  # the other checks look for them
        return unusable
    config = without_held_out_sets(config)
    return _problems(config, imports) + data_file_problems(config, _of_set)


def find_image_problems(config: TrainingConfig, *others: Any) -> list[str]:
    """Return the problems with the images of ``config``, for commands that do not train.

    Args:
        others: further options of the command.
    """
    if unusable := [text for options in (config, *others) for text in path_problems(options)]:
        return unusable
    config = without_held_out_sets(config)
    checks = (_values, check_data, check_controls, _prior)
    problems = [problem for check in checks for problem in check(config)]
    problems += [problem for options in others for problem in value_problems(options)]
    return problems + data_file_problems(config, _of_set)


def _of_set(config: TrainingConfig) -> list[str]:
    """Return the problems with the options of a set of images, and those of its run."""
    if unusable := list(path_problems(config)):
        return unusable
    checks = (_values, check_data, check_controls, _prior, check_inputs)
    return [problem for check in checks for problem in check(config)]


def _problems(config: TrainingConfig, imports: bool) -> list[str]:
    checks = (
        _values,
        check_base,
        _quantization,
        check_data,
        check_controls,
        _prior,
        _adapter,
        check_patterns,
        _loss,
        _optimizer,
        _schedule,
        _memory,
        check_output,
    )
    found = [problem for check in checks for problem in check(config)]
    return [*found, *_imported_optimizer(config)] if imports else found


def _imported_optimizer(config: TrainingConfig) -> Iterator[str]:
    if "." in config.optimizer:
        from gralora_diffusion.training.optimization import imported_optimizer  # imports torch

        yield from imported_optimizer.problems_of_imported(
            config.optimizer, config.optimizer_args, config.adam_weight_decay
        )


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
            "--with_prior_preservation needs --class_prompt. Give a prompt for the class without "
            "the subject's name, such as --class_prompt 'a photo of a dog'"
        )
    if config.prior_source != "images":
        return
    if not config.class_data_dir:
        yield (
            "--with_prior_preservation needs --class_data_dir to keep the class images. Give a "
            "folder (it is created and filled), or --prior_source teacher, which needs no class "
            "images"
        )
    elif Path(config.class_data_dir).exists() and not Path(config.class_data_dir).is_dir():
        yield f"--class_data_dir is {config.class_data_dir!r}: this is a file. Give a folder"
    elif problem := _too_few_in_concepts(config):
        yield problem
    elif config.instance_data_dir and real_path(config.class_data_dir) == real_path(
        config.instance_data_dir
    ):
        yield (
            f"--class_data_dir is {config.class_data_dir!r}, which must not be the same folder as "
            "--instance_data_dir: class images should show other members of the class. Give "
            "another folder"
        )


def _too_few_in_concepts(config: TrainingConfig) -> str | None:
    """Return why class images in folders of concepts are too few, or None."""
    folder, wanted = Path(str(config.class_data_dir)), config.num_class_images
    concepts = [part.path.name for part in concept_folders(folder)] if folder.is_dir() else []
    if not concepts or (count := count_images(folder)) >= wanted:
        return None
    return (
        f"--class_data_dir is {str(folder)!r}, whose folders ({first_few(concepts)}) contain "
        f"{count} images, and --num_class_images is {wanted}. Images are not generated beside such "
        f"folders. Give --num_class_images {max(1, count)}, or another folder"
    )


def _adapter(config: TrainingConfig) -> Iterator[str]:
    rank, k = config.rank, config.gralora_k
    if rank >= 1 and k >= 1 and rank % k:
        below, above = rank - rank % k, rank - rank % k + k
        nearest = f"{below} or {above}" if below else str(above)
        divisors = ", ".join(str(d) for d in range(1, rank + 1) if rank % d == 0)
        yield (
            f"--rank is {rank} and --gralora_k is {k}; k must divide the rank. Give --rank "
            f"{nearest}, or one of these values for --gralora_k: {divisors}"
        )
    for name, layers, otherwise in (
        ("lora_layers", config.target_modules, "to adapt those of the preset"),
        ("exclude_modules", config.excluded_modules, "to exclude none"),
    ):
        given = getattr(config, name)
        if isinstance(layers, str):
            try:
                path_pattern(layers)
            except PatternError as error:
                yield f"--{name} is {given!r}: {error}"
        if given is not None and not layers:
            yield f"--{name} is empty. Name layers such as to_q,to_v, or omit it {otherwise}"


def _optimizer(config: TrainingConfig) -> Iterator[str]:
    name = config.optimizer
    if "." in name:
        pass  # which is imported last
    elif name not in OPTIMIZERS:
        yield (
            f"--optimizer is {name!r}; {must_be(name, OPTIMIZERS)}, or the import path of a class, "
            "such as torch.optim.RAdam"
        )
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
        if config.loraplus_lr_ratio not in (None, 1.0):
            yield (
                "--loraplus_lr_ratio and --optimizer prodigy exclude each other: Prodigy takes one "
                "learning rate for all. Leave out --loraplus_lr_ratio"
            )
        rate, text_rate = config.learning_rate or 1.0, config.text_encoder_lr
        if config.train_text_encoder and text_rate is not None and text_rate != rate:
            yield (
                f"--text_encoder_lr is {text_rate} and --learning_rate is {rate}, but Prodigy "
                "takes one learning rate for both. Leave out --text_encoder_lr"
            )
    if name == "schedulefree":
        if config.adam_beta1 == 0:
            yield "--adam_beta1 is 0; it must be above 0 with --optimizer schedulefree, such as 0.9"
        if config.lr_scheduler not in ("constant", "constant_with_warmup"):
            yield (
                f"--lr_scheduler is {config.lr_scheduler!r}, but --optimizer schedulefree replaces "
                "a schedule. Give --lr_scheduler constant; --lr_warmup_steps still works"
            )
        if config.use_ema:
            yield (
                "--use_ema and --optimizer schedulefree exclude each other: the schedule-free "
                "optimizer saves its own average. Leave out --use_ema"
            )
    if config.mixed_precision == "fp16":
        import torch  # takes a second

        if not torch.accelerator.is_available():
            yield "--mixed_precision is 'fp16', which needs a GPU. Give bf16 or no on the CPU"
    if (
        config.enable_xformers_memory_efficient_attention
        and importlib.util.find_spec("xformers") is None
    ):
        yield (
            "--enable_xformers_memory_efficient_attention needs: pip install xformers. Or leave "
            "the option out: torch's own attention is about as fast"
        )


def _loss(config: TrainingConfig) -> Iterator[str]:
    if config.debiased_estimation_loss and config.snr_gamma is not None:
        yield (
            f"--debiased_estimation_loss and --snr_gamma {config.snr_gamma:g} both weight the loss "
            "by the SNR. Leave one out"
        )
    if config.loss_type == "l2":
        return
    if config.masked_loss and config.mask_outside == "base":
        yield (
            f"--loss_type {config.loss_type} and --mask_outside base exclude each other: the mean "
            "of two targets only stands for both with squared errors. Give --mask_outside ignore "
            "or weight, or --loss_type l2"
        )
    if config.huber_c > 1 and config.huber_schedule != "constant":
        yield (
            f"--huber_c is {config.huber_c:g}; it must be at most 1 with a schedule, which begins "
            "at 1. Give --huber_schedule constant for a larger one"
        )


def _schedule(config: TrainingConfig) -> Iterator[str]:
    steps, warmup = config.max_train_steps, config.lr_warmup_steps
    if steps is not None and warmup > 0 and warmup >= steps >= 1:
        yield (
            f"--lr_warmup_steps is {warmup} and --max_train_steps is {steps}, so the learning rate "
            f"would never be reached. A tenth of the steps is usual: {max(1, steps // 10)}"
        )
    rules = config.lr_step_rules
    if config.lr_scheduler == "piecewise_constant" and not rules:
        yield (
            "--lr_scheduler piecewise_constant needs --lr_step_rules, such as --lr_step_rules "
            "1:100,0.1:200,0.01"
        )
    # a data file is checked with its sets
    if config.stop_when and not (config.held_out_data_dir or config.data_config):
        yield (
            f"--stop_when {config.stop_when} needs --held_out_data_dir. Give a folder with images "
            "of the subject that are not trained on"
        )
    number = r"\d*\.?\d+(e-?\d+)?"
    if rules and not re.fullmatch(rf"({number}:\d+,)+{number}", rules, re.IGNORECASE):
        yield (
            f"--lr_step_rules is {rules!r}; it must be factor:step pairs and a final factor, "
            "separated by commas without spaces, such as 1:100,0.1:200,0.01"
        )


def _memory(config: TrainingConfig) -> Iterator[str]:
    try:
        _ = config.device_bytes
    except ValueError:
        yield (
            f"--device_memory is {config.device_memory!r}; it must be a size such as 8GiB or "
            "8192MiB"
        )
    try:
        kept = config.kept_blocks
    except ValueError:
        kept = -1.0
    if kept is not None and not 0 <= kept < 1:
        yield (
            f"--offload_base is {config.offload_base!r}; it must be auto, none, blocks, or a "
            "fraction from 0 to below 1, such as 0.3: the part of the blocks that stays on the GPU"
        )


def find_warnings(config: TrainingConfig) -> list[str]:
    """Return warnings about options that have no effect or an unusual value."""
    prepared = with_data_file(config)
    warnings = [*_without_effect(prepared), *_unusual(prepared)]
    return warnings + data_file_warnings(prepared, lambda own: list(_without_effect(own)))


def _without_effect(config: TrainingConfig) -> Iterable[str]:
    defaults = {f.name: f.default for f in fields(config)}
    idle_without: dict[str, list[str]] = {}
    for name, needed in options_with(type(config), Needs).items():
        if getattr(config, name) != defaults[name] and not needed.is_met(config):
            idle_without.setdefault(str(needed), []).append(f"--{name}")
    for switch, idle in idle_without.items():
        yield f"these options have no effect without {switch}: {', '.join(idle)}"
    if config.with_prior_preservation and config.prior_source == "teacher":
        drawing = (
            "class_data_dir",
            "num_class_images",
            "prior_generation_precision",
            "sample_batch_size",
        )
        if idle := [f"--{n}" for n in drawing if getattr(config, n) != defaults[n]]:
            yield f"these options have no effect with --prior_source teacher: {', '.join(idle)}"
    if config.loss_type == "l2" and (
        idle := [
            f"--{n}" for n in ("huber_c", "huber_schedule") if getattr(config, n) != defaults[n]
        ]
    ):
        yield f"these options have no effect with --loss_type l2: {', '.join(idle)}"
    if config.masked_loss and config.mask_outside == "ignore" and config.mask_outside_weight:
        yield (
            "--mask_outside_weight has no effect with --mask_outside ignore. Did you mean "
            "--mask_outside weight?"
        )
    if config.lora_layers is not None and config.target_preset != defaults["target_preset"]:
        yield "--target_preset has no effect, since --lora_layers names the layers"
    folder = config.instance_data_dir
    concept = concept_name(real_path(folder).name) if folder else None
    if concept and concept[0] > 1 and config.repeats == defaults["repeats"]:
        yield (
            f"--instance_data_dir is {folder!r}: the number in its own name has no effect, since "
            f"only those of folders in it have. Give its parent folder, or --repeats {concept[0]}"
        )
    if config.aspect_ratio_buckets is not None and config.resolution is not None:
        yield "--resolution only sets the size of validation images with --aspect_ratio_buckets"
    if config.optimizer_args and "." not in config.optimizer:
        yield (
            f"--optimizer_args has no effect on --optimizer {config.optimizer}, which has options "
            "of its own. It is for an optimizer that is given by its import path"
        )
    if config.held_out_data_dir and (config.max_train_steps or config.held_out_steps) < (
        config.held_out_steps
    ):
        yield (
            f"--held_out_steps is {config.held_out_steps}, which is more than --max_train_steps, "
            f"{config.max_train_steps}: the held-out images are only measured before the first step"
        )
    if config.max_train_steps and config.num_train_epochs != defaults["num_train_epochs"]:
        yield "--num_train_epochs has no effect, since --max_train_steps overrides it"
    no_warmup = config.lr_scheduler in ("constant", "piecewise_constant")
    if config.lr_warmup_steps and no_warmup and config.optimizer != "schedulefree":
        yield (
            f"--lr_warmup_steps has no effect, since --lr_scheduler {config.lr_scheduler} has no "
            "warm-up. Did you mean --lr_scheduler constant_with_warmup?"
        )


def _unusual(config: TrainingConfig) -> Iterable[str]:
    if (config.quantization or "").startswith("torchao") and not config.gradient_checkpointing:
        yield (
            f"--quantization {config.quantization} without --gradient_checkpointing uses more "
            "memory than it saves: torchao keeps each layer's weight in the computing precision "
            "until the backward pass. Give --gradient_checkpointing, too"
        )
    rate = config.learning_rate
    if config.optimizer == "prodigy" and rate is not None and rate < 0.1:
        yield f"--learning_rate is {rate}; 1.0 is usual with Prodigy, which finds the step size"
    if config.resume_from_checkpoint == "latest" and not CheckpointStore(config.output_dir).list():
        yield f"{config.output_dir!r} contains no checkpoint, so this run starts from the beginning"
    base = Path(config.pretrained_model_name_or_path)
    if not base.exists() and len(base.parts) == 2 and Path(base.parts[0]).is_dir():
        yield (
            f"--pretrained_model_name_or_path {str(base)!r} is taken as a Hub id because there is "
            f"no such folder here{nearby(base)}"
        )


def size_problems(config: TrainingConfig, divisor: int = 8) -> Iterator[str]:
    """Report sizes that do not suit a base that needs multiples of ``divisor``."""
    wanted = "8, since the VAE shrinks by 8" if divisor == 8 else f"{divisor} for this base"
    for name in ("resolution", "validation_height", "validation_width"):
        side = getattr(config, name)
        if side is not None and side != (nearest := _multiple(side, divisor)):
            yield f"--{name} is {side}; it must be a multiple of {wanted}. The nearest is {nearest}"
    given = config.resolutions or []
    for side in given:
        if side != (nearest := _multiple(side, divisor)):
            yield (
                f"--resolutions contains {side}; each must be a multiple of {wanted}. The nearest "
                f"is {nearest}"
            )
    if twice := sorted({side for side in given if given.count(side) > 1}):
        yield f"--resolutions contains {', '.join(map(str, twice))} twice. Keep one"
    if given and config.aspect_ratio_buckets is not None:
        yield (
            "--resolutions and --aspect_ratio_buckets exclude each other, since the latter names "
            "all sizes. Give --use_aspect_ratio_buckets, or leave out --resolutions"
        )
    try:
        validation_prompts(config, divisor)
    except ConfigError as error:
        yield from error.problems
    try:
        sizes = listed_buckets(config.aspect_ratio_buckets)
    except ValueError as error:
        yield (
            f"--aspect_ratio_buckets is {config.aspect_ratio_buckets!r}: {error} Give "
            "'height,width' pairs separated by ';', such as '512,512;640,384;384,640'"
        )
        return
    shapes: dict[float, tuple[int, int]] = {}
    for height, width in sizes:
        near = _multiple(height, divisor), _multiple(width, divisor)
        if (height, width) != near:
            yield (
                f"--aspect_ratio_buckets contains {height},{width}; height and width must be "
                f"multiples of {wanted}. The nearest is {near[0]},{near[1]}"
            )
        if earlier := shapes.get(height / width):
            yield (
                f"--aspect_ratio_buckets contains {earlier[0]},{earlier[1]} and {height},{width}, "
                "which have the same shape, but images are assigned by shape. Keep one of them"
            )
        shapes[height / width] = height, width


def _multiple(side: int, divisor: int) -> int:
    """Return the multiple of ``divisor`` that is nearest to ``side``, and not zero."""
    return max(divisor, round(Fraction(side, divisor)) * divisor)  # of integers of any size
