"""Maps between diffusers' tensors and those of original files, against independent answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils
from torch import Tensor

from gralora_diffusion import get_family
from gralora_diffusion.key_maps import KeyMap, KeyMapError, OriginalTensor, join, rename, swap
from tests.originals import ORIGINALS
from tests.tiny import PIPELINES
from tests.tiny.parts import text_encoder_with_projection


def assembled(tensor: OriginalTensor, source: dict[str, Tensor]) -> Tensor:
    """The tensor of the original, made of those of diffusers."""
    parts = [(source[p.key].T if p.transposed else source[p.key], p) for p in tensor.parts]
    return torch.cat([whole[p.start : p.stop] for whole, p in parts]).reshape(tensor.shape)


def tiny(family: str) -> Any:
    """A tiny pipeline; the projection of CLIP-L is the identity where files do without it."""
    pipe = PIPELINES[family]()
    if family == "stable-diffusion-3":
        pipe.text_encoder = text_encoder_with_projection(32, 32)
        pipe.text_encoder.text_projection.weight.data.copy_(torch.eye(32))
    return pipe


def laid_out(family: str, component: str, model: Any) -> dict[str, OriginalTensor]:
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    key_map = get_family(family).find_key_map(component, shapes)
    return {key_map.prefixes[0] + tensor.key: tensor for tensor in key_map.lay_out(shapes)}


@pytest.mark.parametrize("name", PIPELINES)
def test_tiny_pipelines_are_laid_out_as_in_the_files(name):
    pipe = tiny(name)
    family, expected, made = get_family(name), ORIGINALS[name](pipe), {}
    for component in family.original_key_maps:
        model = getattr(pipe, component)
        tensors = laid_out(name, component, model)
        made |= {key: assembled(t, model.state_dict()) for key, t in tensors.items()}
    if name.startswith("flux2"):  # written there under the other prefix
        made = {f"model.diffusion_model.{key}": tensor for key, tensor in made.items()}
    extra = {key for key in expected if key not in made}
    assert all(key.endswith((".position_ids", "logit_scale", "betas", "decay")) for key in extra)
    # files for Stable Diffusion 3 do without CLIP-L's projection where it is the identity
    more = set(made) - set(expected)
    copies = ("clip_l.transformer.text_projection.weight", "encoder.embed_tokens.weight")
    assert all(key.endswith(copies) for key in more)
    for key in more:
        if key.endswith(copies[1]):  # which diffusers' reader wants and ComfyUI passes over
            shared = key.replace("encoder.embed_tokens", "shared")
            assert torch.equal(made[key], expected[shared])
    for key in set(made) & set(expected):
        assert torch.equal(made[key], expected[key]), key


@pytest.mark.parametrize("name", PIPELINES)
def test_files_are_read_as_the_pipeline_has_them(name):
    pipe = tiny(name)
    family, original = get_family(name), ORIGINALS[name](pipe)
    for component, key_maps in family.original_key_maps.items():
        key_map = next(one for one in key_maps if one.begins(original) is not None)
        prefix = key_map.begins(original)
        held = {k.removeprefix(prefix): t for k, t in original.items() if k.startswith(prefix)}
        read: dict[str, dict[int, Tensor]] = {}
        for tensor in key_map.read({key: tuple(t.shape) for key, t in held.items()}):
            value, first = held[tensor.key], 0
            for part in tensor.parts:
                rows = part.stop - part.start
                piece = value[first : first + rows]
                first += rows
                read.setdefault(part.key, {})[part.start] = piece.T if part.transposed else piece
            assert first == (value.shape[0] if value.dim() else 0)
        state = {key_map.canonical(k): t for k, t in getattr(pipe, component).state_dict().items()}
        missing = set(state) - set(read)
        assert missing <= {"encoder.embed_tokens.weight", "text_projection.weight"}
        assert all("position_ids" in key for key in set(read) - set(state))
        for key in set(read) & set(state):
            whole = torch.cat([rows for _, rows in sorted(read[key].items())])
            assert torch.equal(whole.reshape(state[key].shape), state[key]), key


def rows_of(tensors: dict[str, OriginalTensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Original tensors of one column whose values identify key and row of diffusers' tensor."""
    names = sorted({part.key for t in tensors.values() for part in t.parts})
    values = {}
    for key, tensor in tensors.items():
        pieces = [
            names.index(part.key) * 1e6 + torch.arange(part.start, part.stop, dtype=torch.float64)
            for part in tensor.parts
        ]
        column = torch.cat(pieces)
        values[key] = column.reshape(-1, *[1] * (len(tensor.shape) - 1)) if tensor.shape else column
    return values, names


