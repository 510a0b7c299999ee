"""Keys of other programs' files, as they write them."""

from __future__ import annotations

import pytest
import torch

from gralora_diffusion.lora_files.keys import Layer, group_layers

PAIRS = [  # down, up, name, style, text encoder, plain name
    (
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight",
        "kohya",
        None,
        "down_blocks_0_attentions_0_proj_in",
    ),
    (
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
        "kohya",
        "text_encoder_2",
        "text_model_encoder_layers_0_mlp_fc1",
    ),
    (
        "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight",
        "lora_transformer_transformer_blocks_0_attn_to_q.lora_up.weight",
        "OneTrainer",
        None,
        "transformer_blocks_0_attn_to_q",
    ),
    (
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight",
        "diffusers",
        None,
        "transformer_blocks_0_attn_to_q",
    ),
    (
        "unet.down_blocks.0.attentions.0.attn1.to_q.lora.down.weight",
        "unet.down_blocks.0.attentions.0.attn1.to_q.lora.up.weight",
        "diffusers",
        None,
        "down_blocks_0_attentions_0_attn1_to_q",
    ),
    (
        "unet.down_blocks.0.attn1.processor.to_q_lora.down.weight",
        "unet.down_blocks.0.attn1.processor.to_q_lora.up.weight",
        "diffusers",
        None,
        "down_blocks_0_attn1_to_q",
    ),
    (
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight",
        "diffusers",
        "text_encoder",
        "text_model_encoder_layers_0_mlp_fc1",
    ),
    (
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight",
        "ComfyUI",
        None,
        "double_blocks_0_img_attn_qkv",
    ),
    (
        "base_model.model.transformer_blocks.0.attn.to_q.lora_A.default.weight",
        "base_model.model.transformer_blocks.0.attn.to_q.lora_B.default.weight",
        "PEFT",
        None,
        "transformer_blocks_0_attn_to_q",
    ),
    (
        "double_blocks.0.processor.qkv_lora1.down.weight",
        "double_blocks.0.processor.qkv_lora1.up.weight",
        "bare",
        None,
        "double_blocks_0_qkv_lora1",
    ),
]


@pytest.mark.parametrize(("down", "up", "style", "encoder", "plain"), PAIRS)
def test_pairs(down, up, style, encoder, plain):
    layers, rest = group_layers([up, down])
    (layer,) = layers.values()
    assert layer.parts == {"up": up, "down": down}
    assert (layer.kind, layer.style, layer.text_encoder) == ("LoRA", style, encoder)
    assert layer.plain_name == plain
    assert rest == []


