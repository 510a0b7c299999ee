"""Fused projections: an adapter has its effect, or the call is refused."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel, WanTransformer3DModel
from torch import nn

from gralora_diffusion import GraloraLinear, TargetError, eject, inject
from gralora_diffusion.adapters.layers import GraloraLayer
from gralora_diffusion.adapters.placement.fused_projections import replaced_projections
from tests.models import PIPELINES, config, unet

ATTENTION = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"]


def wan() -> nn.Module:
    """A transformer whose cross-attention also has projections of an image, but no query of it."""
    model: nn.Module = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
        image_dim=4,
        added_kv_proj_dim=24,
    )
    return model


@pytest.fixture(params=["unet", "flux", "stable-diffusion-3", "wan"])
def denoiser(request: pytest.FixtureRequest) -> nn.Module:
    own = {"unet": unet, "wan": wan}
    if request.param in own:
        return own[request.param]()
    return PIPELINES[request.param]().transformer


def projections(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in ATTENTION
    }


def test_only_replaced_layers_are_refused(denoiser: nn.Module) -> None:
    assert replaced_projections(denoiser) == set()
    before = projections(denoiser)
    targets = sorted({name.rsplit(".", 1)[-1] for name in before})
    denoiser.fuse_qkv_projections()
    # the queries of cross-attention, which is attn2 in these two, stay in use
    crosses = isinstance(denoiser, (UNet2DConditionModel, WanTransformer3DModel))
    kept = "attn2.to_q" if crosses else "none"
    replaced = {name for name in before if not name.endswith(kept)}
    assert replaced_projections(denoiser) == replaced
    with pytest.raises(TargetError, match=rf"{len(replaced)} of the layers.*unfuse_qkv_proj"):
        inject(denoiser, config(targets))
    assert not any(isinstance(module, GraloraLayer) for module in denoiser.modules())
    denoiser.unfuse_qkv_projections()
    assert replaced_projections(denoiser) == set()
    inject(denoiser, config(targets))


def test_adapted_projections_are_not_fused(denoiser: nn.Module) -> None:
    inject(denoiser, config(["to_k"]))
    for model in (denoiser, copy.deepcopy(denoiser)):
        with pytest.raises(ValueError, match=r"has a GraLoRA adapter on its projections"):
            model.fuse_qkv_projections()
    eject(denoiser, "default")
    denoiser.fuse_qkv_projections()
    assert replaced_projections(denoiser)


def test_merged_adapters_are_fused_with_the_weights() -> None:
    model = inject(unet(), config(["to_q", "to_k", "to_v"]))
    layers = [m for m in model.modules() if isinstance(m, GraloraLinear)]
    for layer in layers:
        layer.merge()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 6, 32, generator=generator)
    expected = model(latents, 5, text).sample
    model.fuse_qkv_projections()
    assert replaced_projections(model)
    torch.testing.assert_close(model(latents, 5, text).sample, expected)
