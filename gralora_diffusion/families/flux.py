"""FLUX.1: dev, schnell and their kin. Flow matching, a CLIP and a T5 text encoder.

Kontext is trained with control images, too. Fill is loaded, fused and exported like the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from gralora_diffusion.key_maps import DENOISER, KeyMap, autoencoder, clip, join, rename, swap, t5

from .base import (
    UNKNOWN,
    Conditioning,
    ControlCount,
    ControlPreparation,
    LayerMark,
    ModelFamily,
    PublishedNames,
    check_channels,
    controls_of,
)
from .control_sizes import reduced
from .presets import CLIP_PRESETS, JOINT_ATTENTION, JOINT_FEED_FORWARD, T5_PRESETS

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

_ATTENTION_FF = (
    *(*JOINT_ATTENTION, *JOINT_FEED_FORWARD),
    # in single blocks, the second is the joint output of attention and feed-forward
    *("proj_mlp", "single_transformer_blocks.*.proj_out"),
)
_DOUBLE, _SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
#: Names in the file that Black Forest Labs published; those that FLUX.2 shares come first.
ORIGINAL_ENDS = (
    rename("x_embedder", "img_in"),
    rename("context_embedder", "txt_in"),
    swap("norm_out.linear", "final_layer.adaLN_modulation.1"),
    rename("proj_out", "final_layer.linear"),
)
ORIGINAL_DOUBLE_ATTENTION = (
    join([f"{_DOUBLE}.attn.to_{n}" for n in "qkv"], "double_blocks.*.img_attn.qkv"),
    join([f"{_DOUBLE}.attn.add_{n}_proj" for n in "qkv"], "double_blocks.*.txt_attn.qkv"),
    rename(f"{_DOUBLE}.attn.to_out.0", "double_blocks.*.img_attn.proj"),
    rename(f"{_DOUBLE}.attn.to_add_out", "double_blocks.*.txt_attn.proj"),
)
ORIGINAL_NORMS = tuple(
    rename(f"{name}.weight", f"{original}.{leaf}")
    # ComfyUI writes the second ending
    for leaf in ("scale", "weight")
    for name, original in (
        (f"{_DOUBLE}.attn.norm_q", "double_blocks.*.img_attn.norm.query_norm"),
        (f"{_DOUBLE}.attn.norm_k", "double_blocks.*.img_attn.norm.key_norm"),
        (f"{_DOUBLE}.attn.norm_added_q", "double_blocks.*.txt_attn.norm.query_norm"),
        (f"{_DOUBLE}.attn.norm_added_k", "double_blocks.*.txt_attn.norm.key_norm"),
        (f"{_SINGLE}.attn.norm_q", "single_blocks.*.norm.query_norm"),
        (f"{_SINGLE}.attn.norm_k", "single_blocks.*.norm.key_norm"),
    )
)
_ORIGINAL = (
    *(*ORIGINAL_ENDS, *ORIGINAL_DOUBLE_ATTENTION, *ORIGINAL_NORMS),
    *(
        rename(f"time_text_embed.{embedder}.linear_{number}", f"{original}.{layer}_layer")
        for embedder, original in (
            ("timestep_embedder", "time_in"),
            ("text_embedder", "vector_in"),
            ("guidance_embedder", "guidance_in"),
        )
        for number, layer in ((1, "in"), (2, "out"))
    ),
    rename(f"{_DOUBLE}.norm1.linear", "double_blocks.*.img_mod.lin"),
    rename(f"{_DOUBLE}.norm1_context.linear", "double_blocks.*.txt_mod.lin"),
    rename(f"{_DOUBLE}.ff.net.0.proj", "double_blocks.*.img_mlp.0"),
    rename(f"{_DOUBLE}.ff.net.2", "double_blocks.*.img_mlp.2"),
    rename(f"{_DOUBLE}.ff_context.net.0.proj", "double_blocks.*.txt_mlp.0"),
    rename(f"{_DOUBLE}.ff_context.net.2", "double_blocks.*.txt_mlp.2"),
    join(
        [*(f"{_SINGLE}.attn.to_{n}" for n in "qkv"), f"{_SINGLE}.proj_mlp"],
        "single_blocks.*.linear1",
        sizes=(1, 1, 1, 4),
    ),
    rename(f"{_SINGLE}.proj_out", "single_blocks.*.linear2"),
    rename(f"{_SINGLE}.norm.linear", "single_blocks.*.modulation.lin"),
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
    edit_pipelines = MappingProxyType(
        dict.fromkeys(("FluxKontextPipeline", "FluxKontextInpaintPipeline"), ControlCount(0, 1))
    )
    inpainting_pipeline = "FluxFillPipeline"
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
    inpainting_file_types = ("flux-fill",)
    ambiguous_file_types = ("flux-dev",)  # Kontext
    single_file_keys = ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight")
    original_key_maps = MappingProxyType(
        {
            "transformer": (KeyMap((DENOISER, ""), _ORIGINAL),),
            "vae": (autoencoder("vae.", "first_stage_model."),),
            "text_encoder": (clip("text_encoders.clip_l.", "clip_l"),),
            "text_encoder_2": (t5("text_encoders.t5xxl.", "t5xxl"),),
        }
    )
    kohya_prefixes = MappingProxyType(
        # as in sd-scripts and ComfyUI, which have no lora_te2 for it
        {"transformer": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te3"}
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
    generation_precision = "bf16"
    training_defaults = MappingProxyType({"weighting_scheme": "none", "guidance_scale": 3.5})

    def encode_prompts(
        self,
        pipe: Any,
        prompts: Sequence[str],
        max_sequence_length: int | None = None,
        clip_skip: int | None = None,
    ) -> Conditioning:
        prompt_embeds, pooled, _ = pipe.encode_prompt(
            list(prompts),
            prompt_2=None,
            device=pipe.text_encoder.device,
            max_sequence_length=max_sequence_length or self.max_sequence_length,
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}

    def control_count(self, pipe: Any) -> ControlCount:
        return ControlCount() if self.fills(pipe) else super().control_count(pipe)

    def control_preparation(self, pipe: Any, resolution: int | None = None) -> ControlPreparation:
        return partial(
            _kontext_pixels, factor=2 * int(pipe.vae_scale_factor), resolution=resolution
        )

    def predict(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
    ) -> Tensor:
        import torch
        from diffusers import FluxPipeline

        batch, _, height, width = noisy_latents.shape
        device, dtype = noisy_latents.device, noisy_latents.dtype
        prompt_embeds = conditioning["prompt_embeds"]
        with device:  # a copy from the CPU would wait
            image_ids = FluxPipeline._prepare_latent_image_ids(
                batch, height // 2, width // 2, device, dtype
            )
        inputs = [noisy_latents]
        if "fill_mask" in conditioning:
            inputs += [conditioning["masked_image"], conditioning["fill_mask"]]
        packed = [
            FluxPipeline._pack_latents(part, batch, part.shape[1], height, width) for part in inputs
        ]
        tokens = torch.cat(packed, dim=2)
        count = tokens.shape[1]
        for number, control in enumerate(controls_of(conditioning), 1):
            ids, more = _control_tokens(control, number)
            image_ids = torch.cat([image_ids, ids])
            tokens = torch.cat([tokens, more], dim=1)
        prediction = denoiser(
            hidden_states=tokens,
            timestep=timesteps / 1000,
            guidance=conditioning.get("guidance"),
            pooled_projections=conditioning["pooled_prompt_embeds"],
            encoder_hidden_states=prompt_embeds,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=device, dtype=dtype),
            img_ids=image_ids,
            return_dict=False,
        )[0]
        # sizes in pixels, for a VAE with a scale factor of 1
        return FluxPipeline._unpack_latents(prediction[:, :count], height, width, 1)

    def published_names(
        self, denoiser: Mapping[str, Any] = UNKNOWN, scheduler: Mapping[str, Any] = UNKNOWN
    ) -> PublishedNames:
        kind = "flux-1"
        if "guidance_embeds" in denoiser:
            kind += "-dev" if denoiser["guidance_embeds"] else "-schnell"
        code = "https://github.com/black-forest-labs/flux"
        return PublishedNames(kind, "flux1", code, "networks.lora_flux")

    def fills(self, pipe: Any) -> bool:
        latents, pixels = pipe.vae.config.latent_channels, int(pipe.vae_scale_factor) ** 2
        return pipe.transformer.config.in_channels == 4 * (2 * latents + pixels)

    def fill_masks(self, pipe: Any, masks: Tensor) -> Tensor:
        """Return every pixel of a latent as a channel, as Fill takes them."""
        from torch.nn.functional import pixel_unshuffle

        return pixel_unshuffle(masks, int(pipe.vae_scale_factor))

    def check_base(self, pipe: Any) -> None:
        if self.fills(pipe):
            return
        check_channels(pipe.transformer.config.in_channels, 4 * pipe.vae.config.latent_channels)


def _control_tokens(control: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return ids and tokens of a control image's latents (batch, channels, height, width)."""
    from diffusers import FluxPipeline

    batch, channels, height, width = control.shape
    with control.device:  # a copy from the CPU would wait
        ids = FluxPipeline._prepare_latent_image_ids(
            batch, height // 2, width // 2, control.device, control.dtype
        )
    ids[..., 0] = number  # as in the pipeline, where the target has 0
    return ids, FluxPipeline._pack_latents(control, batch, channels, height, width)


def _kontext_pixels(image: Image, factor: int, resolution: int | None = None) -> Tensor:
    """Return the pixels that Kontext's pipeline makes of an image.

    It has the size of Kontext's training that is nearest in shape, whatever its own. With a
    ``resolution``, it is :func:`reduced` to it, and otherwise has its own size, as with the
    pipeline's ``_auto_resize=False``.

    Args:
        factor: pixels per side of a token.
    """
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.pipelines.flux import pipeline_flux_kontext as kontext

    if resolution is None:
        shape = image.width / image.height
        _, width, height = min(
            (abs(shape - w / h), w, h) for w, h in kontext.PREFERRED_KONTEXT_RESOLUTIONS
        )
    else:
        image = reduced(image, resolution, factor)
        width, height = image.size
    width, height = width // factor * factor, height // factor * factor
    processor = VaeImageProcessor(vae_scale_factor=factor)
    resized = processor.resize(image, height, width)
    return processor.preprocess(resized, height, width)[0]


FAMILY = Flux()
