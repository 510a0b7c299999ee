"""FLUX.2 dev: flow matching, one large language model as text encoder, which stays frozen."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from gralora_diffusion.key_maps import DENOISER, KeyMap, Shape, rename

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
from .flux import ORIGINAL_DOUBLE_ATTENTION, ORIGINAL_ENDS, ORIGINAL_NORMS
from .presets import JOINT_ATTENTION, LANGUAGE_MODEL_PRESETS

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

#: In single blocks, one layer computes queries, keys, values and the feed-forward's input.
_ATTENTION = (*JOINT_ATTENTION, "to_qkv_mlp_proj", "single_transformer_blocks.*.attn.to_out")
_ATTENTION_FF = (
    *_ATTENTION,
    *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
)
#: Width of the language model -> ComfyUI's name for it (comfy/text_encoders/flux.py).
_COMFYUI_NAMES = {5120: "mistral3_24b", 2560: "qwen3_4b", 4096: "qwen3_8b"}
_DOUBLE, _SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
#: Names in the file that Black Forest Labs published, which only contains the transformer.
_ORIGINAL = (
    *(*ORIGINAL_ENDS, *ORIGINAL_DOUBLE_ATTENTION, *ORIGINAL_NORMS),
    *(
        rename(f"time_guidance_embed.{embedder}.linear_{number}", f"{original}.{layer}_layer")
        for embedder, original in (
            ("timestep_embedder", "time_in"),
            ("guidance_embedder", "guidance_in"),
        )
        for number, layer in ((1, "in"), (2, "out"))
    ),
    *(
        rename(f"{stream}.linear", f"{stream}.lin")
        for stream in (
            "double_stream_modulation_img",
            "double_stream_modulation_txt",
            "single_stream_modulation",
        )
    ),
    rename(f"{_DOUBLE}.ff.linear_in", "double_blocks.*.img_mlp.0"),
    rename(f"{_DOUBLE}.ff.linear_out", "double_blocks.*.img_mlp.2"),
    rename(f"{_DOUBLE}.ff_context.linear_in", "double_blocks.*.txt_mlp.0"),
    rename(f"{_DOUBLE}.ff_context.linear_out", "double_blocks.*.txt_mlp.2"),
    rename(f"{_SINGLE}.attn.to_qkv_mlp_proj", "single_blocks.*.linear1"),
    rename(f"{_SINGLE}.attn.to_out", "single_blocks.*.linear2"),
)


def layer_marks(*widths: int) -> tuple[LayerMark, ...]:
    """Return the marks of adapters for transformers of these widths."""
    return (
        LayerMark(r"single_transformer_blocks_\d+_attn_to_qkv_mlp_proj$", inputs=widths),
        LayerMark(r"^transformer_blocks_\d+_ff(_context)?_linear_in$", inputs=widths),
        LayerMark(r"^transformer_blocks_\d+_attn_(to_[qkv]|add_[qkv]_proj)$", inputs=widths),
        LayerMark(
            r"double_blocks_\d+_(img|txt)_mlp_0$", outputs=tuple(6 * width for width in widths)
        ),
        LayerMark(r"double_blocks_\d+_(img|txt)_attn_qkv$", inputs=widths),
        LayerMark(r"single_blocks_\d+_linear1$", outputs=tuple(9 * width for width in widths)),
    )


class Flux2(ModelFamily):
    name = "flux2"
    pipeline_classes: tuple[str, ...] = ("Flux2Pipeline",)
    edit_pipelines: Mapping[str, ControlCount] = MappingProxyType(
        {"Flux2Pipeline": ControlCount(0, None)}
    )
    denoiser = "transformer"
    text_encoders = ()
    frozen_text_encoders = ("text_encoder",)
    objective = "flow_matching"
    target_presets: ClassVar = {
        "transformer": {
            "attention": _ATTENTION,
            "attention+ff": _ATTENTION_FF,
            "attention+ff+modulation": (
                *_ATTENTION_FF,
                *("double_stream_modulation_img.linear", "double_stream_modulation_txt.linear"),
                "single_stream_modulation.linear",
            ),
        },
        "text_encoder": LANGUAGE_MODEL_PRESETS,
    }
    default_resolution = 1024
    max_sequence_length = 512
    single_file_types: tuple[str, ...] = ("flux-2-dev",)
    single_file_keys: tuple[str, ...] = (
        "single_stream_modulation.lin.weight",
        "guidance_in.in_layer.weight",
    )
    original_key_maps = MappingProxyType({"transformer": (KeyMap(("", DENOISER), _ORIGINAL),)})
    unread_by_comfyui = ("transformer.*_modulation*.linear", "transformer.time_guidance_embed.*")
    kohya_prefixes = MappingProxyType({"transformer": "lora_unet"})
    known_as: tuple[str, ...] = ("flux-2", "flux2")
    layer_marks: tuple[LayerMark, ...] = layer_marks(6144)
    generation_precision = "bf16"
    training_defaults = MappingProxyType({"weighting_scheme": "none", "guidance_scale": 3.5})

    def comfyui_prefix(self, component: str, shapes: Mapping[str, Shape]) -> str | None:
        widths = [shape[1] for key, shape in shapes.items() if key.endswith("q_proj.weight")]
        name = _COMFYUI_NAMES.get(max(widths, default=0))
        return name and f"text_encoders.{name}.transformer.model."

    def canonical(self, component: str, key: str) -> str:
        # transformers writes the language model's levels in another order than its modules have
        return (
            re.sub(r"^(model\.|language_model\.)+", "", key) if component != "transformer" else key
        )

    def encode_prompts(
        self,
        pipe: Any,
        prompts: Sequence[str],
        max_sequence_length: int | None = None,
        clip_skip: int | None = None,
    ) -> Conditioning:
        prompt_embeds, _ = pipe.encode_prompt(
            list(prompts),
            device=pipe.text_encoder.device,
            max_sequence_length=max_sequence_length or self.max_sequence_length,
        )
        return {"prompt_embeds": prompt_embeds}

    def count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        # the system message before the prompt counts, too
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        encoded = [
            tokenizer.apply_chat_template(
                format_input([prompt]), add_generation_prompt=False, tokenize=True, return_dict=True
            )
            for prompt in prompts
        ]
        return [len(each["input_ids"][0]) for each in encoded]

    def encode_images(self, vae: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode as the pipeline encodes reference images, so the standard deviation is zero.

        This is the posterior's mode, with 2 x 2 latents stacked as channels and each channel
        normalized.
        """
        import torch
        from diffusers import Flux2Pipeline

        mode = Flux2Pipeline._patchify_latents(vae.encode(pixel_values).latent_dist.mode())
        statistics = vae.bn
        mean = statistics.running_mean.view(1, -1, 1, 1).to(mode)
        variance = statistics.running_var.view(1, -1, 1, 1).to(mode)
        latents = (mode - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)
        return latents, torch.zeros_like(latents)

    def control_preparation(self, pipe: Any, resolution: int | None = None) -> ControlPreparation:
        return partial(
            _reference_pixels, factor=2 * int(pipe.vae_scale_factor), resolution=resolution
        )

    def control_problem(self, size: tuple[int, int]) -> str | None:
        from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
        from PIL import Image

        try:
            Flux2ImageProcessor.check_image_input(Image.new("1", size))
        except ValueError as error:
            return str(error)
        return None

    def predict(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
    ) -> Tensor:
        import torch
        from diffusers import Flux2Pipeline

        prompt_embeds = conditioning["prompt_embeds"]
        controls = controls_of(conditioning)
        with noisy_latents.device:  # copies from the CPU would wait
            text_ids = Flux2Pipeline._prepare_text_ids(prompt_embeds)
            image_ids = Flux2Pipeline._prepare_latent_ids(noisy_latents)
            if controls:
                ids = Flux2Pipeline._prepare_image_ids([control[:1] for control in controls])
                image_ids = torch.cat([image_ids, ids.expand(len(image_ids), -1, -1)], dim=1)
        tokens = [Flux2Pipeline._pack_latents(part) for part in (noisy_latents, *controls)]
        prediction = denoiser(
            hidden_states=torch.cat(tokens, dim=1),
            timestep=timesteps / 1000,
            guidance=conditioning.get("guidance"),
            encoder_hidden_states=prompt_embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        prediction = prediction[:, : tokens[0].shape[1]]
        return prediction.transpose(1, 2).unflatten(2, noisy_latents.shape[2:])

    def shift_mu(self, pipe: Any, latent_shape: Sequence[int]) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        # it also depends on the number of steps: this is the pipeline's default
        steps = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
        return compute_empirical_mu(self.image_tokens(latent_shape), steps)

    def size_divisor(self, pipe: Any) -> int:
        return 2 * int(pipe.vae_scale_factor)

    def published_names(
        self, denoiser: Mapping[str, Any] = UNKNOWN, scheduler: Mapping[str, Any] = UNKNOWN
    ) -> PublishedNames:
        return self._names("dev")

    def _names(self, kind: str) -> PublishedNames:
        code = "https://github.com/black-forest-labs/flux2"
        version = f"flux_2_{kind.replace('-', '_')}"
        return PublishedNames(f"Flux.2-{kind}", version, code, "networks.lora_flux_2")

    def check_base(self, pipe: Any) -> None:
        check_channels(pipe.transformer.config.in_channels, 4 * pipe.vae.config.latent_channels)


def _reference_pixels(image: Image, factor: int, resolution: int | None = None) -> Tensor:
    """Return the pixels that FLUX.2's pipelines make of an image.

    It has at most a megapixel, and is cropped to a multiple of ``factor``, a token's pixels per
    side. With a ``resolution``, it is :func:`reduced` to that first.
    """
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    if resolution is not None:
        image = reduced(image, resolution, factor)
    processor = Flux2ImageProcessor(vae_scale_factor=factor)
    image = processor._resize_if_exceeds_area(image)
    width, height = image.width // factor * factor, image.height // factor * factor
    return processor.preprocess(image, height=height, width=width, resize_mode="crop")[0]


FAMILY = Flux2()
