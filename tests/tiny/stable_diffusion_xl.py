from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

from tests.remembered import remembered
from tests.tiny.parts import quiet, text_encoder, text_encoder_with_projection, tokenizer, unet, vae

FAMILY = "stable-diffusion-xl"


@remembered
def build(seed: int = 0, clip_g_layers: int = 3, **unet_changes: Any) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    changes: dict[str, Any] = {
        "cross_attention_dim": 32 + 40,
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
    }
    return quiet(
        StableDiffusionXLPipeline(
            vae=vae(scaling_factor=0.13025, force_upcast=True),
            text_encoder=text_encoder(32),
            text_encoder_2=text_encoder_with_projection(40, 24, clip_g_layers),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=unet(**{**changes, **unet_changes}),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
            ),
            add_watermarker=False,
        )
    )
