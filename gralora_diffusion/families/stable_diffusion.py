"""Stable Diffusion 1.x and 2.x: UNet with cross-attention, one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from gralora_diffusion.key_maps import UNET, KeyMap, autoencoder, clip, open_clip

from .base import (
    STABILITY_AI,
    UNKNOWN,
    Conditioning,
    ControlCount,
    LayerMark,
    ModelFamily,
    PublishedNames,
    check_channels,
    with_controls,
    with_fill,
)
from .clip_skip import mend_clip_skip
from .presets import CLIP_PRESETS

if TYPE_CHECKING:
    from torch import Tensor, nn

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_ATTENTION_FF = (*_ATTENTION, "ff.net.0.proj", "ff.net.2")
_ATTENTION_FF_PROJ = (*_ATTENTION_FF, "proj_in", "proj_out")
UNET_PRESETS = {
    "attention": _ATTENTION,
    "attention+ff": _ATTENTION_FF,
    "attention+ff+proj": _ATTENTION_FF_PROJ,
    "all": (*_ATTENTION_FF_PROJ, "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
}


class StableDiffusion(ModelFamily):
    name = "stable-diffusion"
    pipeline_classes: tuple[str, ...] = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionInpaintPipelineLegacy",
        "StableDiffusionDepth2ImgPipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionUpscalePipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionAdapterPipeline",
        "StableDiffusionPAGPipeline",
        "StableDiffusionPAGImg2ImgPipeline",
        "StableDiffusionPAGInpaintPipeline",
        "StableDiffusionControlNetPAGPipeline",
        "StableDiffusionControlNetPAGInpaintPipeline",
        "StableDiffusionPanoramaPipeline",
        "StableDiffusionDiffEditPipeline",
        "StableDiffusionGLIGENPipeline",
        "StableDiffusionGLIGENTextImagePipeline",
        "StableDiffusionLDM3DPipeline",
        "StableDiffusionSAGPipeline",
        "StableDiffusionAttendAndExcitePipeline",
        "StableDiffusionModelEditingPipeline",
        "StableDiffusionParadigmsPipeline",
        "StableDiffusionPipelineSafe",
        "StableUnCLIPPipeline",
        "StableUnCLIPImg2ImgPipeline",
        "CycleDiffusionPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
        "PIAPipeline",
    )
    edit_pipelines: Mapping[str, ControlCount] = MappingProxyType(
        {"StableDiffusionInstructPix2PixPipeline": ControlCount(1, 1, aligned=True)}
    )
    inpainting_pipeline = "StableDiffusionInpaintPipeline"
    denoiser = "unet"
    text_encoders: tuple[str, ...] = ("text_encoder",)
    skipped_layers: int | None = 0
    objective = "ddpm"
    target_presets: ClassVar = {"unet": UNET_PRESETS, "text_encoder": CLIP_PRESETS}
    default_resolution = 512
    single_file_types: tuple[str, ...] = ("v1", "v2")
    inpainting_file_types: tuple[str, ...] = ("inpainting", "inpainting_v2")
    editing_file_types: tuple[str, ...] = ("instruct-pix2pix",)
    single_file_keys: tuple[str, ...] = ("input_blocks.0.0.weight",)
    original_key_maps: Mapping[str, Sequence[KeyMap]] = MappingProxyType(
        {
            "unet": (UNET,),
            "vae": (autoencoder("first_stage_model."),),
            "text_encoder": (
                open_clip("cond_stage_model.model.", "clip_h", width=1024),
                clip("cond_stage_model.", "clip_l"),
            ),
        }
    )
    unread_by_comfyui = ("unet.*.to_*", "text_encoder*.text_projection")
    kohya_prefixes: Mapping[str, str] = MappingProxyType(
        {"unet": "lora_unet", "text_encoder": "lora_te"}
    )
    kohya_original_names = False
    known_as: tuple[str, ...] = (
        *("stable-diffusion-1", "stable-diffusion-2", "stable-diffusion-v1", "stable-diffusion-v2"),
        *("sd-1", "sd-2", "sd-v1", "sd-v2", "sd1", "sd2"),
    )
    layer_marks: tuple[LayerMark, ...] = (LayerMark(r"_attn2_to_[kv]$", inputs=(768, 1024)),)
    lora_options: Mapping[str, Any] = MappingProxyType(
        {"unet_config": SimpleNamespace(layers_per_block=2)}
    )
    load_options: Mapping[str, Any] = MappingProxyType(
        {"safety_checker": None, "requires_safety_checker": False}
    )

    def encode_prompts(
        self,
        pipe: Any,
        prompts: Sequence[str],
        max_sequence_length: int | None = None,
        clip_skip: int | None = None,
    ) -> Conditioning:
        if clip_skip is not None:
            mend_clip_skip(pipe)
        prompt_embeds, _ = pipe.encode_prompt(
            list(prompts),
            device=pipe.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            clip_skip=clip_skip,
        )
        return {"prompt_embeds": prompt_embeds}

    def encode_images(self, vae: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode as the pipelines do, which only use ``scaling_factor`` of the VAE's config."""
        posterior = vae.encode(pixel_values).latent_dist
        scale = vae.config.scaling_factor
        return posterior.mean * scale, posterior.std * scale

    def control_count(self, pipe: Any) -> ControlCount:
        edits = pipe.unet.config.in_channels == 2 * pipe.vae.config.latent_channels
        return super().control_count(pipe) if edits else ControlCount()

    def encode_controls(self, vae: Any, pixel_values: Tensor) -> Tensor:
        """Encode as InstructPix2Pix's pipeline does: the posterior's mode, not scaled."""
        return vae.encode(pixel_values).latent_dist.mode()

    def absent_controls(self, pipe: Any, latents: Tensor) -> list[Tensor]:
        # the pipeline's guidance by the image uses zeros
        return [latents.new_zeros(latents.shape)] if self.control_count(pipe).least else []

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
            return_dict=False,
        )[0]

    def fills(self, pipe: Any) -> bool:
        latents: int = pipe.vae.config.latent_channels
        return pipe.unet.config.in_channels == 2 * latents + 1

    def published_names(
        self, denoiser: Mapping[str, Any] = UNKNOWN, scheduler: Mapping[str, Any] = UNKNOWN
    ) -> PublishedNames:
        if denoiser.get("cross_attention_dim") != 1024:
            return PublishedNames("stable-diffusion-v1", "sd_v1", STABILITY_AI)
        if scheduler.get("prediction_type") == "v_prediction":
            return PublishedNames("stable-diffusion-v2-768-v", "sd_v2_v", STABILITY_AI, is_v2=True)
        return PublishedNames("stable-diffusion-v2-512", "sd_v2", STABILITY_AI, is_v2=True)

    def check_base(self, pipe: Any) -> None:
        if not (self.control_count(pipe).most or self.fills(pipe)):
            check_channels(pipe.unet.config.in_channels, pipe.vae.config.latent_channels)


FAMILY = StableDiffusion()
