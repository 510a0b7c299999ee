"""The untrained parts of the bundled tiny base, and its pipeline."""

from __future__ import annotations

import json
from typing import Any

import tiny_world
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LATENT_CHANNELS = 8
LATENT_SIZE = tiny_world.SIZE // 4
TEXT_WIDTH = 128
MAX_TOKENS = 32
# Words for prompts that no caption of the training world contains: an untrained token for each.
EXTRA_WORDS = (
    "zwx",
    "photo",
    "picture",
    "drawing",
    "of",
    "the",
    "and",
    "with",
    "black",
    "robot",
)


def build_vae() -> AutoencoderKL:
    """Build the VAE: 64x64x3 pixels to 16x16x8 latents, 0.66 million parameters."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=tiny_world.SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold the latents' mean and standard deviation, both (8,), into the two 1x1 convolutions.

    The pipeline scales latents by one number; folding gives every channel mean 0 and deviation 1.
    """
    to_latents, from_latents = vae.quant_conv, vae.post_quant_conv
    shift = torch.cat(
        [mean, 2 * std.log()]
    )  # the second half is the log variance, which is only shifted
    scale = torch.cat([std, torch.ones_like(std)])
    to_latents.weight.div_(scale[:, None, None, None])
    to_latents.bias.sub_(shift).div_(scale)
    from_latents.bias.add_(from_latents.weight[:, :, 0, 0] @ mean)
    from_latents.weight.mul_(std[None, :, None, None])


def build_tokenizer() -> CLIPTokenizer:
    """Build a byte-pair encoding with a token for every word of the world; others become bytes."""
    words = {word for text in (*tiny_world.OBJECTS, *tiny_world.COLOURS) for word in text.split()}
    words |= {word for phrase in tiny_world.BACKGROUNDS for word in phrase.split()}
    words |= {"a", "an", tiny_world.RARE_TOKEN, tiny_world.CLASS_NOUN, *EXTRA_WORDS}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [byte + "</w>" for byte in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=endings,  # numbered first; otherwise processes break ties differently
        show_progress=False,
    )
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trained.train_from_iterator(sorted(words), trainer)
    merges: Any = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    tokens = [*alphabet, *endings, *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the text encoder: two layers of width 128, trained together with the UNet."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """Build the UNet: 16x16x8 latents, cross-attention at 8x8 and 4x4, 5.6 million parameters."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads here
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Build a cosine schedule; for 16x16 latents, a linear one has many steps of pure noise."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # no effect with trailing spacing, but the pipeline warns about 0
    )


class Denoiser(nn.Module):
    """UNet and text encoder as one trained module."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """Predict (b, 8, 16, 16) from latents of that shape, timesteps (b,) and ids (b, 32)."""
        prompt_embeds = self.text_encoder(ids).last_hidden_state
        return self.unet(noisy_latents, timesteps, prompt_embeds).sample


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Return (b, 32) token ids, padded as in the pipeline."""
    return tokenizer(
        prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def build_pipeline(
    vae: AutoencoderKL, denoiser: Denoiser, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
