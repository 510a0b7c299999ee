"""Check PEFT's config of a LoRA: whether it is an ordinary LoRA, and whether its scaling is valid.

Some adapters have a LoRA's keys but are not LoRAs: their factors are added to a changed base, or
enter another formula. All fields of PEFT's ``LoraConfig`` up to version 0.21 are known here. An
unknown field is refused unless it is empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from reprlib import repr as shown  # bounded
from typing import Any

from gralora_diffusion.adapters.placement.layer_config import (
    is_finite_number,
    is_integer,
    pattern_problem,
    patterns_problem,
)

_SCALING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
#: Fields about training and saving, which do not change the meaning of the factors.
_OF_TRAINING = frozenset(
    (
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "target_modules", "exclude_modules", "lora_dropout"),
        *("layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size"),
        # other fields switch these on, and those are checked
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
        "velora_config",  # another backward pass
    )
)
#: Initializations that do not change the base, besides true and false.
_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica")
#: Initializations that subtract the factors' first product from the base.
_OUT_OF_THE_BASE = ("pissa", "olora", "corda", "lora_ga")
#: Fields that make it another adapter -> the difference.
OTHER_FORMULA = {
    "use_dora": "it is DoRA, which rescales the columns of the whole weight",
    "use_qalora": "it is QA-LoRA, which pools the inputs first",
    "use_bdlora": "it is BD-LoRA, whose factors are block-diagonal",
    "kasa_config": "it is KaSA, which truncates the base's weights and has a diagonal between the "
    "factors",
    "monteclora_config": "it is MonteCLoRA, which adds samples to the factors",
    "arrow_config": "it is Arrow, which chooses between several adapters",
    "alora_invocation_tokens": "it is aLoRA, which only acts on some tokens",
    "layer_replication": "its base is a model with some layers repeated",
    "megatron_config": "its factors may be shards of Megatron's parallel layers",
    "fan_in_fan_out": "its layers have transposed weights",
    "target_parameters": "it adapts parameters that are not the weight of a layer",
}
#: Fields for parameters that were trained besides the factors.
BESIDES = {
    "bias": "biases of the base",
    "lora_bias": "biases of the layers",
    "modules_to_save": "whole modules",
    "trainable_token_indices": "rows of an embedding",
}
_REMEDY = "Use it in PEFT, or fuse it into its base there and use the fused base"
#: The ones that are biases, which can be left out on request.
_BIASES = ("bias", "lora_bias")


def other_adapter(values: Mapping[str, Any], without_biases: bool) -> Iterator[str]:
    """Yield the settings of a config that make the adapter another kind than LoRA, or may."""
    kind = values.get("peft_type")
    if kind not in (None, "LORA"):
        yield f"it is a {kind} adapter, not a LoRA"
    yield from _of_initialisation(values.get("init_lora_weights"))
    for name, value in values.items():
        if name in OTHER_FORMULA and value:
            yield (f"{name} is {shown(value)}: {OTHER_FORMULA[name]}. {_REMEDY}")
        elif name in BESIDES and value not in (None, False, "none", [], {}):
            if not (without_biases and name in _BIASES):
                yield f"{name} is {shown(value)}: {BESIDES[name]} were trained as well"
        elif not (
            name in _SCALING
            or name in _OF_TRAINING
            or name in ("peft_type", "init_lora_weights", *OTHER_FORMULA, *BESIDES)
            or value in (None, False, [], {})
        ):
            yield (
                f"{name} is {shown(value)}, which is not known here: it may mean another formula. "
                "If it does not affect how the factors are used, remove it from the config"
            )


def _of_initialisation(kind: Any) -> Iterator[str]:
    name = kind.lower() if isinstance(kind, str) else kind
    if name is None or isinstance(name, bool) or name in _INITIALISATIONS:
        return
    if str(name).startswith(_OUT_OF_THE_BASE):
        yield (
            f"init_lora_weights is {shown(kind)}: the factors started as a part of the base's "
            "weights that was subtracted from the base, so they only fit that changed base. Where "
            "it was trained, save it as an ordinary LoRA with PEFT's "
            "`model.save_pretrained(folder, path_initial_model_for_weight_conversion=...)`"
        )
    elif name == "loftq":
        yield (
            f"init_lora_weights is {shown(kind)}: the factors compensate for the quantization of a "
            f"base, so they only fit that base. {_REMEDY}"
        )
    else:
        yield f"init_lora_weights is {shown(kind)}, which is not known here: it may change the base"


def invalid_scaling(values: Any) -> Iterator[str]:
    """Yield problems of the fields that determine alpha."""
    if not isinstance(values, Mapping):
        yield f"the config is not a mapping but {shown(values)}"
        return
    if not isinstance(values.get("use_rslora") or False, bool):
        yield f"use_rslora should be true or false but is {shown(values['use_rslora'])}"
    for name, pattern_name, known in (
        ("r", "rank_pattern", _is_rank),
        ("lora_alpha", "alpha_pattern", is_finite_number),
    ):
        what = "a positive integer" if name == "r" else "a finite number"
        if name in values and not known(values[name]):
            yield f"{name} should be {what} but is {shown(values[name])}"
        pattern = values.get(pattern_name) or {}
        if not isinstance(pattern, Mapping):
            yield f"{pattern_name} should be a mapping but is {shown(pattern)}"
            continue
        if problem := patterns_problem(pattern):
            yield f"{pattern_name} is {problem}"
            continue
        for key, value in pattern.items():
            if problem := pattern_problem(key):
                yield f"{pattern_name} {key!r:.200}: {problem}"
            if not known(value):
                yield f"{pattern_name} {key!r} should give {what} but is {shown(value)}"


def _is_rank(value: Any) -> bool:
    return is_integer(value) and value > 0
