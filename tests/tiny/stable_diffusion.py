from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from tests.remembered import remembered
from tests.tiny.parts import quiet, text_encoder, tokenizer, unet, vae

FAMILY = "stable-diffusion"


@remembered
def build(seed: int = 0, **unet_changes: Any) -> StableDiffusionPipeline:
    torch.manual_seed(seed)
    return quiet(
        StableDiffusionPipeline(
            vae=vae(),
            text_encoder=text_encoder(unet_changes.get("cross_attention_dim", 32)),
            tokenizer=tokenizer(),
            unet=unet(**unet_changes),
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )
