"""FLUX.1: dev, schnell and their kin. Flow matching, a CLIP and a T5 text encoder.

Kontext and Fill are loaded, fused and exported like the others; training is for text to image.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline
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

_ATTENTION_FF = (
    *(*JOINT_ATTENTION, *JOINT_FEED_FORWARD),
    # in single blocks the second one is the attention's output and the feed-forward's in one
    *("proj_mlp", "single_transformer_blocks.*.proj_out"),
)


class Flux(ModelFamily):
    name = "flux"
    pipeline_classes = (
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxKontextPipeline",
        "FluxKontextInpaintPipeline",
        "FluxFillPipeline",
        "FluxControlPipeline",
        "FluxControlImg2ImgPipeline",
        "FluxControlInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
    )
    denoiser = "transformer"
    text_encoders = ("text_encoder", "text_encoder_2")
    usual_text_encoders = ("text_encoder",)
    objective = "flow_matching"
    target_presets: ClassVar = {
        "transformer": {
            "attention": JOINT_ATTENTION,
            "attention+ff": _ATTENTION_FF,
            "attention+ff+modulation": (
                *_ATTENTION_FF,
                *("norm1.linear", "norm1_context.linear", "norm.linear"),
            ),
        },
        "text_encoder": CLIP_PRESETS,
        "text_encoder_2": T5_PRESETS,
    }
    default_resolution = 1024
    max_sequence_length = 512
    longest_sequence = 512
    patch_size = 2
    single_file_types = ("flux-dev", "flux-schnell")
    single_file_keys = ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight")
    single_file_prefixes = MappingProxyType(
        {"text_encoder": "text_encoders.clip_l.", "text_encoder_2": "text_encoders.t5xxl."}
    )
    known_as = ("flux-1", "flux1", "flux-dev", "flux-schnell")
    layer_marks = (
        LayerMark(r"single_transformer_blocks_\d+_(proj_mlp|proj_out|norm_linear|attn_to_[qkv])$"),
        LayerMark(
            r"^transformer_blocks_\d+_(norm1(_context)?_linear|ff_net_2)$", inputs=(3072, 12288)
        ),
        LayerMark(r"^transformer_blocks_\d+_attn_(to_[qkv]|add_[qkv]_proj)$", inputs=(3072,)),
        LayerMark(r"double_blocks_\d+_(img|txt)_mod_lin$|single_blocks_\d+_modulation_lin$"),
        LayerMark(r"double_blocks_\d+_(img|txt)_mlp_0$", outputs=(12288,)),
        LayerMark(r"double_blocks_\d+_(img|txt)_attn_qkv$", inputs=(3072,)),
        LayerMark(r"single_blocks_\d+_linear1$", outputs=(21504,)),
    )
    drawing_dtype = torch.bfloat16
    training_defaults = MappingProxyType({"weighting_scheme": "none", "guidance_scale": 3.5})

    def encode_prompts(
        self, pipe: Any, prompts: Sequence[str], max_sequence_length: int | None = None
    ) -> Conditioning:
        prompt_embeds, pooled, _ = pipe.encode_prompt(
            list(prompts),
            prompt_2=None,
            device=pipe.text_encoder.device,
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
        batch, channels, height, width = noisy_latents.shape
        device, dtype = noisy_latents.device, noisy_latents.dtype
        prompt_embeds = conditioning["prompt_embeds"]
        prediction = denoiser(
            hidden_states=FluxPipeline._pack_latents(noisy_latents, batch, channels, height, width),
            timestep=timesteps / 1000,
            guidance=conditioning.get("guidance"),
            pooled_projections=conditioning["pooled_prompt_embeds"],
            encoder_hidden_states=prompt_embeds,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=device, dtype=dtype),
            img_ids=FluxPipeline._prepare_latent_image_ids(
                batch, height // 2, width // 2, device, dtype
            ),
            return_dict=False,
        )[0]
        # sizes in pixels of a VAE that shrinks by one
        return FluxPipeline._unpack_latents(prediction, height, width, 1)

    def check_base(self, pipe: Any) -> None:
        check_channels(pipe.transformer.config.in_channels, 4 * pipe.vae.config.latent_channels)


FAMILY = Flux()
