"""Faults planted in the package, each of which the rehearsal must find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gralora_diffusion.training import loop
from gralora_diffusion.training.data import data_module
from gralora_diffusion.training.optimization import step
from tests.rehearsal import training
from tests.rehearsal.device import Gpu


def _number_read(losses: Any, groups: Any) -> Any:
    loss = step.mean_loss(losses, groups)
    loss.detach().item()
    return loss


def _left_on_the_cpu(losses: Any, groups: Any) -> Any:
    weights = torch.ones(len(losses))
    return (losses * weights).mean()


def _unpinned(tensors: Any, device: Any) -> Any:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _noise_of_the_cpu(family: Any, vae: Any, pixels: Any) -> Any:
    mean, std = family.encode_images(vae, pixels.to(vae.device, vae.dtype))
    noise = torch.randn(mean.shape, device=mean.device, generator=torch.Generator())
    return mean + 0 * noise, std


#: Fault -> what is replaced by what, and what is then said.
FAULTS: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "a number read in the step": (loop, "mean_loss", _number_read, "'read by the host': 2"),
    "a tensor left on the CPU": (loop, "mean_loss", _left_on_the_cpu, "two devices"),
    "an unpinned copy": (step, "on_device", _unpinned, "unpinned copy"),
    "a generator of the CPU": (data_module, "encode_images", _noise_of_the_cpu, "generator"),
}


def rehearse(gpu: Gpu, folder: Path) -> Iterator[str]:
    """Yield the faults that are not found, in a run that passes without them."""
    changes = {"validation_prompt": None}
    for fault, (module, name, replacement, expected) in FAULTS.items():
        with mock.patch.object(module, name, replacement):
            said: list[str] = []
            for problem in _problems(gpu, folder, changes):
                said.append(problem)
                if expected in problem:
                    break
            else:
                yield f"not found: {fault}; said was {said}"


def _problems(gpu: Gpu, folder: Path, changes: dict[str, Any]) -> Iterator[str]:
    with _errors_said() as errors:
        yield from training.rehearse("stable-diffusion", "cached", gpu, folder, changes)
    yield from errors


@contextmanager
def _errors_said() -> Iterator[list[str]]:
    errors: list[str] = []
    try:
        yield errors
    except (RuntimeError, ValueError) as error:
        errors.append(str(error))
