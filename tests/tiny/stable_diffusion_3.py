from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from tests.remembered import remembered
from tests.tiny.parts import (
    flow_vae,
    quiet,
    spread_out,
    t5_encoder,
    t5_tokenizer,
    text_encoder_with_projection,
    tokenizer,
)

FAMILY = "stable-diffusion-3"


@remembered
def build(seed: int = 0, with_t5: bool = True, **changes: Any) -> StableDiffusion3Pipeline:
    """As Stable Diffusion 3.5 medium: normalized queries and keys, a second attention in front."""
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 80,  # wider than both CLIPs together
        "pooled_projection_dim": 16 + 24,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    transformer = SD3Transformer2DModel(**{**arguments, **changes}).eval()
    spread_out(transformer)
    return quiet(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=flow_vae(),
            text_encoder=text_encoder_with_projection(32, 16),
            text_encoder_2=text_encoder_with_projection(40, 24),
            text_encoder_3=t5_encoder(80) if with_t5 else None,
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            tokenizer_3=t5_tokenizer() if with_t5 else None,
        )
    )
