"""Optimizers from their libraries, and the schedule of the learning rate.

The training loop steps optimizer and schedule itself, once per optimizer step. Steps here are
therefore optimizer steps, whatever the number of processes and the accumulation.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.optimization import Adafactor

from gralora_diffusion.training.config.options import OPTIMIZERS, OptimizerOptions

from .imported_optimizer import accepts, imported_class, keyword_arguments, make_imported


def build_optimizer(
    options: OptimizerOptions,
    denoiser_parameters: Iterable[Parameter],
    text_encoder_parameters: Iterable[Parameter] = (),
    *,
    second_factors: Iterable[Parameter] = (),
    samples_per_step: int = 1,
) -> Optimizer:
    """Return the optimizer that the options describe, ready for training steps.

    Its parameter groups are named ("name") denoiser and text_encoder; each has its own learning
    rate and weight decay. With ``loraplus_lr_ratio``, the second factors of each are a group of
    their own behind it ("denoiser B"). A group without trainable parameters is left out.

    Args:
        options: with learning rates and weight decay, see ``TrainingConfig.with_defaults``.
        denoiser_parameters: those without a gradient are ignored.
        text_encoder_parameters: the same.
        second_factors: those of the parameters whose rate LoRA+ multiplies (arXiv 2402.12354).
        samples_per_step: factor of the rates for ``scale_lr``.

    Raises:
        ValueError: there is nothing to train, a learning rate is not set, or the optimizer is
            unknown.
        ImportError: the optimizer's library is not installed. The error says how to install it.
    """
    factor = samples_per_step if options.scale_lr else 1
    groups = [
        _group("denoiser", denoiser_parameters, options.learning_rate, options.adam_weight_decay),
        _group(
            "text_encoder",
            text_encoder_parameters,
            options.text_encoder_lr,
            options.adam_weight_decay_text_encoder,
        ),
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("there is nothing to train: no parameter requires a gradient")
    for group in groups:
        if group["lr"] is None or group["weight_decay"] is None:
            raise ValueError(
                f"learning rate and weight decay of the {group['name']} are not set. Apply the "
                "family's defaults first: config.with_defaults(...)"
            )
        group["lr"] *= factor
    if options.loraplus_lr_ratio is not None:
        second = {id(parameter) for parameter in second_factors}
        groups = [part for group in groups for part in _split(group, second, options)]
    betas = (options.adam_beta1, options.adam_beta2)

    if "." in options.optimizer:
        found = imported_class(options.optimizer)
        for group in groups:
            # the trainer sets the decay of every group, so a group has one even if it has no effect
            group["weight_decay"] *= accepts(found, "weight_decay")
        return make_imported(found, groups, keyword_arguments(options.optimizer_args))
    if options.optimizer == "adamw":
        # one kernel for the whole step takes a third of the time, on the CPU too
        fused = all(p.device.type in ("cuda", "cpu") for g in groups for p in g["params"])
        return torch.optim.AdamW(groups, betas=betas, eps=options.adam_epsilon, fused=fused or None)
    if options.optimizer == "adamw8bit":
        bitsandbytes = _library("adamw8bit")
        optimizer = bitsandbytes.optim.AdamW8bit(groups, betas=betas, eps=options.adam_epsilon)
    elif options.optimizer == "prodigy":
        optimizer = _library("prodigy").Prodigy(
            groups,
            betas=betas,
            beta3=options.prodigy_beta3,
            eps=options.adam_epsilon,
            decouple=options.prodigy_decouple,
            use_bias_correction=options.prodigy_use_bias_correction,
            safeguard_warmup=options.prodigy_safeguard_warmup,
        )
    elif options.optimizer == "adafactor":
        # the learning rate is not scaled by the weights' size, because the adapter's second factor
        # starts at zero
        optimizer = Adafactor(groups, relative_step=False, scale_parameter=False, warmup_init=False)
    elif options.optimizer == "schedulefree":
        optimizer = _library("schedulefree").AdamWScheduleFree(
            groups, betas=betas, eps=options.adam_epsilon, warmup_steps=options.lr_warmup_steps
        )
        optimizer.train()
    else:
        known = ", ".join(OPTIMIZERS)
        raise ValueError(f"optimizer {options.optimizer!r} is unknown; it must be one of {known}")
    assert isinstance(optimizer, Optimizer)
    return optimizer


def build_lr_scheduler(
    options: OptimizerOptions, optimizer: Optimizer, max_train_steps: int
) -> LRScheduler | None:
    """Return diffusers' schedule of the rates, or None for schedule-free, which needs none.

    Step it once after each optimizer step. Do not give it to ``accelerator.prepare``, which would
    step it once per process.

    Args:
        options: ``lr_warmup_steps`` are optimizer steps.
        optimizer: from :func:`build_optimizer`.
        max_train_steps: optimizer steps of the whole run, even if it is resumed.
    """
    if options.optimizer == "schedulefree":
        return None
    scheduler: LRScheduler = get_scheduler(
        options.lr_scheduler,
        optimizer,
        step_rules=options.lr_step_rules,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=max_train_steps,
        num_cycles=options.lr_num_cycles,
        power=options.lr_power,
    )
    return scheduler


@contextmanager
def evaluating(optimizer: Any) -> Iterator[None]:
    """Switch to the weights for validation and for saving the adapter inside.

    Afterwards the training weights are restored bit for bit, so that a validation never changes the
    training; schedule-free's own way back would round them. Only schedule-free optimizers
    distinguish the two. ``optimizer`` may be accelerate's wrapper.
    """
    if not optimizer.param_groups[0].get("train_mode"):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p.detach().clone() for p in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, trained, strict=True):
                parameter.copy_(value)


def _group(
    name: str, parameters: Iterable[Parameter], lr: float | None, weight_decay: float | None
) -> dict[str, Any]:
    trainable = [p for p in parameters if p.requires_grad]
    return {"name": name, "params": trainable, "lr": lr, "weight_decay": weight_decay}


def _split(
    group: dict[str, Any], second: set[int], options: OptimizerOptions
) -> list[dict[str, Any]]:
    """Return a group without its second factors, and these with their own rate."""
    ratio = options.loraplus_lr_ratio
    parts = [
        {**group, "params": [p for p in group["params"] if id(p) not in second]},
        {
            **group,
            "name": f"{group['name']} B",
            "params": [p for p in group["params"] if id(p) in second],
            "lr": group["lr"] * ratio,
        },
    ]
    return [part for part in parts if part["params"]]


def _library(optimizer: str) -> Any:
    needed = OPTIMIZERS[optimizer]
    assert needed is not None
    module, package = needed
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"--optimizer {optimizer} needs {module}: pip install {package} ({error})"
        ) from error


def optimizer_state_bytes(
    options: OptimizerOptions,
    denoiser: Sequence[tuple[str, Tensor]],
    text_encoders: Sequence[tuple[str, Tensor]],
    device: torch.device,
) -> int:
    """Return the bytes of the optimizer's state after its first step for these (name, parameter).

    The real optimizer makes a step on two stand-ins for each shape. Two of them show which tensors
    are kept for each parameter and which are shared by all.
    """
    # factors that start at zero are told apart, since Prodigy stores no initial values for them
    groups = [
        Counter((tuple(p.shape), p.dtype, "gralora_B" in name) for name, p in group)
        for group in (denoiser, text_encoders)
    ]
    stand_ins = [
        [(kind, _stand_in(*kind, device)) for kind in group for _ in range(2)] for group in groups
    ]
    optimizer = build_optimizer(options, *([p for _, p in group] for group in stand_ins))
    optimizer.step()
    holders: Counter[int] = Counter()
    kept: list[tuple[int, list[Tensor]]] = []  # number of parameters like a stand-in, its state
    for counts, group in zip(groups, stand_ins, strict=True):
        for kind, parameter in group:
            tensors = [t for t in optimizer.state[parameter].values() if isinstance(t, Tensor)]
            holders.update({t.untyped_storage().data_ptr() for t in tensors})
            kept.append((counts[kind], tensors))
    shared = {
        pointer: tensor.nbytes
        for _, tensors in kept
        for tensor in tensors
        if holders[pointer := tensor.untyped_storage().data_ptr()] > 1
    }
    own = sum(
        count * sum(t.nbytes for t in tensors if t.untyped_storage().data_ptr() not in shared)
        for count, tensors in kept
    )
    return own // 2 + sum(shared.values())


def _stand_in(
    shape: tuple[int, ...], dtype: torch.dtype, is_zero: bool, device: torch.device
) -> Parameter:
    make = torch.zeros if is_zero else torch.ones
    parameter = Parameter(make(shape, dtype=dtype, device=device))
    parameter.grad = torch.ones_like(parameter)
    return parameter
