"""accelerate as the trainer sets it up."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from gralora_diffusion.injection import inject
from gralora_diffusion.training import loop
from gralora_diffusion.training.acceleration import share_only_what_is_trained
from gralora_diffusion.training.config_checks import ConfigError
from tests.models import PIPELINES, config
from tests.training.runs import run


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
        ("ACCELERATE_USE_FSDP", "true", "set to FSDP, which shards"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "set to Megatron-LM, which shards"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "set to a parallelism config, which shards"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "set to mixed precision fp8; give"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "fp16, which needs a GPU"),
        ("ACCELERATE_DYNAMO_BACKEND", "FASTEST", "as it is set: .*FASTEST.* `accelerate config`"),
    ],
)
def test_settings_of_accelerate_that_would_break_a_run(
    base: Any,
    pictures: Any,
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
            instance_data_dir=pictures,
            output_dir=tmp_path / "out",
            mixed_precision=None,
        )
    assert not loaded
    assert not (tmp_path / "out").exists()
