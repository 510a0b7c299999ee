"""Stable Diffusion XL: UNet with cross-attention, two CLIP text encoders, image sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from gralora_diffusion.key_maps import UNET, autoencoder, clip, open_clip

from .base import (
    STABILITY_AI,
    UNKNOWN,
    Conditioning,
    ControlCount,
    LayerMark,
    PublishedNames,
    with_controls,
    with_fill,
)
from .presets import CLIP_PRESETS
from .stable_diffusion import UNET_PRESETS, StableDiffusion

if TYPE_CHECKING:
    from torch import Tensor, nn


class StableDiffusionXL(StableDiffusion):
    name = "stable-diffusion-xl"
    pipeline_classes = (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLInstructPix2PixPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLControlNetUnionPipeline",
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        "StableDiffusionXLControlNetUnionInpaintPipeline",
        "StableDiffusionXLControlNetXSPipeline",
        "StableDiffusionXLAdapterPipeline",
        "StableDiffusionXLPAGPipeline",
        "StableDiffusionXLPAGImg2ImgPipeline",
        "StableDiffusionXLPAGInpaintPipeline",
        "StableDiffusionXLControlNetPAGPipeline",
        "StableDiffusionXLControlNetPAGImg2ImgPipeline",
        "AnimateDiffSDXLPipeline",
        "TextToVideoZeroSDXLPipeline",
        "LEditsPPPipelineStableDiffusionXL",
    )
    edit_pipelines = MappingProxyType(
        {"StableDiffusionXLInstructPix2PixPipeline": ControlCount(1, 1, aligned=True)}
    )
    inpainting_pipeline = "StableDiffusionXLInpaintPipeline"
    text_encoders = ("text_encoder", "text_encoder_2")
    skipped_layers = 1
    target_presets: ClassVar = {
        "unet": UNET_PRESETS,
        "text_encoder": CLIP_PRESETS,
        "text_encoder_2": CLIP_PRESETS,
    }
    default_resolution = 1024
    single_file_types = ("xl_base",)
    inpainting_file_types = ("xl_inpaint",)
    single_file_keys = ("input_blocks.0.0.weight", "label_emb.0.0.weight")
    original_key_maps = MappingProxyType(
        {
            "unet": (UNET,),
            "vae": (autoencoder("first_stage_model."),),
            "text_encoder": (clip("conditioner.embedders.0.", "clip_l"),),
            "text_encoder_2": (open_clip("conditioner.embedders.1.model.", "clip_g"),),
        }
    )
    kohya_prefixes = MappingProxyType(
        {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    )
    kohya_original_names = True
    known_as = ("stable-diffusion-xl", "sd-xl", "sdxl")
    layer_marks = (
        LayerMark(r"_attn2_to_[kv]$", inputs=(2048,)),
        # only this family's attentions have more than one of these blocks
        LayerMark(r"(attentions_\d|put_blocks_\d_1|middle_block_1)_transformer_blocks_[1-9]_"),
        LayerMark(r"^(add_embedding|label_emb)_"),
    )
    load_options = MappingProxyType({"add_watermarker": False})
    refused_settings = MappingProxyType(
        {"is_cosxl_edit": "it scales the latents of control images in a way of its own"}
    )

    def original_marks(self, scheduler: Mapping[str, Any]) -> tuple[str, ...]:
        # without them ComfyUI assumes that it predicts noise (comfy/supported_models.py)
        if scheduler.get("prediction_type") != "v_prediction":
            return ()
        return ("v_pred", "ztsnr") if scheduler.get("rescale_betas_zero_snr") else ("v_pred",)

    def encode_prompts(
        self,
        pipe: Any,
        prompts: Sequence[str],
        max_sequence_length: int | None = None,
        clip_skip: int | None = None,
    ) -> Conditioning:
        import torch

        prompt_embeds, _, pooled, _ = pipe.encode_prompt(
            list(prompts),
            device=pipe.text_encoder_2.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            clip_skip=clip_skip,
        )
        if pipe.config.force_zeros_for_empty_prompt and not all(prompts):
            # the pipeline's guidance uses zeros for the empty prompt
            prompt_embeds, pooled = (
                # row by row, because a mask would be copied from the CPU, which waits
                torch.stack(
                    [
                        row if prompt else torch.zeros_like(row)
                        for row, prompt in zip(rows, prompts, strict=True)
                    ]
                )
                for rows in (prompt_embeds, pooled)
            )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}

    def image_conditioning(
        self,
        pipe: Any,
        original_sizes: Tensor,
        crop_top_lefts: Tensor,
        target_sizes: Tensor,
        guidance_scale: float | None,
    ) -> Conditioning:
        import torch

        # arXiv 2307.01952, section 2.2; in fp32, because bf16 would round sizes above 256
        ids = torch.cat([original_sizes, crop_top_lefts, target_sizes], dim=1)
        return {"time_ids": ids.float()}

    def encode_images(self, vae: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode as the pipelines do.

        They also use ``latents_mean`` and ``latents_std`` of the VAE's config if it has both
        (Playground v2.5).
        """
        config = vae.config
        if not _has_statistics(config):
            return super().encode_images(vae, pixel_values)
        posterior = vae.encode(pixel_values).latent_dist
        mean, std = (
            posterior.mean.new_tensor(values).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        scaled = (posterior.mean - mean) * config.scaling_factor / std
        return scaled, posterior.std * config.scaling_factor / std

    def predict(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
    ) -> Tensor:
        return denoiser(
            with_fill(with_controls(noisy_latents, conditioning), conditioning),
            timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            added_cond_kwargs={
                "text_embeds": conditioning["pooled_prompt_embeds"],
                "time_ids": conditioning["time_ids"],
            },
            return_dict=False,
        )[0]

    def published_names(
        self, denoiser: Mapping[str, Any] = UNKNOWN, scheduler: Mapping[str, Any] = UNKNOWN
    ) -> PublishedNames:
        return PublishedNames("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", STABILITY_AI)

    def check_base(self, pipe: Any) -> None:
        super().check_base(pipe)
        if pipe.text_encoder is None or pipe.text_encoder_2 is None:
            raise ValueError(
                "one of the two text encoders is missing, as in the refiner. Train on the base "
                "model, such as stabilityai/stable-diffusion-xl-base-1.0"
            )
        if _has_statistics(pipe.vae.config):
            _check_statistics(pipe.vae.config)


def _has_statistics(config: Any) -> bool:
    """Whether the pipelines use statistics of the latents; they need both to be set."""
    values = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    return all(value is not None for value in values)


def _check_statistics(config: Any) -> None:
    """Raise ValueError unless the statistics have one number for each channel."""
    for name in ("latents_mean", "latents_std"):
        values = getattr(config, name)
        numbers = isinstance(values, list | tuple) and all(
            isinstance(v, int | float) and math.isfinite(v) for v in values
        )
        if (
            not numbers
            or len(values) != config.latent_channels
            or (name == "latents_std" and min(values) <= 0)
        ):
            raise ValueError(
                f"{name} in the VAE's config is {values!r}; it must have "
                f"{config.latent_channels} numbers, and those of latents_std must be positive. "
                "Correct vae/config.json, or pass another VAE as "
                "--pretrained_vae_model_name_or_path"
            )


FAMILY = StableDiffusionXL()
