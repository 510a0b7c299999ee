"""Stable Diffusion 3 and 3.5: MMDiT, flow matching, two CLIP text encoders and, if wanted, T5."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import (
    CLIP_PRESETS,
    JOINT_ATTENTION,
    JOINT_FEED_FORWARD,
    T5_PRESETS,
    Conditioning,
    LayerMark,
    ModelFamily,
    check_channels,
)

_ATTENTION_FF = (*JOINT_ATTENTION, *JOINT_FEED_FORWARD)


class StableDiffusion3(ModelFamily):
    name = "stable-diffusion-3"
    pipeline_classes = (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
        "StableDiffusion3ControlNetInpaintingPipeline",
        "StableDiffusion3PAGPipeline",
        "StableDiffusion3PAGImg2ImgPipeline",
    )
    denoiser = "transformer"
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    usual_text_encoders = ("text_encoder", "text_encoder_2")
    optional_text_encoders = ("text_encoder_3",)
    objective = "flow_matching"
    target_presets: ClassVar = {
        "transformer": {
            "attention": JOINT_ATTENTION,
            "attention+ff": _ATTENTION_FF,
            "attention+ff+modulation": (*_ATTENTION_FF, "norm1.linear", "norm1_context.linear"),
        },
        "text_encoder": CLIP_PRESETS,
        "text_encoder_2": CLIP_PRESETS,
        "text_encoder_3": T5_PRESETS,
    }
    default_resolution = 1024
    max_sequence_length = 256
    longest_sequence = 512
    patch_size = 2
    single_file_types = ("sd3", "sd35_large", "sd35_medium")
    single_file_keys = ("joint_blocks.0.x_block.attn.qkv.weight",)
    single_file_prefixes = MappingProxyType(
        {
            "text_encoder": "text_encoders.clip_l.",
            "text_encoder_2": "text_encoders.clip_g.",
            "text_encoder_3": "text_encoders.t5xxl.",
        }
    )
    known_as = ("stable-diffusion-3", "stable-diffusion-v3", "sd-3", "sd3")
    layer_marks = (
        LayerMark(r"joint_blocks_\d+_"),
        LayerMark(
            r"^transformer_blocks_\d+_attn2?_(to_[qkv]|add_[qkv]_proj)$", inputs=(1536, 2432)
        ),
    )
    drawing_dtype = torch.bfloat16
    training_defaults = MappingProxyType({"weighting_scheme": "logit_normal"})

    def encode_prompts(
        self, pipe: Any, prompts: Sequence[str], max_sequence_length: int | None = None
    ) -> Conditioning:
        prompt_embeds, _, pooled, _ = pipe.encode_prompt(
            list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=pipe.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length or self.max_sequence_length,
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}

    def predict(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
    ) -> Tensor:
        return denoiser(
            hidden_states=noisy_latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    def check_base(self, pipe: Any) -> None:
        check_channels(pipe.transformer.config.in_channels, pipe.vae.config.latent_channels)


FAMILY = StableDiffusion3()
