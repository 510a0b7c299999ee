"""Put GraLoRA layers into a model: the tuner, and one call for models of diffusers and transformers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from peft import GraloraConfig, GraloraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .layers import GraloraConv2d, GraloraLayer, GraloraLinear, unsuitable


class TargetError(ValueError):
    """The targets of a config do not fit the model. Lists every layer or pattern at fault."""


class GraloraTuner(GraloraModel):
    """Drop-in for PEFT's ``GraloraModel`` that makes the layers of this package.

    The constructor is PEFT's: ``GraloraTuner(model, config, adapter_name, low_cpu_mem_usage=False,
    state_dict=None)``. The model is changed in place and only when every target fits.

    Raises:
        TargetError: a target has a width that k does not divide or is of an unsupported type, or a
            pattern matches nothing. All of them are listed, and the model is left untouched.
    """

    _names_from_state_dict = False

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        self._names_from_state_dict = state_dict is not None
        super().inject_adapter(
            model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
        )

    def _prepare_model(self, peft_config: GraloraConfig, model: nn.Module) -> None:
        # PEFT calls this when the config is final and nothing is replaced yet: the moment to refuse
        _maybe_include_all_linear_layers(peft_config, model)
        if not self._names_from_state_dict:
            check_targets(model, peft_config)

    def _create_and_replace(
        self,
        gralora_config: GraloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(target, GraloraLayer):
            target.update_layer(adapter_name, current_key, gralora_config.r, gralora_config)
            return
        new_module = self._create_new_module(gralora_config, adapter_name, target, current_key)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    @staticmethod
    def _create_new_module(
        gralora_config: GraloraConfig,
        adapter_name: str,
        target: nn.Module,
        module_name: str,
        **kwargs: Any,
    ) -> GraloraLayer:
        base_layer = base_of(target)
        # the weight's orientation is the layer's, not the user's to choose; as in PEFT, the config is
        # corrected so that what is saved says what was done
        if isinstance(base_layer, Conv1D) != gralora_config.fan_in_fan_out:
            warnings.warn(
                f"fan_in_fan_out is set to {gralora_config.fan_in_fan_out} but the target module is "
                f"`{type(base_layer).__name__}`. Setting fan_in_fan_out to "
                f"{not gralora_config.fan_in_fan_out}.",
                stacklevel=2,
            )
            gralora_config.fan_in_fan_out = not gralora_config.fan_in_fan_out
        layer_class = GraloraConv2d if isinstance(base_layer, nn.Conv2d) else GraloraLinear
        return layer_class(target, adapter_name, module_name, gralora_config, **kwargs)


def inject(
    model: nn.Module,
    config: GraloraConfig,
    adapter_name: str = "default",
    *,
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Add a GraLoRA adapter to ``model`` in place and return the model.

    As ``peft.inject_adapter_in_model``, but with the layers of this package. Afterwards the adapter
    methods of diffusers and transformers (``set_adapters``, ``disable_adapters``, ...) know the adapter.

    Args:
        model: any module, usually a UNet, transformer or text encoder.
        config: a ``GraloraConfig``.
        adapter_name: name that is not taken in this model.
        low_cpu_mem_usage: leave the new factors on the meta device, to be assigned by loading.
        state_dict: take the layers from these keys rather than from ``config.target_modules``.

    Raises:
        TargetError: see :class:`GraloraTuner`.
        ValueError: the adapter name is taken.
    """
    if adapter_name in (getattr(model, "peft_config", None) or {}):
        raise ValueError(
            f"{type(model).__name__} already has an adapter named {adapter_name!r}. Choose another "
            "`adapter_name`, or delete that one with `delete_adapters`."
        )
    with warnings.catch_warnings():
        # a second adapter is what was asked for
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        GraloraTuner(
            model,
            config,
            adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=dict(state_dict) if state_dict is not None else None,
        )
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True
    return model


