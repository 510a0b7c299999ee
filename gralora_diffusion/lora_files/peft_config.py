"""What PEFT's config of a LoRA says of how its factors are to be read, and what is not a LoRA.

Some adapters have a LoRA's keys and are none: their factors are added to a base that was changed
first, or enter another formula. All fields of PEFT's ``LoraConfig`` are known here, up to its
version 0.21; a field that is not is refused where it says anything.
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
#: Fields that say how it was trained and saved, and nothing of how the factors are read.
_OF_TRAINING = frozenset(
    (
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "target_modules", "exclude_modules", "lora_dropout"),
        *("layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size"),
        # what these configure is looked at where it is switched on
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
        "velora_config",  # another backward pass
    )
)
#: Ways to begin that leave the base as it was, besides true and false.
_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica")
#: Ways to begin that take the factors' first product out of the base.
_OUT_OF_THE_BASE = ("pissa", "olora", "corda", "lora_ga")
#: Fields that make it another adapter -> how.
OTHER_FORMULA = {
    "use_dora": "it is DoRA, which scales the columns of the whole weight anew",
    "use_qalora": "it is QA-LoRA, which pools the inputs first",
    "use_bdlora": "it is BD-LoRA, whose factors are block-diagonal",
    "kasa_config": "it is KaSA, which cuts the base's weights and has a diagonal between the "
    "factors",
    "monteclora_config": "it is MonteCLoRA, which adds samples to the factors",
    "arrow_config": "it is Arrow, which chooses between several adapters",
    "alora_invocation_tokens": "it is aLoRA, which acts on some tokens only",
    "layer_replication": "its base is a model with some layers repeated",
    "megatron_config": "its factors may be shards of Megatron's parallel layers",
    "fan_in_fan_out": "its layers hold transposed weights",
    "target_parameters": "it adapts parameters that are no layer's weight",
}
#: Fields that say what was trained besides the factors.
BESIDES = {
    "bias": "biases of the base",
    "lora_bias": "biases of the layers",
    "modules_to_save": "whole modules",
    "trainable_token_indices": "rows of an embedding",
}
_REMEDY = "Use it in PEFT, or fuse it into its base there and take the fused base"
#: Those that are biases, which can be left out on request.
_BIASES = ("bias", "lora_bias")


def other_adapter(values: Mapping[str, Any], without_biases: bool) -> Iterator[str]:
    """What a config says that makes it another adapter than a LoRA, or may."""
    kind = values.get("peft_type")
    if kind not in (None, "LORA"):
        yield f"a {kind} adapter, not a LoRA"
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
                f"{name} is {shown(value)}, which is not known here: it may be another formula. If "
                "it says nothing of how the factors are read, take it out of the config"
            )


def _of_initialisation(kind: Any) -> Iterator[str]:
    name = kind.lower() if isinstance(kind, str) else kind
    if name is None or isinstance(name, bool) or name in _INITIALISATIONS:
        return
    if str(name).startswith(_OUT_OF_THE_BASE):
        yield (
            f"init_lora_weights is {shown(kind)}: the factors began as a part of the base's "
            "weights, which was taken out of the base, so they belong to that changed base. Save "
            "it as an ordinary LoRA where it was trained, with PEFT's "
            "`model.save_pretrained(folder, path_initial_model_for_weight_conversion=...)`"
        )
    elif name == "loftq":
        yield (
            f"init_lora_weights is {shown(kind)}: the factors make up for the quantization of a "
            f"base, and belong to that base. {_REMEDY}"
        )
    else:
        yield f"init_lora_weights is {shown(kind)}, which is not known here: it may change the base"


def invalid_scaling(values: Any) -> Iterator[str]:
    """What is wrong with that from which alpha follows."""
    if not isinstance(values, Mapping):
        yield f"the config is no mapping but {shown(values)}"
        return
    if not isinstance(values.get("use_rslora") or False, bool):
        yield f"use_rslora should be true or false but is {shown(values['use_rslora'])}"
    for name, pattern_name, known in (
        ("r", "rank_pattern", _is_rank),
        ("lora_alpha", "alpha_pattern", is_finite_number),
    ):
        what = "a positive whole number" if name == "r" else "a finite number"
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
