"""What is refused of PEFT's configs, and that no field of the installed PEFT is unknown."""

from __future__ import annotations

import dataclasses

import pytest
from peft import LoraConfig

from gralora_diffusion.lora_files import peft_config
from gralora_diffusion.lora_files.peft_config import invalid_scaling, other_adapter

PLAIN = LoraConfig(r=4, lora_alpha=16, target_modules=["to_q"]).to_dict()


def test_a_plain_config_says_nothing_special():
    assert list(other_adapter(PLAIN, False)) == list(invalid_scaling(PLAIN)) == []


def test_every_field_of_pefts_config_is_known():
    known = {
        *(*peft_config._SCALING, *peft_config._OF_TRAINING, "peft_type", "init_lora_weights"),
        *(*peft_config.OTHER_FORMULA, *peft_config.BESIDES),
    }
    assert {field.name for field in dataclasses.fields(LoraConfig)} - known == {
        "ensure_weight_tying"  # refused where it is set, as what is not known
    }


@pytest.mark.parametrize("kind", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_as_it_was(kind):
    assert list(other_adapter(PLAIN | {"init_lora_weights": kind}, False)) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        *(
            ({"init_lora_weights": kind}, "path_initial_model_for_weight_conversion")
            for kind in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga")
        ),
        ({"init_lora_weights": "loftq"}, "quantization of a base"),
        ({"init_lora_weights": "newer"}, "'newer', which is not known here"),
        ({"init_lora_weights": ["pissa"]}, "not known here"),
        ({"use_dora": True}, "it is DoRA"),
        ({"use_qalora": True}, "it is QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "it is BD-LoRA"),
        ({"kasa_config": {"beta": 1}}, "it is KaSA"),
        ({"monteclora_config": {"num_samples": 8}}, "it is MonteCLoRA"),
        ({"arrow_config": {"top_k": 2}}, "it is Arrow"),
        ({"alora_invocation_tokens": [1, 2]}, "it is aLoRA"),
        ({"layer_replication": [[0, 2]]}, "some layers repeated"),
        ({"megatron_config": {"a": 1}}, "shards"),
        ({"fan_in_fan_out": True}, "transposed weights"),
        ({"target_parameters": ["experts"]}, "not the weight of a layer"),
        ({"bias": "all"}, "biases of the base were trained as well"),
        ({"lora_bias": True}, "biases of the layers were trained as well"),
        ({"modules_to_save": ["proj_out"]}, "whole modules were trained as well"),
        ({"trainable_token_indices": [1]}, "rows of an embedding were trained as well"),
        ({"ensure_weight_tying": True}, "not known here"),
        ({"of_a_later_version": "on"}, "of_a_later_version is 'on', which is not known here"),
        ({"peft_type": "ADALORA"}, "a ADALORA adapter, not a LoRA"),
    ],
)
def test_another_adapter(changes, text):
    (problem,) = other_adapter(PLAIN | changes, False)
    assert text in problem


def test_biases_may_be_told_of_where_they_are_left_out():
    config = PLAIN | {"bias": "all", "lora_bias": True, "modules_to_save": ["norm"]}
    (problem,) = other_adapter(config, True)
    assert "modules_to_save" in problem


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lora_alpha": None}, "lora_alpha should be a finite number but is None"),
        ({"lora_alpha": "16"}, "lora_alpha should be a finite number"),
        ({"lora_alpha": True}, "lora_alpha should be a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha should be a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha should be a finite number"),
        ({"r": 0}, "r should be a positive integer"),
        ({"r": 4.5}, "r should be a positive integer"),
        ({"use_rslora": "yes"}, "use_rslora should be true or false"),
        ({"alpha_pattern": [1]}, "alpha_pattern should be a mapping"),
        ({"rank_pattern": "to_q"}, "rank_pattern should be a mapping"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern '(': not a regular expression"),
        ({"alpha_pattern": {"to_q": None}}, "alpha_pattern 'to_q' should give a finite number"),
        ({"rank_pattern": {"to_q": 1.5}}, "rank_pattern 'to_q' should give a positive"),
    ],
)
def test_invalid_scaling(changes, text):
    (problem,) = invalid_scaling(PLAIN | changes)
    assert text in problem


@pytest.mark.parametrize("config", [None, [], "text", 3])
def test_no_mapping(config):
    (problem,) = invalid_scaling(config)
    assert "the config is not a mapping" in problem
