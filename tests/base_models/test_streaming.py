"""Blocks that are on the device only while they compute: the same numbers, and no more memory.

Here, both memories are the CPU's. The memory of a block on the device is emptied all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gralora_diffusion import get_family
from gralora_diffusion.adapters.compatibility import gralora_layers
from gralora_diffusion.base_models.streaming import (
    RING,
    StreamedBlocks,
    Streaming,
    block_bytes,
    blocks_of,
    computing_on,
    inner_blocks,
)
from gralora_diffusion.training.runtime.acceleration import checkpoint_gradients
from tests.models import PIPELINES, adapt_everywhere
from tests.quantized import quantize

CPU = torch.device("cpu")


def denoiser_and_inputs(
    family: str, quantization: str | None = None
) -> tuple[Any, Callable[[], Tensor]]:
    """An adapted denoiser, and what predicts with it."""
    pipe = PIPELINES[family]()
    known = get_family(family)
    denoiser = getattr(pipe, known.denoiser)
    if quantization:
        quantize(denoiser, quantization)
    adapt_everywhere(pipe, [known.denoiser])
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_("gralora" in name)
    with torch.no_grad():
        encoded = known.encode_prompts(pipe, ["a dog", "a cat"])
    random = torch.Generator().manual_seed(1)
    channels = known.encode_images(pipe.vae, torch.zeros(1, 3, 32, 32))[0].shape[1:]
    noisy = torch.randn(2, *channels, generator=random)
    size = torch.tensor([[32, 32]] * 2)
    images = known.image_conditioning(pipe, size, torch.zeros(2, 2), size, 1.0)
    times = torch.tensor([3.0, 500.0])

    def predict() -> Tensor:
        return known.predict(denoiser, noisy, times, {**encoded, **images})

    return denoiser, predict


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def passes(model: nn.Module, predict: Callable[[], Tensor]) -> list[Tensor]:
    """Outputs and gradients of a teacher's pass and of two steps."""
    found = []
    for _ in range(2):
        with torch.no_grad():
            found.append(predict())
        out = predict()
        out.square().mean().backward()
        found += [out.detach(), *(p.grad.clone() for p in trained(model) if p.grad is not None)]
        model.zero_grad()
    return found