CONVERTERS = {
    SD3Transformer2DModel: single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    FluxTransformer2DModel: single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    Flux2Transformer2DModel: single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
    UNet2DConditionModel: single_file_utils.convert_ldm_unet_checkpoint,
    AutoencoderKL: single_file_utils.convert_ldm_vae_checkpoint,
}
FULL_SIZE = {
    "sd15": ("stable-diffusion", "unet", UNet2DConditionModel, {"cross_attention_dim": 768}),
    "sd21": (
        *("stable-diffusion", "unet", UNet2DConditionModel),
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
    ),
    "sdxl": (
        *("stable-diffusion-xl", "unet", UNet2DConditionModel),
        {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
    ),
    "sd3": ("stable-diffusion-3", "transformer", SD3Transformer2DModel, {}),
    "sd35-medium": (
        *("stable-diffusion-3", "transformer", SD3Transformer2DModel),
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "qk_norm": "rms_norm",
            "dual_attention_layers": list(range(13)),
            "pos_embed_max_size": 384,
        },
    ),
    "flux-dev": ("flux", "transformer", FluxTransformer2DModel, {"guidance_embeds": True}),
    "flux2-dev": ("flux2", "transformer", Flux2Transformer2DModel, {}),
    "vae": (
        *("flux", "vae", AutoencoderKL),
        {
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 2,
            "latent_channels": 16,
        },
    ),
}


@pytest.mark.parametrize("which", FULL_SIZE)
def test_full_size_models_return_through_diffusers_own_converters(which):
    """Every row of every tensor comes back to its place: order of joined layers, halves, names."""
    name, component, model_class, config = FULL_SIZE[which]
    with torch.device("meta"):
        model = model_class(**config)
    tensors = laid_out(name, component, model)
    values, names = rows_of(tensors)
    if component == "transformer":
        values = {key.removeprefix("model.diffusion_model."): t for key, t in values.items()}
    if which.startswith("sd3"):  # it looks up a width
        values["context_embedder.weight"] = values["context_embedder.weight"].expand(-1, 4096)
    back = CONVERTERS[model_class](values, config=dict(model.config))
    state = model.state_dict()
    assert set(back) == set(state)
    for key, value in back.items():
        rows = state[key].shape[0]
        expected = names.index(key) * 1e6 + torch.arange(rows, dtype=torch.float64)
        assert torch.equal(value.reshape(rows, -1)[:, 0], expected), key


def test_what_has_no_place_is_named():
    key_map = KeyMap(("",), (rename("a", "b"), join(["q", "k"], "qk"), swap("m", "n")))
    with pytest.raises(
        KeyMapError, match=r"does not contain c\.weight(.|\n)*qk\.weight needs 2 parts"
    ):
        key_map.lay_out({"a.weight": (2, 2), "c.weight": (2, 2), "q.weight": (2, 2)})


@pytest.mark.parametrize(("rows", "order"), [(4, [2, 3, 0, 1]), (6, [0, 1, 2, 3, 4, 5])])
def test_halves_are_swapped_only_where_there_are_two(rows, order):
    key_map = KeyMap(("",), (swap("m", "n"),))
    shapes = {"m.weight": (rows, 2), "m.bias": (rows,)}
    for tensor in key_map.lay_out(shapes):
        assert (
            assembled(
                tensor,
                {p.key: torch.arange(rows) for p in tensor.parts}
                | {
                    "m.weight": torch.arange(rows)[:, None].expand(rows, 2),
                    "m.bias": torch.arange(rows),
                },
            )
            .reshape(rows, -1)[:, 0]
            .tolist()
            == order
        )
