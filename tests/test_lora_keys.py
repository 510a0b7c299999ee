"""Keys of other programs' files, as they write them."""

from __future__ import annotations

import json
import math

import pytest

from gralora_diffusion.lora_keys import LoraScaling, group_layers, lora_scalings

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


def test_alpha_of_a_config():
    config = {"r": 8, "lora_alpha": 16, "alpha_pattern": {"to_q": 4}, "rank_pattern": {"to_q": 2}}
    values = {f"unet.{name}": value for name, value in config.items()}
    scalings = lora_scalings({"lora_adapter_metadata": json.dumps(values)})
    assert list(scalings) == ["unet"]
    assert scalings["unet"].alpha("attn1.to_q", 2) == 4
    assert scalings["unet"].alpha("attn1.to_k", 8) == 16
    assert lora_scalings({}) == {}


def test_alpha_without_one_is_the_rank_and_stabilized_by_its_root():
    assert LoraScaling({}).alpha("to_q", 8) == 8
    stabilized = LoraScaling({"lora_alpha": 16, "use_rslora": True})
    assert stabilized.alpha("to_q", 4) / 4 == 16 / math.sqrt(4)
