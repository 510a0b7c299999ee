"""Fused projections: an adapter has its effect, or the call is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, WanTransformer3DModel
from peft import GraloraConfig
from peft.tuners.lokr.layer import factorization
from safetensors.torch import save_file
from torch import Tensor, nn

from gralora_diffusion import GraloraLinear, TargetError, eject, inject
from gralora_diffusion.adapters.adapter_file import Adapter, ComponentAdapter
from gralora_diffusion.adapters.compatibility import adapter_tensors
from gralora_diffusion.adapters.layers import GraloraLayer
from gralora_diffusion.adapters.placement.fused_projections import replaced_projections
from tests.models import PIPELINES, config, dense_updates, unet
from tests.reference import relative_error

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


def adapter_of(made: GraloraConfig, model: nn.Module) -> Adapter:
    """An adapter of a transformer with random values."""
    copied = inject(copy.deepcopy(model), made)
    return Adapter({"transformer": ComponentAdapter(made, adapter_tensors(copied, "default"))})


def lokr_file(path: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Write a LoKr file of FLUX.2's original names, as ai-toolkit does; return its updates."""
    tensors, updates = {}, {}
    for name, (rows, columns) in shapes.items():
        (a, b), (c, d) = factorization(rows, -1), factorization(columns, -1)
        first, second = torch.randn(a, c), torch.randn(b, d)
        tensors |= {f"diffusion_model.{name}.lokr_w1": first}
        tensors |= {f"diffusion_model.{name}.lokr_w2": second}
        updates[name] = torch.kron(first, second)
    save_file(tensors, path)
    return updates


def test_beside_a_lokr_file_that_fuses_projections(tmp_path: Path) -> None:
    """diffusers fuses the projections for it; neither adapter may vanish, or stay in the base."""
    pipe: Any = PIPELINES["flux2-klein"]()
    model, before = pipe.transformer, copy.deepcopy(pipe.transformer.state_dict())
    block = model.transformer_blocks[0]
    updates = lokr_file(
        tmp_path / "lokr.safetensors",
        {"double_blocks.0.img_attn.qkv": (96, 32), "double_blocks.0.img_mlp.0": (192, 32)},
    )
    ours = adapter_of(config(["ff.linear_in"], init_weights=False), model)
    of_projections = adapter_of(config(["attn.to_q"], init_weights=False), model)
    pipe.load_gralora_weights(ours, adapter_name="ours")
    pipe.load_lora_weights(tmp_path, weight_name="lokr.safetensors", adapter_name="lokr")
    pipe.set_adapters(["ours", "lokr"])
    x = torch.randn(3, 32)
    dense = dense_updates(ours.components["transformer"])["transformer_blocks.0.ff.linear_in"]
    weight = before["transformer_blocks.0.ff.linear_in.weight"] + updates.popitem()[1] + dense
    joined = torch.cat([before[f"transformer_blocks.0.attn.to_{n}.weight"] for n in "qkv"])
    expected = x.double() @ (joined + updates.popitem()[1]).double().T
    assert relative_error(block.ff.linear_in(x), x.double() @ weight.T) < 1e-5
    assert relative_error(block.attn.to_qkv(x), expected) < 1e-5

    with pytest.raises(TargetError, match=r"to_qkv has an adapter.*which unfusing would drop"):
        pipe.load_gralora_weights(of_projections, adapter_name="projections")
    assert relative_error(block.attn.to_qkv(x), expected) < 1e-5
    pipe.delete_adapters("lokr")
    with pytest.raises(TargetError, match=r"Call `unfuse_qkv_projections\(\)` first"):
        pipe.load_gralora_weights(of_projections, adapter_name="projections")
    model.unfuse_qkv_projections()
    pipe.load_gralora_weights(of_projections, adapter_name="projections")
    with pytest.raises(ValueError, match="an adapter is already loaded on the unfused"):
        pipe.load_lora_weights(tmp_path, weight_name="lokr.safetensors", adapter_name="lokr")
    pipe.unload_lora_weights()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
