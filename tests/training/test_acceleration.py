"""accelerate as the trainer sets it up."""

from __future__ import annotations

from torch import nn

from gralora_diffusion.injection import inject
from gralora_diffusion.training.acceleration import share_only_what_is_trained
from tests.models import PIPELINES, config


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
