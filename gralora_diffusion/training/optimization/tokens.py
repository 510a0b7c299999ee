"""Token ids on the device, made once for each batch of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

#: Batches of prompts whose ids are kept.
_KEPT = 64


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device without waiting for its computations.

    CUDA only does this from pinned memory, which fake tensors do not have.
    """
    if device.type != "cuda" or tensor.is_cuda or isinstance(tensor, FakeTensor):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class DeviceTokenizers:
    """The tokenizers of a pipeline for text encoders that encode in each step.

    A pipeline makes token ids on the CPU. Copying them from there makes the host wait for the
    device, each time.
    """

    def __init__(self, pipe: Any, device: torch.device) -> None:
        self._pipe = pipe
        self._tokenizers = {
            name: _DeviceTokenizer(part, device)
            for name, part in pipe.components.items()
            if isinstance(part, PreTrainedTokenizerBase)
        }

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the pipeline use them inside."""
        # not by setattr, with which a pipeline changes its config
        attributes = vars(self._pipe)
        before = {name: attributes[name] for name in self._tokenizers}
        attributes.update(self._tokenizers)
        try:
            yield
        finally:
            attributes.update(before)


class _DeviceTokenizer:
    """A tokenizer whose tensors are on a device; otherwise as it is."""

    def __init__(self, tokenizer: Any, device: torch.device) -> None:
        self._tokenizer, self._device = tokenizer, device
        self._encoded = lru_cache(_KEPT)(self._encode)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, prompts: str | list[str], **options: Any) -> BatchEncoding:
        texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        return self._encoded(texts, tuple(sorted(options.items())))

    def _encode(self, prompts: tuple[str, ...], options: Any) -> BatchEncoding:
        with torch.device("cpu"):
            encoded = self._tokenizer(list(prompts), **dict(options))
        return BatchEncoding(
            {
                name: to_device(value, self._device) if isinstance(value, Tensor) else value
                for name, value in encoded.items()
            }
        )