def assert_equal(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def there(streamed: StreamedBlocks) -> list[int]:
    """Bytes of each block on the device."""
    return [block._device.untyped_storage().nbytes() for block in streamed._blocks]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", sorted(PIPELINES))
def test_same_bits_and_two_blocks_at_most(family: str, checkpointing: bool) -> None:
    model, predict = denoiser_and_inputs(family)
    model.train()
    if checkpointing:
        checkpoint_gradients(model)
    whole = passes(model, predict)
    sizes = Streaming().bytes_needed(block_bytes(model))
    streamed = Streaming().start(model, CPU)
    seen: list[int] = []

    def look(*_: Any) -> None:
        sizes = there(streamed)
        assert sum(size > 0 for size in sizes) <= RING
        seen.append(sum(sizes))

    for layer in gralora_layers(model):  # while they compute, forward and backward
        layer.register_forward_hook(look)
    for parameter in trained(model):
        parameter.register_post_accumulate_grad_hook(look)
    assert_equal(whole, passes(model, predict))
    assert max(seen) == streamed.most_held
    assert streamed.most_held <= sizes.ring < sizes.streamed or len(there(streamed)) <= RING
    assert sum(there(streamed)) == streamed.held


def test_some_blocks_are_kept() -> None:
    model, predict = denoiser_and_inputs("flux")
    whole = passes(model, predict)
    blocks, sizes = inner_blocks(model), block_bytes(model)
    streaming = Streaming(kept=0.5)
    assert streaming.streamed(4) == [0, 2]
    needed = streaming.bytes_needed(sizes)
    assert needed == (2, sizes[0] + sizes[2], sizes[1] + sizes[3], sizes[0] + sizes[2])
    streamed = streaming.start(model, CPU)
    assert [block.module for block in streamed._blocks] == [blocks[0], blocks[2]]
    assert_equal(whole, passes(model, predict))
    assert streamed.copied == needed.streamed  # both stay, as there are only two


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.25, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("count", [1, 2, 5, 57])
def test_streamed_blocks_are_evenly_spaced(count: int, kept: float) -> None:
    chosen = Streaming(kept).streamed(count)
    assert len(chosen) == len(set(chosen)) == count - int(kept * count)
    gaps = {b - a for a, b in pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert chosen[-1] < count


def test_each_step_copies_each_block_forward_and_backward() -> None:
    """The first two blocks of a pass are there from the pass before, which ended with them."""
    model, predict = denoiser_and_inputs("flux")
    streamed = Streaming().start(model, CPU)
    sizes = block_bytes(model)
    predict().square().mean().backward()
    copied = []
    for _ in range(2):
        before = streamed.copied
        predict().square().mean().backward()
        copied.append(streamed.copied - before)
    assert copied == [sum(sizes[2:]) + sum(sizes[:2])] * 2


def test_closed_it_is_as_before() -> None:
    model, predict = denoiser_and_inputs("stable-diffusion")
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = passes(model, predict)
    streamed = Streaming().start(model, CPU)
    passes(model, predict)
    assert streamed.held > 0
    streamed.close()
    assert streamed.held == sum(there(streamed)) == 0
    now = model.state_dict()
    assert now.keys() == values.keys()
    assert all(torch.equal(values[name], now[name]) for name in values)
    assert_equal(whole, passes(model, predict))
    assert streamed.held == 0


@pytest.mark.parametrize("kind", ["torchao-int8", "torchao-fp8"])
def test_quantized_weights(kind: str) -> None:
    """Their values and scales travel as they are stored."""
    model, predict = denoiser_and_inputs("flux", kind)
    plain, _ = denoiser_and_inputs("flux")
    assert sum(block_bytes(model)) < 0.5 * sum(block_bytes(plain))
    whole = passes(model, predict)
    Streaming().start(model, CPU)
    assert_equal(whole, passes(model, predict))


def test_what_cannot_be_streamed() -> None:
    pipe = PIPELINES["flux"]()
    with pytest.raises(ValueError, match="T5LayerNorm names no blocks"):
        Streaming().start(pipe.text_encoder_2.encoder.final_layer_norm, CPU)
    quantize(pipe.transformer, "bnb-nf4")
    with pytest.raises(ValueError, match="weights of the kind Params4bit cannot be streamed"):
        Streaming().start(pipe.transformer, CPU)


class Shared(nn.Module):
    """The blocks share a weight with each other, and one with the head."""

    _no_split_modules = ("Inner",)

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Inner() for _ in range(3))
        self.blocks[1].first.weight = self.blocks[0].first.weight
        self.head = nn.Linear(4, 4, bias=False)
        self.blocks[2].second.weight = self.head.weight
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(4, 4, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).sin())
        return out


def test_shared_weights_stay() -> None:
    torch.manual_seed(0)
    model = Shared()
    assert [size > 0 for size in block_bytes(model)] == [True] * 3
    x = torch.randn(2, 4, requires_grad=True)
    (whole,) = torch.autograd.grad(model(x).square().sum(), x)
    streamed = Streaming().start(model, CPU)
    names = [[f"{m is b.module.first}" for m, *_ in b.weights] for b in streamed._blocks]
    assert names == [["False"], ["False"], ["True"]]
    (parts,) = torch.autograd.grad(model(x).square().sum(), x)
    assert torch.equal(whole, parts)


def test_a_tied_weight_is_moved_once() -> None:
    encoder = PIPELINES["flux"]().text_encoder_2.requires_grad_(False)
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    streamed = Streaming().start(encoder, torch.device("meta"))
    assert encoder.device.type == "meta"
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    assert all(there == 0 for there in there(streamed))


@pytest.mark.parametrize("family", sorted(PIPELINES))
def test_text_encoders_encode_the_same(family: str) -> None:
    pipe, known = PIPELINES[family](), get_family(family)
    encoders = [getattr(pipe, name).requires_grad_(False) for name in known.all_text_encoders]
    assert all(len(block_bytes(e)) > 1 and min(block_bytes(e)) > 0 for e in encoders)
    with torch.no_grad():
        whole = known.encode_prompts(pipe, ["a dog", ""])
        with computing_on(CPU, encoders, streamed=True):
            parts = known.encode_prompts(pipe, ["a dog", ""])
        after = known.encode_prompts(pipe, ["a dog", ""])
    for found in (parts, after):
        assert_equal([*whole.values()], [*found.values()])


def test_blocks() -> None:
    unet = PIPELINES["stable-diffusion"]().unet
    inner = inner_blocks(unet)
    assert {type(block).__name__ for block in inner} == {"BasicTransformerBlock", "ResnetBlock2D"}
    assert set(inner) < set(blocks_of(unet))
