"""accelerate as the trainer sets it up."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.utils import fresh_cache

from gralora_diffusion.adapters.injection import inject
from gralora_diffusion.families import get_family
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training import loop
from gralora_diffusion.training.runtime.acceleration import (
    compile_repeated_blocks,
    share_only_what_is_trained,
)
from tests.models import PIPELINES, config
from tests.tiny.flux import build
from tests.training.runs import assert_close, assert_same_run, make_images, metrics, run


def test_nothing_frozen_is_sent_round() -> None:
    """Neither weights nor buffers: DistributedDataParallel would send these before each pass."""
    pipe = PIPELINES["stable-diffusion-3"]()
    for model in (pipe.transformer, pipe.text_encoder):
        model.requires_grad_(False)
    inject(pipe.transformer, config(["to_q"]), "a")
    step = nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder})
    share_only_what_is_trained(step)
    kept = {
        name for name, tensor in step.state_dict(keep_vars=True).items() if tensor.requires_grad
    }
    everything = {name for name, _ in [*step.named_parameters(), *step.named_buffers()]}
    assert any(name.endswith("pos_embed") for name in everything)
    assert everything - set(step._ddp_params_and_buffers_to_ignore) == kept
    assert kept


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "set to DeepSpeed, which shards"),
        ("ACCELERATE_USE_FSDP", "true", "set to FSDP, .* but there is only one"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "set to Megatron-LM, which shards"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "set to a parallelism config, which shards"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "set to mixed precision fp8, which is not supported"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "fp16, which needs a GPU"),
        (
            "ACCELERATE_DYNAMO_BACKEND",
            "FASTEST",
            "with its settings: .*FASTEST.* `accelerate config`",
        ),
    ],
)
def test_settings_of_accelerate_that_would_break_a_run(
    base: Any,
    images: Any,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    value: str,
    named: str,
) -> None:
    """They are refused before the base is loaded, and nothing is written."""
    loaded: list[Any] = []
    monkeypatch.setattr(loop, "load_base", lambda *arguments: loaded.append(arguments))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv(setting, value)
    with pytest.raises(ConfigError, match=named):
        run(
            pretrained_model_name_or_path=base,
            instance_data_dir=images,
            output_dir=tmp_path / "out",
            mixed_precision=None,
        )
    assert not loaded
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", PIPELINES)
def test_repeated_blocks_of_every_family_are_compiled_in_place(name: str) -> None:
    pipe = PIPELINES[name]()
    denoiser = getattr(pipe, get_family(pipe).denoiser)
    names = set(denoiser.state_dict())
    compile_repeated_blocks(denoiser)
    compiled = {path for path, m in denoiser.named_modules() if m._compiled_call_impl is not None}
    blocks = {
        path for path, _ in denoiser.named_modules() if re.search(r"blocks\.\d+$", path)
    }  # the UNets' own lists of blocks are no repeated ones
    assert compiled
    assert compiled == {path for path in blocks if "transformer" in path}
    assert set(denoiser.state_dict()) == names


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    build(num_layers=0, num_single_layers=1).save_pretrained(tmp_path / "base")
    return {
        "pretrained_model_name_or_path": tmp_path / "base",
        "instance_data_dir": make_images(tmp_path / "pictures"),
        "max_train_steps": 2,
    }


def test_a_compiled_run_is_the_plain_one(data: dict[str, Any], tmp_path: Path) -> None:
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    run(output_dir=tmp_path / "compiled", torch_compile=True, **data)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # the compiler's trial and the block
    run(output_dir=tmp_path / "plain", **data)
    assert_close(tmp_path / "plain", tmp_path / "compiled", 1e-3)
    losses = [[row["loss"] for row in metrics(tmp_path / n)] for n in ("plain", "compiled")]
    torch.testing.assert_close(*map(torch.tensor, losses))


def test_without_a_compiler_a_run_goes_on(
    data: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.compiler.reset()
    inductor: Any = torch._inductor.config
    with fresh_cache(), inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        run(output_dir=tmp_path / "compiled", torch_compile=True, **data)
    said = [record.message for record in caplog.records if "--torch_compile" in record.message]
    assert len(said) == 1
    assert "is ignored, since compiling fails here" in said[0]
    assert "no-such-compiler" in said[0]
    run(output_dir=tmp_path / "plain", **data)
    assert_same_run(tmp_path / "plain", tmp_path / "compiled")
