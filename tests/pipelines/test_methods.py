"""The five methods are there after the import, in whatever order, and diffusers is not."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from safetensors.torch import load_file, save_file

import gralora_diffusion
from gralora_diffusion.pipelines import loading, methods
from tests.io.test_lazy import imported_by
from tests.models import adapt, stable_diffusion

OURS, THEIRS = "import gralora_diffusion", "from diffusers import FluxPipeline"
SAME = """
from gralora_diffusion import pipelines
assert FluxPipeline.fuse_gralora is pipelines.fuse_gralora
assert object.__new__(FluxPipeline).load_gralora_weights.__func__ is pipelines.load_gralora_weights
"""


def test_nothing_is_imported_for_them() -> None:
    assert imported_by(OURS) == "[]\n"


def test_imported_before_diffusers() -> None:
    """And before the pipelines of FLUX, of whose module our families take a function."""
    untouched = """
import importlib.util, inspect, sys
from diffusers.pipelines import pipeline_utils as module
assert "gralora_diffusion.pipelines.loading" not in sys.modules
assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
assert "class DiffusionPipeline" in inspect.getsource(module)
"""
    imported_by("\n".join([OURS, OURS, THEIRS, untouched, SAME]))


def test_imported_after_diffusers() -> None:
    imported_by("\n".join([THEIRS, OURS, SAME]))


@pytest.mark.parametrize("name", methods.METHODS)
def test_they_are_the_functions_of_pipelines(name: str) -> None:
    function = getattr(loading, name)
    assert getattr(FluxPipeline, name) is function
    assert vars(DiffusionPipeline)[name] is function  # from the first look on
    assert next(iter(inspect.signature(function).parameters)) == "pipe"


def test_installing_again_changes_nothing() -> None:
    finders = list(sys.meta_path)
    methods.install()
    assert sys.meta_path == finders
    assert DiffusionPipeline.load_gralora_weights is loading.load_gralora_weights
    assert gralora_diffusion.__version__


@pytest.mark.parametrize("form", ["file", "folder", "weight_name", "peft", "state dict"])
def test_diffusers_own_method_says_what_to_call(form: str, tmp_path: Path) -> None:
    pipe = stable_diffusion()
    adapt(pipe).save_gralora_weights(tmp_path, peft_format=form == "peft")
    file = sorted(tmp_path.rglob("*.safetensors"))[-1]
    sources: dict[str, Any] = {"file": file, "state dict": load_file(file), "peft": file.parent}
    options = {"weight_name": file.name} if form in ("weight_name", "peft") else {}
    with pytest.raises(ValueError, match=r"this is a GraLoRA adapter.*pipe\.load_gralora_weights"):
        stable_diffusion().load_lora_weights(sources.get(form, tmp_path), **options)


def test_it_loads_a_lora_as_before(tmp_path: Path) -> None:
    assert "adapter_name" in inspect.signature(FluxPipeline.load_lora_weights).parameters
    pipe = stable_diffusion()
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    width = pipe.unet.get_submodule(layer.removeprefix("unet.")).in_features
    pair = {f"{layer}.lora_A.weight": (2, width), f"{layer}.lora_B.weight": (width, 2)}
    save_file({key: torch.ones(shape) for key, shape in pair.items()}, tmp_path / "a.safetensors")
    pipe.load_lora_weights(tmp_path / "a.safetensors", adapter_name="a")
    assert pipe.get_list_adapters() == {"unet": ["a"]}