def eject(model: nn.Module, adapter_name: str) -> None:
    """Take a GraLoRA adapter out of ``model``, and the layers that are left without any adapter.

    The other adapters keep their state. A fused update stays in the base weight, as it does after
    diffusers' ``unload_lora_weights``.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, GraloraLayer):
            continue
        if adapter_name in module.gralora_A:
            active = [a for a in module.active_adapters if a != adapter_name]
            module.set_adapter(active, inference_mode=True)
            module.forget(adapter_name)
        if not module.gralora_A:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.base_layer)
    configs = getattr(model, "peft_config", None) or {}
    configs.pop(adapter_name, None)
    if not configs and hasattr(model, "peft_config"):
        del model.peft_config
        model._hf_peft_config_loaded = False


def base_of(module: nn.Module) -> nn.Module:
    """Return the layer underneath any tuner's layers."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def adaptable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, base layer) of every module that a target may name, skipping adapters' insides."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (name + ".",)
        yield name, base_of(module)


def find_targets(model: nn.Module, config: GraloraConfig) -> dict[str, nn.Module]:
    """Return path -> base layer of what ``config`` targets in ``model``, in the model's order."""
    return {
        name: layer
        for name, layer in adaptable_modules(model)
        if GraloraTuner._check_target_module_exists(config, name)
    }


def check_targets(model: nn.Module, config: GraloraConfig) -> dict[str, nn.Module]:
    """As :func:`find_targets`, and refuse what cannot be adapted.

    Raises:
        TargetError: with every layer and pattern at fault.
    """
    targets = find_targets(model, config)
    where = type(model).__name__
    if not targets:
        raise TargetError(f"{where}: {_nothing_matches(model, config)}")
    problems = {
        name: problem
        for name, layer in targets.items()
        if (problem := unsuitable(layer, config.r, config.hybrid_r, config.gralora_k))
    }
    if problems:
        lines = "\n".join(f"  {name}: {problem}" for name, problem in problems.items())
        raise TargetError(
            f"{where}: {len(problems)} of {len(targets)} target layers cannot take "
            f"GraLoRA with r={config.r}, gralora_k={config.gralora_k}:\n{lines}\n"
            f"Choose gralora_k={_common_k(targets, config)}, or targets without these layers."
        )
    if not isinstance(config.target_modules, str):
        # excluded or filtered layers count as matched: only a pattern that names nothing is a slip
        names = [name for name, _ in adaptable_modules(model)]
        unmatched = sorted(
            pattern
            for pattern in config.target_modules
            if not any(name == pattern or name.endswith(f".{pattern}") for name in names)
        )
        if unmatched:
            raise TargetError(
                f"{where}: these target_modules match no layer: {', '.join(unmatched)}. "
                f"The others match {len(targets)} layers. Layers of this model end in: "
                f"{_endings(model)}."
            )
    return targets


def _common_k(targets: Mapping[str, nn.Module], config: GraloraConfig) -> str:
    fitting = [
        str(k)
        for k in range(1, config.r + 1)
        if not any(
            unsuitable(t, config.r, config.hybrid_r, k) or config.r % k for t in targets.values()
        )
    ]
    return " or ".join(fitting) or "a value that divides every width"


def _nothing_matches(model: nn.Module, config: GraloraConfig) -> str:
    wanted = config.target_modules
    wanted = repr(wanted) if isinstance(wanted, str) else ", ".join(sorted(wanted))
    limits = "".join(
        f" with {name}={value}"
        for name in ("layers_to_transform", "layers_pattern", "modules_to_save", "exclude_modules")
        if (value := getattr(config, name, None))
    )
    return (
        f"target_modules {wanted}{limits} not found in the model: no layer matches. "
        f"Layers of this model end in: {_endings(model)}. A string is matched as a regular "
        "expression against the whole path; a list as endings of it."
    )


def _endings(model: nn.Module) -> str:
    """The distinct last parts of the paths of adaptable layers, such as ``to_q`` or ``to_out.0``."""
    endings: dict[str, int] = {}
    for name, layer in adaptable_modules(model):
        if unsuitable(layer, 1, 0, 1) is None:
            parts = name.split(".")
            numbered = len(parts) > 1 and parts[-1].isdigit()
            ending = ".".join(parts[-2:]) if numbered else parts[-1]
            endings[ending] = endings.get(ending, 0) + 1
    return ", ".join(f"{ending} ({count})" for ending, count in endings.items()) or "(none)"