@pytest.mark.parametrize(
    ("endings", "kind"),
    [
        ((".lora_down.weight", ".lora_up.weight", ".alpha", ".lora_mid.weight"), "LoRA"),
        ((".lora_down.weight", ".lora_up.weight", ".dora_scale"), "DoRA"),
        ((".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"), "DoRA"),
        ((".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".alpha"), "LoHa"),
        ((".lokr_w1", ".lokr_w2_a", ".lokr_w2_b"), "LoKr"),
        ((".lokr_w1_a", ".lokr_w1_b", ".lokr_w2"), "LoKr"),
        ((".oft_blocks", ".alpha"), "OFT"),
        ((".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"), "GLoRA"),
        ((".diff", ".diff_b"), "difference"),
        ((".gralora_A", ".gralora_B"), "GraLoRA"),
    ],
)
def test_kinds(endings, kind):
    layers, rest = group_layers([f"layer{ending}" for ending in endings])
    assert [layer.kind for layer in layers.values()] == [kind]
    assert rest == []


def test_what_is_no_layer_is_left_over():
    keys = ["a.lora_down.weight", "b.alpha", "c.weight", "d.lora_up.weight", "d.lora_down.weight"]
    layers, rest = group_layers(keys)
    assert list(layers) == ["d"]
    assert sorted(rest) == keys[:3]


def test_a_second_key_for_one_part_is_left_over():
    keys = ["a.lora_down.weight", "a.lora_up.weight", "a.lora_A.weight"]
    layers, rest = group_layers(keys)
    assert layers["a"].parts == {"down": keys[0], "up": keys[1]}
    assert rest == keys[2:]


@pytest.mark.parametrize(
    ("name", "path", "is_flat"),
    [
        ("transformer.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q", False),
        ("base_model.model.proj_out", "proj_out", False),
        ("model.diffusion_model.img_in", "img_in", False),
        (
            "lora_transformer.transformer_blocks.0.attn.to_q",
            "transformer_blocks.0.attn.to_q",
            False,
        ),
        ("lora_transformer_proj_out", "proj_out", True),
        ("lycoris_proj_out", "proj_out", True),
        ("lora_te2_text_model_encoder", "text_model_encoder", True),
    ],
)
def test_paths(name, path, is_flat):
    layer = Layer(name)
    assert (layer.path, layer.is_flat) == (path, is_flat)


PAIR = {"down": torch.ones(4, 64), "up": torch.ones(32, 4)}
GRALORA = {"gralora_A": torch.ones(2, 32, 4), "gralora_B": torch.ones(2, 4, 16)}
GENERAL = {"gralora_A_general": torch.ones(3, 64), "gralora_B_general": torch.ones(32, 3)}


@pytest.mark.parametrize(
    "parts",
    [
        PAIR,
        PAIR | {"alpha": torch.tensor(3)},
        PAIR | {"alpha": torch.ones(1, dtype=torch.bfloat16)},
        {"down": torch.ones(0, 64), "up": torch.ones(32, 0)},
        {"down": torch.ones(4, 64, 3, 3), "up": torch.ones(32, 4, 1, 1)},
        {"down": torch.ones(4, 64, 1, 1), "up": torch.ones(32, 5), "mid": torch.ones(5, 4, 3, 3)},
        {name: tensor.to(torch.float8_e4m3fn) for name, tensor in PAIR.items()},
        GRALORA | GENERAL,
    ],
)
def test_tensors_that_make_a_layer(parts):
    assert Layer("x").problem(parts) is None


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        (PAIR | {"down": torch.ones(256)}, "down has 1 axes; expected 2 to 5"),
        (PAIR | {"alpha": torch.ones(0)}, "alpha has 0 values; expected one"),
        (PAIR | {"alpha": torch.ones(2)}, "alpha has 2 values; expected one"),
        (PAIR | {"alpha": torch.ones(1, 1)}, "alpha has 2 axes; expected 0 to 1"),
        (PAIR | {"up": torch.ones(32, 5)}, "of its up matrix differ: 4 and 5"),
        (PAIR | {"up": torch.ones(32, 4, 3, 3)}, "the kernel of its up matrix and 1 differ: 9"),
        (PAIR | {"mid": torch.ones(4, 5, 3, 3)}, "second axis of its middle differ: 4 and 5"),
        (PAIR | {"down": torch.ones(4, 0)}, "down is empty: its shape is (4, 0)"),
        (PAIR | {"up": torch.ones(0, 4)}, "up is empty"),
        (
            PAIR | {"down": torch.ones(4, 64, dtype=torch.int8)},
            "down has dtype int8; expected float64",
        ),
        (PAIR | {"up": torch.ones(32, 4, dtype=torch.complex64)}, "up has dtype complex64"),
        (PAIR | {"alpha": torch.ones((), dtype=torch.bool)}, "alpha has dtype bool"),
        (GRALORA | {"gralora_B": torch.ones(3, 4, 16)}, "blocks of its gralora_A and gralora_B"),
        (GRALORA | {"gralora_B": torch.ones(2, 6, 16)}, "rank of its gralora_A and gralora_B"),
        (GRALORA | {"gralora_A": torch.ones(32, 4)}, "gralora_A has 2 axes; expected 3 to 5"),
        (GRALORA | {"gralora_A": torch.ones(0, 32, 4)}, "gralora_A is empty"),
        (GRALORA | GENERAL | {"gralora_A_general": torch.ones(3, 63)}, "inputs of its general"),
        ({"lokr_w1_a": torch.ones(2, 3), "lokr_w1_b": torch.ones(4, 2)}, "rows of lokr_w1_b"),
    ],
)
def test_tensors_that_make_none(parts, problem):
    assert problem in Layer("x").problem(parts)
