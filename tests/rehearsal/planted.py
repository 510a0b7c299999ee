"""Faults planted in the package, each of which the rehearsal must find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gralora_diffusion.base_models import streaming
from gralora_diffusion.training import loop
from gralora_diffusion.training.data import data_module
from gralora_diffusion.training.optimization import step
from gralora_diffusion.training.optimization.held_out import HeldOutLoss
from gralora_diffusion.training.optimization.masked_loss import MaskedLoss
from gralora_diffusion.training.optimization.step import BatchBuilder
from tests.rehearsal import more_training, training
from tests.rehearsal.device import Gpu

Rehearsal = Callable[[Gpu, Path, dict[str, Any]], Iterator[str]]
_SHORTER = {"checkpointing_steps": 1000, "validation_prompt": None}


@dataclass(frozen=True)
class Fault:
    """A function of the package that is replaced.

    Attributes:
        owner, name: where the function is.
        faulty: is called with the function and its arguments.
        said: a part of what the rehearsal then says.
        rehearsal: the one that must find it; it passes without the fault.
    """

    owner: Any
    name: str
    faulty: Callable[..., Any]
    said: str
    rehearsal: Rehearsal


def _number_read(plain: Any, *args: Any) -> Any:
    result = plain(*args)
    result.detach().sum().item()
    return result


def _left_on_the_cpu(plain: Any, *args: Any) -> Any:
    result = plain(*args)
    return result * torch.ones(1, *result.shape)


def _unpinned(plain: Any, tensors: Any, device: Any) -> Any:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _noise_of_the_cpu(plain: Any, *args: Any) -> Any:
    mean, std = plain(*args)
    noise = torch.randn(mean.shape, device=mean.device, generator=torch.Generator())
    return mean + 0 * noise, std


def _controls_unpinned(plain: Any, builder: Any, controls: Any, batch: Any) -> Any:
    return controls.to(builder.device)


def _masks_of_the_cpu(plain: Any, builder: Any, batch: Any, seed: int) -> Any:
    found = plain(builder, batch, seed)
    masks, rng = found["fill_mask"], torch.Generator().manual_seed(seed)
    return {**found, "fill_mask": masks + 0 * torch.rand(1, device=masks.device, generator=rng)}


def _not_locked(plain: Any, tensor: Any) -> None:
    pass


def _waited_for(plain: Any, block: Any) -> None:
    plain(block)
    torch.cuda.synchronize()


def _of(kind: str) -> Rehearsal:
    return partial(more_training.rehearse, kind)


_CACHED = partial(training.rehearse, "stable-diffusion", "cached")
_NUMBER, _CPU, _UNPINNED = "'read by the host': ", "two devices", "unpinned copy"
_GENERATOR = "generator"
#: Name -> fault. Those of the plain step come first.
FAULTS: dict[str, Fault] = {
    "step/number": Fault(loop, "mean_loss", _number_read, f"{_NUMBER}2", _CACHED),
    "step/cpu": Fault(loop, "mean_loss", _left_on_the_cpu, _CPU, _CACHED),
    "step/unpinned": Fault(step, "on_device", _unpinned, _UNPINNED, _CACHED),
    "step/generator": Fault(data_module, "encode_images", _noise_of_the_cpu, _GENERATOR, _CACHED),
    "held-out/number": Fault(
        HeldOutLoss, "_losses_of", _number_read, f"{_NUMBER}3", _of("held-out/cached")
    ),
    "held-out/cpu": Fault(
        HeldOutLoss, "_losses_of", _left_on_the_cpu, _CPU, _of("held-out/cached")
    ),
    "masked/number": Fault(MaskedLoss, "weights", _number_read, f"{_NUMBER}2", _of("masked/base")),
    "masked/cpu": Fault(MaskedLoss, "target", _left_on_the_cpu, _CPU, _of("masked/base")),
    "edits/unpinned": Fault(
        BatchBuilder, "_control_latents", _controls_unpinned, _UNPINNED, _of("edits/pix2pix")
    ),
    "fills/generator": Fault(
        BatchBuilder, "_fill", _masks_of_the_cpu, _GENERATOR, _of("fills/stable-diffusion")
    ),
    "streamed/unpinned": Fault(streaming, "_pin", _not_locked, _UNPINNED, _of("streamed/flux")),
    "streamed/wait": Fault(
        streaming._Block, "wait", _waited_for, "synchronized", _of("streamed/flux")
    ),
}


def rehearse(name: str, gpu: Gpu, folder: Path) -> Iterator[str]:
    """Say so if a fault is not found."""
    fault, said = FAULTS[name], []
    plain = getattr(fault.owner, fault.name)

    def replaced(*args: Any, **named: Any) -> Any:
        return fault.faulty(plain, *args, **named)

    with mock.patch.object(fault.owner, fault.name, replaced):
        try:
            for problem in fault.rehearsal(gpu, folder, _SHORTER):
                said.append(problem)
                if fault.said in problem:
                    return
        except (RuntimeError, ValueError) as error:
            said.append(str(error))
    if not any(fault.said in text for text in said):
        yield f"not found; said was {said}"
