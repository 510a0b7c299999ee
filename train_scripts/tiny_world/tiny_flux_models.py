"""The untrained parts of the bundled tiny base in the shape of FLUX, and its pipeline.

Its autoencoder and CLIP text encoder continue those of the tiny base.
"""

from __future__ import annotations

import tiny_base_models as base_models
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

LATENT_CHANNELS = 16
#: deviations of the latent channels: those of the tiny base, and the new ones, which hold details
DEVIATIONS = (1.0,) * base_models.LATENT_CHANNELS + (0.4,) * 8
HEAD_WIDTH, HEADS = 32, 6
T5_WIDTH = 128
T5_TOKENS = 16


def build_vae() -> AutoencoderKL:
    """Build the VAE: 64x64x3 pixels to 16x16x16 latents, without 1x1 convolutions, as in FLUX."""
    return AutoencoderKL.from_config(
        base_models.build_vae().config,
        latent_channels=LATENT_CHANNELS,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


@torch.no_grad()
def continue_vae(base: AutoencoderKL) -> AutoencoderKL:
    """Return a VAE whose first eight latent channels are those of the tiny base.

    Its decoder does not read the other eight yet. The base's 1x1 convolutions are multiplied into
    the 3x3 ones beside them. That is exact but for the border of the decoder's, which pads zeros.
    """
    vae, old = build_vae(), base_models.LATENT_CHANNELS
    state = base.state_dict()
    to_latents, from_latents = (
        (state.pop(f"{name}.weight")[:, :, 0, 0], state.pop(f"{name}.bias"))
        for name in ("quant_conv", "post_quant_conv")
    )
    weight, bias = vae.encoder.conv_out.weight, vae.encoder.conv_out.bias
    kept = [*range(old), *range(LATENT_CHANNELS, LATENT_CHANNELS + old)]  # means, log variances
    weight[kept] = torch.einsum("oi,ihwk->ohwk", to_latents[0], state["encoder.conv_out.weight"])
    bias[kept] = to_latents[0] @ state["encoder.conv_out.bias"] + to_latents[1]
    bias[LATENT_CHANNELS + old :] = -6
    state |= {"encoder.conv_out.weight": weight, "encoder.conv_out.bias": bias}
    first = state["decoder.conv_in.weight"]
    read = torch.einsum("oihw,ij->ojhw", first, from_latents[0])
    state["decoder.conv_in.weight"] = torch.cat([read, torch.zeros_like(read)], dim=1)
    state["decoder.conv_in.bias"] = (
        state["decoder.conv_in.bias"] + first.sum((2, 3)) @ from_latents[1]
    )
    vae.load_state_dict(state)
    return vae


def distance_from_normal(latents: torch.Tensor) -> torch.Tensor:
    """Return a small loss of latents (b, 16, h, w) whose means are not 0 or deviations not these.

    This takes the place of normalizing them afterwards, for which FLUX has one number alone.
    """
    deviation = latents.std((0, 2, 3)) - torch.tensor(DEVIATIONS)
    return 0.01 * (latents.mean((0, 2, 3)).square().mean() + deviation.square().mean())


def build_t5_tokenizer(words: CLIPTokenizer) -> T5Tokenizer:
    """Build a unigram tokenizer with a token for every word of the CLIP tokenizer."""
    ends = sorted(t[:-4] for t in words.get_vocab() if t.endswith("</w>") and len(t) > 5)
    letters = [chr(code) for code in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    vocab += [(letter, -8.0) for letter in letters]
    vocab += [("▁" + word, -4.0) for word in (*"abcdefghijklmnopqrstuvwxyz", *ends)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Build the T5 encoder: two layers of width 128, trained together with the transformer."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=32,
        num_heads=4,
        d_ff=2 * T5_WIDTH,
        num_layers=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def build_transformer(double_blocks: int = 2, single_blocks: int = 4) -> FluxTransformer2DModel:
    """Build the transformer: 64 tokens of 2x2 latents, width 192.

    As in adaLN-Zero (arXiv 2212.09748), every block starts as the identity.
    """
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=double_blocks,
        num_single_layers=single_blocks,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=base_models.TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(4, 14, 14),
    )
    modulations = [transformer.norm_out.linear]
    for block in transformer.transformer_blocks:
        modulations += [block.norm1.linear, block.norm1_context.linear]
    modulations += [block.norm.linear for block in transformer.single_transformer_blocks]
    for linear in (*modulations, transformer.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


class Denoiser(nn.Module):
    """Transformer and both text encoders as one trained module."""

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        text_encoder: CLIPTextModel,
        text_encoder_2: T5EncoderModel,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2

    def forward(
        self,
        tokens: torch.Tensor,
        sigmas: torch.Tensor,
        ids: torch.Tensor,
        t5_ids: torch.Tensor,
        before: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the velocity of packed latents (b, 64, 64), noisy by `sigmas` (b,) in 0..1.

        `before` are the packed latents of an image to edit, in the shape of FLUX.1 Kontext.
        """
        prompt_embeds = self.text_encoder_2(t5_ids).last_hidden_state
        side, count = base_models.LATENT_SIZE // 2, tokens.shape[1]
        image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
        if before is not None:
            tokens = torch.cat([tokens, before], dim=1)
            image_ids = image_ids.repeat(2, 1)
            image_ids[count:, 0] = 1  # as in FluxKontextPipeline
        velocity = self.transformer(
            hidden_states=tokens,
            timestep=sigmas,
            pooled_projections=self.text_encoder(ids).pooler_output,
            encoder_hidden_states=prompt_embeds,
            txt_ids=torch.zeros(t5_ids.shape[1], 3),
            img_ids=image_ids,
        ).sample
        return velocity[:, :count]


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Return latents (b, 16, 16, 16) as the transformer's tokens (b, 64, 64)."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def build_pipeline(
    vae: AutoencoderKL, denoiser: Denoiser, tokenizer: CLIPTokenizer, tokenizer_2: T5Tokenizer
) -> FluxPipeline:
    return FluxPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        text_encoder_2=denoiser.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=denoiser.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
