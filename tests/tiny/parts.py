"""What tiny pipelines are made of."""

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

CHARACTERS = [chr(code) for code in range(33, 127)]


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows single printable characters."""
    tokens = [*CHARACTERS, *(f"{c}</w>" for c in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def _clip_config(width: int, **changes: Any) -> CLIPTextConfig:
    tok = tokenizer()
    arguments = {
        "vocab_size": len(tok),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "max_position_embeddings": 16,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
    }
    return CLIPTextConfig(**{**arguments, **changes})


def text_encoder(width: int = 32) -> CLIPTextModel:
    return CLIPTextModel(_clip_config(width)).eval()


def text_encoder_with_projection(
    width: int = 32, projection: int = 32, layers: int = 3
) -> CLIPTextModelWithProjection:
    config = _clip_config(width, projection_dim=projection, num_hidden_layers=layers)
    return CLIPTextModelWithProjection(config).eval()


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer that knows single printable characters."""
    special = ["<pad>", "</s>", "<unk>", "▁"]
    return T5Tokenizer(vocab=[(token, -3.0) for token in (*special, *CHARACTERS)], extra_ids=0)


def t5_encoder(width: int = 32) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config).eval()


def unet(**changes: Any) -> UNet2DConditionModel:
    arguments: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**arguments, **changes}).eval()


def vae(**changes: Any) -> AutoencoderKL:
    arguments: dict[str, Any] = {
        "block_out_channels": [16, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": 4,
        "norm_num_groups": 8,
    }
    return AutoencoderKL(**{**arguments, **changes}).eval()


def flow_vae(**changes: Any) -> AutoencoderKL:
    """As the flow-matching families have it: latents shifted, no convolutions between."""
    return vae(
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
        **changes,
    )


def spread_out(model: torch.nn.Module) -> None:
    """Give every weight that is zero or one at first (modulation, norms, scales) a value of its
    own, so that nothing is multiplied away."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(0.05 * torch.randn(parameter.shape))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
