"""Stable Diffusion 3 and 3.5: MMDiT, flow matching, two CLIP text encoders and optionally T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from gralora_diffusion.key_maps import DENOISER, KeyMap, autoencoder, clip, join, rename, swap, t5

from .base import (
    STABILITY_AI,
    UNKNOWN,
    Conditioning,
    LayerMark,
    ModelFamily,
    PublishedNames,
    check_channels,
)
from .presets import CLIP_PRESETS, JOINT_ATTENTION, JOINT_FEED_FORWARD, T5_PRESETS

if TYPE_CHECKING:
    from torch import Tensor, nn

_ATTENTION_FF = (*JOINT_ATTENTION, *JOINT_FEED_FORWARD)
_BLOCK = "transformer_blocks.*"
_IMAGE, _TEXT = "joint_blocks.*.x_block", "joint_blocks.*.context_block"
#: Names in the file that Stability AI published.
_ORIGINAL = (
    rename("pos_embed.pos_embed", "pos_embed"),
    rename("pos_embed.proj", "x_embedder.proj"),
    rename("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    rename("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    rename("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
    rename("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
    rename("context_embedder", "context_embedder"),
    *(
        join([f"{_BLOCK}.{attention}.to_{n}" for n in "qkv"], f"{_IMAGE}.{attention}.qkv")
        for attention in ("attn", "attn2")
    ),
    join([f"{_BLOCK}.attn.add_{n}_proj" for n in "qkv"], f"{_TEXT}.attn.qkv"),
    rename(f"{_BLOCK}.attn.to_out.0", f"{_IMAGE}.attn.proj"),
    rename(f"{_BLOCK}.attn2.to_out.0", f"{_IMAGE}.attn2.proj"),
    rename(f"{_BLOCK}.attn.to_add_out", f"{_TEXT}.attn.proj"),
    *(
        rename(f"{_BLOCK}.{attention}.norm_{n}", f"{_IMAGE}.{attention}.ln_{n}")
        for attention in ("attn", "attn2")
        for n in "qk"
    ),
    *(rename(f"{_BLOCK}.attn.norm_added_{n}", f"{_TEXT}.attn.ln_{n}") for n in "qk"),
    rename(f"{_BLOCK}.norm1.linear", f"{_IMAGE}.adaLN_modulation.1"),
    # in the last block, which drops the text, shift comes before scale
    swap(f"{_BLOCK}.norm1_context.linear", f"{_TEXT}.adaLN_modulation.1"),
    rename(f"{_BLOCK}.ff.net.0.proj", f"{_IMAGE}.mlp.fc1"),
    rename(f"{_BLOCK}.ff.net.2", f"{_IMAGE}.mlp.fc2"),
    rename(f"{_BLOCK}.ff_context.net.0.proj", f"{_TEXT}.mlp.fc1"),
    rename(f"{_BLOCK}.ff_context.net.2", f"{_TEXT}.mlp.fc2"),
    swap("norm_out.linear", "final_layer.adaLN_modulation.1"),
    rename("proj_out", "final_layer.linear"),
)


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
    skipped_layers = 1
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
    original_key_maps = MappingProxyType(
        {
            "transformer": (KeyMap((DENOISER, ""), _ORIGINAL),),
            "vae": (autoencoder("first_stage_model."),),
            "text_encoder": (clip("text_encoders.clip_l.", "clip_l"),),
            "text_encoder_2": (clip("text_encoders.clip_g.", "clip_g"),),
            "text_encoder_3": (t5("text_encoders.t5xxl.", "t5xxl"),),
        }
    )
    kohya_prefixes = MappingProxyType(
        {
            "transformer": "lora_unet",
            "text_encoder": "lora_te1",
            "text_encoder_2": "lora_te2",
            "text_encoder_3": "lora_te3",
        }
    )
    known_as = ("stable-diffusion-3", "stable-diffusion-v3", "sd-3", "sd3")
    layer_marks = (
        LayerMark(r"joint_blocks_\d+_"),
        LayerMark(
            r"^transformer_blocks_\d+_attn2?_(to_[qkv]|add_[qkv]_proj)$", inputs=(1536, 2432)
        ),
    )
    generation_precision = "bf16"
    training_defaults = MappingProxyType({"weighting_scheme": "logit_normal"})

    def encode_prompts(
        self,
        pipe: Any,
        prompts: Sequence[str],
        max_sequence_length: int | None = None,
        clip_skip: int | None = None,
    ) -> Conditioning:
        prompt_embeds, _, pooled, _ = pipe.encode_prompt(
            list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=pipe.text_encoder.device,
            do_classifier_free_guidance=False,
            clip_skip=clip_skip,
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

    def published_names(
        self, denoiser: Mapping[str, Any] = UNKNOWN, scheduler: Mapping[str, Any] = UNKNOWN
    ) -> PublishedNames:
        if not denoiser:
            kind, version = "v3", "sd3"
        elif not denoiser.get("qk_norm"):
            kind, version = "v3-medium", "sd3-medium"
        elif denoiser.get("dual_attention_layers"):
            kind, version = "v3.5-medium", "sd3-5-medium"
        else:
            kind, version = "v3.5-large", "sd3-5-large"
        return PublishedNames(
            f"stable-diffusion-{kind}", version, STABILITY_AI, "networks.lora_sd3"
        )

    def check_base(self, pipe: Any) -> None:
        check_channels(pipe.transformer.config.in_channels, pipe.vae.config.latent_channels)


FAMILY = StableDiffusion3()
