from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from tests.remembered import remembered
from tests.tiny.parts import (
    flow_vae,
    quiet,
    spread_out,
    t5_encoder,
    t5_tokenizer,
    text_encoder,
    tokenizer,
)

FAMILY = "flux"


@remembered
def build(
    seed: int = 0, dev: bool = True, pipeline_class: Any = FluxPipeline, **changes: Any
) -> Any:
    """FLUX.1 dev, or with ``dev=False`` schnell: no guidance, no shift by resolution."""
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 4 * 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 40,
        "pooled_projection_dim": 24,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": dev,
    }
    transformer = FluxTransformer2DModel(**{**arguments, **changes}).eval()
    spread_out(transformer)
    return quiet(
        pipeline_class(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0 if dev else 1.0, use_dynamic_shifting=dev
            ),
            vae=flow_vae(),
            text_encoder=text_encoder(24),
            text_encoder_2=t5_encoder(40),
            tokenizer=tokenizer(),
            tokenizer_2=t5_tokenizer(),
        )
    )
