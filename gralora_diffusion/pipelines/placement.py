"""Where the models of a pipeline are while it generates: by the free memory of the device."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import free_memory
from torch import Tensor, nn

logger = logging.getLogger(__name__)

#: Parts of the free memory that weights may take, so that there is room to compute.
_WHOLE, _LARGEST = 0.5, 0.8


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers once each; for quantized ones, the tensors that store them."""
    for tensor in (*module.parameters(), *module.buffers()):
        if hasattr(tensor, "__tensor_flatten__"):
            yield from (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            yield tensor


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the elements of ``tensors`` on any device."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def place(pipe: Any, device: torch.device) -> None:
    """Put a pipeline on the device to generate with it.

    If its models would take more than half of the free memory, each is there only while it
    computes. If the largest alone would fill it, each of their layers is.
    """
    models = _models(pipe)
    # a copy of bitsandbytes' 8-bit weights stays on the GPU even when the model is moved
    movable = not any(getattr(model, "is_loaded_in_8bit", False) for model in models)
    if device.type == "cuda" and movable:
        free, sizes = _free(device), _sizes(pipe)
        quantized = any(getattr(model, "quantization_method", None) for model in models)
        if max(sizes, default=0) > _LARGEST * free and not quantized:
            logger.info("not enough memory for a whole model: layers are moved one by one")
            pipe.enable_sequential_cpu_offload(device=device)
            return
        if sum(sizes) > _WHOLE * free:
            logger.info("not enough memory for all models: each is moved when it computes")
            pipe.enable_model_cpu_offload(device=device)
            return
    pipe.to(device)


@contextmanager
def placed_beside(pipe: Any, first: Any) -> Iterator[None]:
    """Put ``pipe`` on the device of the placed pipeline ``first``, whose models are not needed.

    They leave the device inside if there is no room for both.
    """
    device = torch.device(first._execution_device)
    held = device.type == "cuda" and first.device.type == "cuda"
    leaves = held and sum(_sizes(pipe)) > _WHOLE * _free(device)
    if leaves:
        first.to("cpu")
    try:
        place(pipe, device)
        yield
    finally:
        if leaves:
            pipe.remove_all_hooks()
            pipe.to("cpu")
            free_memory()
            first.to(device)


def _models(pipe: Any) -> list[nn.Module]:
    return [model for model in pipe.components.values() if isinstance(model, nn.Module)]


def _sizes(pipe: Any) -> list[int]:
    return [bytes_of(tensors_of(model)) for model in _models(pipe)]


def _free(device: torch.device) -> int:
    free_memory()
    return torch.cuda.mem_get_info(device)[0]
