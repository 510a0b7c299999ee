"""Alpha of each layer, wherever it is stored."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gralora_diffusion.lora_files.keys import group_layers
from gralora_diffusion.lora_files.scaling import LoraScalings

PATH = "transformer_blocks.0.attn.to_q"
FLAT = PATH.replace(".", "_")
CONFIG = {"r": 4, "lora_alpha": 16}


def layers(*names: str) -> Any:
    return group_layers(f"{n}.lora_{part}.weight" for n in names for part in ("down", "up"))[0]


def header(**components: Any) -> dict[str, str]:
    """diffusers' metadata; ``bare`` is that of a lone model."""
    values = {
        field if name == "bare" else f"{name}.{field}": value
        for name, config in components.items()
        for field, value in config.items()
    }
    return {"lora_adapter_metadata": json.dumps(values)}


def alphas(names: list[str], metadata: Any, own: Any = None, rank: int = 4, **more: Any) -> Any:
    found = layers(*names)
    scalings = LoraScalings(found, metadata, **more)
    assert scalings.problems == []
    return [scalings.alpha(layer, rank, own) for layer in found.values()]


@pytest.mark.parametrize(
    "start",
    [
        *("", "diffusion_model.", "model.diffusion_model.", "base_model.model."),
        *("transformer.", "transformer.base_model.model.", "lora_transformer."),
    ],
)
@pytest.mark.parametrize("component", ["bare", "transformer"])
def test_however_the_names_begin(start, component):
    config = CONFIG | {"alpha_pattern": {"to_q": 24}}
    names = [start + PATH, start + PATH.replace("to_q", "to_k")]
    assert alphas(names, header(**{component: config})) == [24, 16]


@pytest.mark.parametrize(
    "name", [f"lora_transformer_{FLAT}", f"lora_unet_{FLAT}", f"lycoris_{FLAT}"]
)
def test_flat_names(name):
    assert alphas([name], header(transformer=CONFIG)) == [16]
    scalings = LoraScalings(layers(name), header(transformer=CONFIG | {"rank_pattern": {PATH: 8}}))
    with pytest.raises(ValueError, match="patterns are for paths with dots"):
        scalings.alpha(layers(name)[name], 4, None)


def test_components_have_configs_of_their_own():
    encoder = "text_model.encoder.layers.0.self_attn.q_proj"
    names = [
        *(f"transformer.{PATH}", f"text_encoder.{encoder}", f"text_encoder_2.{encoder}"),
        f"text_encoder_3.{encoder}",
    ]
    told = header(
        transformer=CONFIG,
        text_encoder={"r": 4, "lora_alpha": 8},
        text_encoder_2={"r": 4, "lora_alpha": 2, "use_rslora": True},
    )
    assert alphas(names, told) == [16, 8, 4, None]
    kohya = f"lora_te1_{encoder.replace('.', '_')}"
    assert alphas([kohya], header(text_encoder={"r": 4, "lora_alpha": 8})) == [8]
    assert alphas([f"text_encoder.{encoder}"], header(bare=CONFIG)) == [16]


def test_peft_configs_by_component():
    names = [f"transformer.{PATH}", "base_model.model.proj_out"]
    assert alphas(names, {}, configs={"transformer": CONFIG}) == [16, 16]
    assert alphas(["base_model.model.proj_out"], {}, configs={"": CONFIG}) == [16]
    # PEFT's own file wins over the header's fields
    told = {"ss_network_alpha": "1"} | header(bare={"r": 4, "lora_alpha": 1})
    assert alphas(["base_model.model.proj_out"], told, configs={"": CONFIG}) == [16]


def test_nothing_told_means_the_rank():
    assert alphas([PATH], {}) == [None]
    assert alphas([PATH], {}, own=3.0) == [3.0]
    assert alphas([PATH], {"lora_adapter_metadata": ""}) == [None]


def test_stabilized_by_the_root_of_the_rank():
    told = header(bare=CONFIG | {"use_rslora": True})
    assert alphas([PATH], told) == [32]  # 32 / 4 is 16 / 2


def test_a_tensor_and_the_config():
    told = header(transformer=CONFIG)
    assert alphas([f"transformer.{PATH}"], told, own=16.03) == [16.03]  # as bfloat16 rounds
    assert alphas([f"diffusion_model.{PATH}"], told, own=2.0) == [2.0]
    scalings = LoraScalings(layers(f"transformer.{PATH}"), told)
    with pytest.raises(ValueError, match="alpha is 2 in a tensor, but 16 in the config"):
        scalings.alpha(layers(f"transformer.{PATH}")[f"transformer.{PATH}"], 4, 2.0)


