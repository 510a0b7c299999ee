"""Where models are while a pipeline generates, by the free memory of a device that is imagined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gralora_diffusion.pipelines import placement
from gralora_diffusion.pipelines.placement import place, placed_beside
from tests.models import stable_diffusion


def sizes(pipe: Any) -> list[int]:
    models = [pipe.unet, pipe.vae, pipe.text_encoder]
    return [sum(t.nbytes for t in [*m.parameters(), *m.buffers()]) for m in models]


class Recorded:
    """A pipeline's components, and what is called to move them."""

    def __init__(self, pipe: Any, calls: list[Any], name: str = "") -> None:
        self.components, self.calls, self.name = pipe.components, calls, name
        self.device = self._execution_device = torch.device("cpu")

    def _note(self, *call: Any) -> None:
        self.calls.append((self.name, *call) if self.name else call)

    def to(self, device: Any) -> None:
        self.device = torch.device(device)
        self._note("to", str(self.device))

    def enable_model_cpu_offload(self, device: Any) -> None:
        self._note("by model", str(device))

    def enable_sequential_cpu_offload(self, device: Any) -> None:
        self._note("by layer", str(device))

    def remove_all_hooks(self) -> None:
        self._note("no hooks")


@pytest.mark.parametrize(
    ("gpu", "marks", "share", "expected"),
    [
        ("cuda:0", {}, 2.1, "to"),
        ("cuda:0", {}, 1.9, "by model"),
        ("cuda:0", {"is_loaded_in_8bit": True}, 1.9, "to"),
        ("cuda:0", {"is_loaded_in_4bit": True}, 1.9, "by model"),
        ("cuda:0", {}, 0.1, "by layer"),
        ("cuda:0", {"is_loaded_in_8bit": True}, 0.1, "to"),
        ("cuda:0", {"quantization_method": "torchao"}, 0.1, "by model"),
        ("cpu", {}, 0.1, "to"),
    ],
)
def test_with_little_memory(
    gpu: str,
    marks: dict[str, Any],
    share: float,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe, calls = stable_diffusion(), []
    for name, value in marks.items():
        setattr(pipe.unet, name, value)
    free = int(share * sum(sizes(pipe)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    place(Recorded(pipe, calls), torch.device(gpu))
    assert calls == [(expected, gpu)]


def test_the_largest_model_alone_decides_between_models_and_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = stable_diffusion()
    largest = max(sizes(pipe))
    for free, expected in ((largest / 0.79, "by model"), (largest / 0.81, "by layer")):
        calls: list[Any] = []
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * free))
        place(Recorded(pipe, calls), torch.device("cuda:0"))
        assert calls == [(expected, "cuda:0")]


@pytest.mark.parametrize(
    ("first_is_there", "share", "expected"),
    [
        (True, 2.1, [("second", "to", "cuda:0")]),
        (
            True,
            1.9,
            [
                ("first", "to", "cpu"),
                ("second", "by model", "cuda:0"),
                ("second", "no hooks"),
                ("second", "to", "cpu"),
                ("first", "to", "cuda:0"),
            ],
        ),
        (False, 1.9, [("second", "by model", "cuda:0")]),
    ],
    ids=["room for both", "room for one", "the first is offloaded"],
)
def test_two_pipelines(
    first_is_there: bool, share: float, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, calls = stable_diffusion(), []
    free = int(share * sum(sizes(pipe)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    first, second = Recorded(pipe, calls, "first"), Recorded(pipe, calls, "second")
    first._execution_device = torch.device("cuda:0")
    if first_is_there:
        first.device = torch.device("cuda:0")
    with pytest.raises(OSError, match="inside"), placed_beside(second, first):
        raise OSError("inside")
    assert calls == expected


def test_two_pipelines_on_the_cpu() -> None:
    first, second = stable_diffusion(), stable_diffusion()
    with placed_beside(second, first):
        assert second.device == first.device == torch.device("cpu")


def test_bytes_of_shared_and_buffered_tensors() -> None:
    layer = nn.Linear(3, 5)
    layer.register_buffer("table", torch.zeros(7, dtype=torch.int64))
    assert placement.bytes_of(placement.tensors_of(layer)) == 4 * (15 + 5) + 8 * 7
