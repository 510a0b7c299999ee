"""The adapter of a run: where it goes, and the weights that are to be used."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel

from gralora_diffusion.families import get_family
from gralora_diffusion.state import save_adapter
from gralora_diffusion.training.adapters import (
    adapter_parameters,
    add_adapters,
    put_back,
    read_out,
    weights_for_use,
)
from gralora_diffusion.training.checkpoint import CheckpointError
from tests.models import stable_diffusion
from tests.training.runs import config

FAMILY = get_family("stable-diffusion")
BOTH = ("unet", "text_encoder")


def adapted(**options: Any) -> Any:
    pipe = stable_diffusion()
    add_adapters(pipe, FAMILY, config(train_text_encoder=True, **options))
    return pipe


def test_same_seed_same_adapter_and_another_one_for_another_seed() -> None:
    first, second, third = (
        read_out(adapted(seed=seed), FAMILY, BOTH).components for seed in (1, 1, 2)
    )
    for part in BOTH:
        a, b, c = (x[part].tensors for x in (first, second, third))
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert any(not torch.equal(a[key], c[key]) for key in a)


@pytest.mark.parametrize(
    ("options", "endings"),
    [
        ({}, {"to_q", "to_k", "to_v", "0"}),
        ({"lora_layers": "to_q,conv1"}, {"to_q", "conv1"}),
        ({"lora_layers": "re:down_blocks.*to_k"}, {"to_k"}),
        ({"target_preset": "attention+ff"}, {"to_q", "to_k", "to_v", "0", "proj", "2"}),
    ],
)
def test_targets(options: dict[str, Any], endings: set[str]) -> None:
    tensors = read_out(adapted(**options), FAMILY, BOTH).components["unet"].tensors
    assert {key.split(".gralora_")[0].split(".")[-1] for key in tensors} == endings
    if "re:" in options.get("lora_layers", ""):
        assert all(key.startswith("down_blocks.") for key in tensors)


def test_read_out_is_a_copy_and_put_back_restores(tmp_path: Path) -> None:
    pipe = adapted()
    before = read_out(pipe, FAMILY, BOTH)
    save_adapter(before, tmp_path / "x.safetensors")
    with torch.no_grad():
        for part in BOTH:
            for parameter in adapter_parameters(pipe, part):
                parameter.add_(1)
    put_back(pipe, BOTH, tmp_path / "x.safetensors")
    after = read_out(pipe, FAMILY, BOTH)
    for part in BOTH:
        a, b = before.components[part].tensors, after.components[part].tensors
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert all(p.requires_grad for p in adapter_parameters(pipe, "unet"))
    with pytest.raises(CheckpointError, match="it adapts text_encoder, unet"):
        put_back(pipe, ("unet",), tmp_path / "x.safetensors")


@pytest.mark.parametrize("averaged", [False, True])
def test_weights_for_use(averaged: bool) -> None:
    parameters = [torch.nn.Parameter(torch.tensor([1.0, 2.0]))]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    ema = EMAModel(parameters, decay=0.5, min_decay=0.5) if averaged else None
    with torch.no_grad():
        parameters[0].add_(0.3)
    if ema is not None:
        ema.step(parameters)  # the first step only copies
        with torch.no_grad():
            parameters[0].add_(0.2)
        ema.step(parameters)
    trained = copy.deepcopy(parameters[0].data)
    expected = torch.tensor([1.4, 2.4]) if averaged else trained
    with weights_for_use(parameters, optimizer, ema):
        torch.testing.assert_close(parameters[0].data, expected)
    assert torch.equal(parameters[0].data, trained)