@pytest.mark.parametrize(
    ("names", "told", "text"),
    [
        ([PATH], header(bare=CONFIG | {"r": 8}), "config says rank 8, but the factors have rank 4"),
        ([PATH], header(bare=CONFIG | {"rank_pattern": {"to_q": 2}}), "config says rank 2"),
        ([PATH], header(bare={"r": 4}), "the config does not contain lora_alpha"),
        (
            [PATH],
            header(unet=CONFIG, transformer=CONFIG),
            "the config of unet, transformer applies to it",
        ),
        ([f"unet.{PATH}"], header(transformer=CONFIG), "the config of transformer applies to it"),
        ([f"text_encoder.{PATH}", PATH], header(bare=CONFIG), "which of several models"),
        (
            [f"text_encoders.t5xxl.transformer.{PATH}"],
            header(text_encoder=CONFIG),
            "it is not clear whether the config",
        ),
        (
            [f"lora_te3_{FLAT}"],
            header(text_encoder_2=CONFIG),
            "the config of text_encoder_2 applies to it",
        ),
    ],
)
def test_what_cannot_be_told(names, told, text):
    found = layers(*names)
    scalings = LoraScalings(found, told)
    with pytest.raises(ValueError, match=text):
        scalings.alpha(next(iter(found.values())), 4, None)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"lora_adapter_metadata": "{"}, "is not JSON"),
        ({"lora_adapter_metadata": "[" * 100_000}, "is not JSON"),
        ({"lora_adapter_metadata": "[1]"}, "is not a mapping"),
        ({"lora_alpha": "much"}, "lora_alpha in the header is not a number"),
        (header(transformer=CONFIG | {"lora_alpha": "much"}), "transformer: lora_alpha should be"),
    ],
)
def test_damaged(metadata, problem):
    found = layers(PATH)
    scalings = LoraScalings(found, metadata)
    assert problem in scalings.problems[0]
    with pytest.raises(ValueError, match=r"damaged|not valid"):
        scalings.alpha(found[PATH], 4, None)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        (header(bare=CONFIG | {"init_lora_weights": "pissa"}), "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora", "lora_alpha": "4"}, "header: init_lora_weights is 'olora'"),
        ({"use_dora": "True"}, "header: use_dora is True"),
        (header(bare=CONFIG | {"alpha_pattern": {"to_v": 2}}), "alpha_pattern names layers that"),
        (header(bare=CONFIG | {"rank_pattern": {"to_v": 2}}), "rank_pattern names layers that"),
    ],
)
def test_problems(metadata, problem):
    (found,) = LoraScalings(layers(PATH), metadata).problems
    assert problem in found


FIELDS = ["lora_alpha", "network_alpha", "alpha", "ss_network_alpha", "transformer.lora_alpha"]


@pytest.mark.parametrize("field", FIELDS)
def test_an_alpha_that_the_header_alone_tells_needs_a_choice(field):
    told = {field: "16.0", "ss_network_args": "{}"}
    with pytest.raises(ValueError, match=rf"{field} 16\), and no tensor does.*--header_alpha"):
        alphas([PATH], told)
    assert alphas([PATH], told, header_alpha="apply") == [16]
    assert alphas([PATH], told, header_alpha="ignore") == [None]
    assert alphas([PATH], told, own=2.0) == [2.0]
    assert alphas([PATH], {field: "4"}) == [None]  # the rank


@pytest.mark.parametrize("text", ["None", "Dynamic"])
def test_what_sd_scripts_writes_in_place_of_a_number(text):
    assert alphas([PATH], {"ss_network_alpha": text}) == [None]


@pytest.mark.parametrize(
    "more",
    [
        {"ss_network_args": '{"conv_alpha": "1"}'},
        {"use_rslora": "True"},
        {"text_encoder.lora_alpha": "8"},
    ],
)
def test_an_alpha_of_the_header_that_is_not_for_all_layers(more):
    with pytest.raises(ValueError, match="does not state the same alpha for all layers"):
        alphas([PATH], {"lora_alpha": "16"} | more, header_alpha="apply")
