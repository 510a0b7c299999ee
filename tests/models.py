"""Tiny real models and pipelines, one builder per family, and how to draw with them."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from gralora_diffusion import GraloraConfig, inject

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1"]
TEXT_TARGETS = ["q_proj", "v_proj"]


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows single printable characters."""
    characters = [chr(code) for code in range(33, 127)]
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def text_encoder(width: int = 32) -> CLIPTextModel:
    tok = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tok),
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=16,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    return CLIPTextModel(config).eval()


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


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[16, 32],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=8,
    ).eval()


def stable_diffusion(seed: int = 0, **unet_changes: Any) -> StableDiffusionPipeline:
    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(unet_changes.get("cross_attention_dim", 32)),
        tokenizer=tokenizer(),
        unet=unet(**unet_changes),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


#: family name -> builder of a tiny pipeline
PIPELINES: dict[str, Callable[[], Any]] = {"stable-diffusion": stable_diffusion}


def draw(pipe: Any, **options: Any) -> Tensor:
    """The latents of two pictures, which depend on every weight but the VAE's."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = latents.to(pipe.unet.dtype)
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", **options}
    return pipe(["a cat", "a dog"], latents=latents, **arguments).images.float()


def config(targets: list[str] | str = UNET_TARGETS, **changes: Any) -> GraloraConfig:
    """A config whose update is not zero from the start."""
    values = {"r": 8, "gralora_k": 4, "alpha": 16, "init_weights": False, **changes}
    return GraloraConfig(target_modules=targets, **values)


def adapt(pipe: Any, name: str = "a", seed: int = 1, **changes: Any) -> Any:
    """Inject an adapter, hybrid and on convolutions too, into UNet and text encoder."""
    torch.manual_seed(seed)
    inject(pipe.unet, config(hybrid_r=2, **changes), name)
    inject(pipe.text_encoder, config(TEXT_TARGETS, **changes), name)
    return pipe


def structure(*models: nn.Module) -> list[Any]:
    """What a failed call must leave alone: modules, weights, what is trained, hooks, adapters."""
    described: list[Any] = []
    for model in models:
        for name, module in model.named_modules():
            hooks = [len(module._forward_hooks), len(module._forward_pre_hooks)]
            hooks.append("forward" in vars(module))
            active = getattr(module, "_active_adapter", None)
            described.append((name, id(module), type(module), module.training, hooks, active))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            sums = tensor.detach().double().sum().item(), tensor._version
            described.append((name, id(tensor), tensor.dtype, tensor.requires_grad, sums))
        described.append(sorted(getattr(model, "peft_config", {})))
        described.append(bool(getattr(model, "_hf_peft_config_loaded", False)))
    return described
