"""Stable Diffusion 1.x and 2.x: UNet with cross-attention, one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from .base import Conditioning, ModelFamily

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


class StableDiffusion(ModelFamily):
    name = "stable-diffusion"
    pipeline_classes = (
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
    denoiser = "unet"
    text_encoders = ("text_encoder",)
    objective = "ddpm"
    target_presets: ClassVar = {
        "unet": {
            "attention": _ATTENTION,
            "attention+ff": (*_ATTENTION, *_FEED_FORWARD),
            "attention+ff+proj": (*_ATTENTION, *_FEED_FORWARD, "proj_in", "proj_out"),
            "all": (
                *_ATTENTION,
                *_FEED_FORWARD,
                "proj_in",
                "proj_out",
                "conv1",
                "conv2",
                "conv_shortcut",
                "time_emb_proj",
            ),
        },
        "text_encoder": {
            "attention": _CLIP_ATTENTION,
            "attention+ff": (*_CLIP_ATTENTION, "fc1", "fc2"),
        },
    }
    default_resolution = 512
    single_file_types = ("v1", "v2")
    load_options = MappingProxyType({"safety_checker": None, "requires_safety_checker": False})

    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> Conditioning:
        prompt_embeds, _ = pipe.encode_prompt(
            list(prompts),
            device=pipe.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return {"prompt_embeds": prompt_embeds}

    def predict(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
    ) -> Tensor:
        prompt_embeds = conditioning["prompt_embeds"]
        return denoiser(
            noisy_latents, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False
        )[0]

    def check_base(self, pipe: Any) -> None:
        channels, latent = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
        if channels != latent:
            raise ValueError(
                f"the UNet takes {channels} channels and the VAE makes {latent}: an inpainting, "
                "depth or instruct-pix2pix base. Train on the text-to-image base; the adapter can "
                "be loaded into the others' pipelines where widths agree."
            )


FAMILY = StableDiffusion()
