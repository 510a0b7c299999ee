"""Insert GraLoRA layers into a model and remove them: the tuner, and functions for any model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import GraloraConfig, GraloraModel, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gralora_diffusion.adapters.placement.fused_projections import guard_projections
from gralora_diffusion.adapters.placement.layer_config import PATTERNS, invalid_values
from gralora_diffusion.adapters.placement.targets import (
    TargetError,
    base_of,
    check_targets,
    is_target,
    refuse,
)

from .layers import GraloraConv2d, GraloraLayer, GraloraLinear

__all__ = ["GraloraTuner", "TargetError", "eject", "inject"]


@contextmanager
def _fields(config: PeftConfig, values: Mapping[str, Any]) -> Iterator[None]:
    """Inside, these fields of a config have other values."""
    before = {name: getattr(config, name) for name in values}
    vars(config).update(values)
    try:
        yield
    finally:
        vars(config).update(before)


class GraloraTuner(GraloraModel):
    """Drop-in for PEFT's ``GraloraModel`` that creates the layers of this package.

    The constructor is PEFT's: ``GraloraTuner(model, config, adapter_name, low_cpu_mem_usage=False,
    state_dict=None)``. The model is changed in place, and only if every target fits. Adapters that
    are merged stay merged.

    Raises:
        TargetError: a target has a width that k does not divide or is of an unsupported type, or a
            pattern matches nothing. The message lists all of them, and the model is unchanged.
    """

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        self._keys = None if state_dict is None else list(state_dict)
        self._device = torch.device("meta") if low_cpu_mem_usage else nullcontext()
        config: Any = self.peft_config[adapter_name]
        with unchanged_on_error([model], adapter_name), _merged_kept(model, adapter_name):
            refuse(model, invalid_values(config))
            # hidden from PEFT, which matches them with `re` in unbounded time, only to warn of
            # unused patterns; these are refused here
            self._patterns = {name: p for name in PATTERNS if (p := getattr(config, name, None))}
            with _fields(config, {name: {} for name in self._patterns}):
                super().inject_adapter(
                    model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
                )
            guard_projections(model, _computes_more)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        # PEFT calls this once the config is final and before it replaces a layer
        with _fields(peft_config, self._patterns):
            check_targets(model, peft_config, self._keys)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        return is_target(peft_config, key)

    def _create_and_replace(  # type: ignore[override]  # as GraloraModel, unlike its BaseTuner
        self,
        gralora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        with self._device, _fields(gralora_config, self._patterns):
            if isinstance(target, GraloraLayer):
                target.update_layer(adapter_name, current_key, gralora_config)
                return
            new_module = self._create_new_module(gralora_config, adapter_name, target, current_key)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's method also moves the layer. The layer is already on the device of its base layer,
        # and moving fails on the meta device
        setattr(parent, child_name, new_module)

    @staticmethod
    def _create_new_module(
        gralora_config: GraloraConfig,
        adapter_name: str,
        target: nn.Module,
        module_name: str,
        **kwargs: Any,
    ) -> GraloraLayer:
        base_layer = base_of(target)
        # the layer determines the weight's orientation, not the user; as in PEFT, the config is
        # corrected so that the saved one is true
        if isinstance(base_layer, Conv1D) != gralora_config.fan_in_fan_out:
            warnings.warn(
                f"fan_in_fan_out is set to {gralora_config.fan_in_fan_out} but the target module "
                f"is `{type(base_layer).__name__}`. Setting fan_in_fan_out to "
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
    methods of diffusers and transformers (``set_adapters``, ``disable_adapters``, ...) know the
    adapter.

    Args:
        model: any module, usually a UNet, transformer or text encoder.
        config: a ``GraloraConfig`` of PEFT or of this package; the model keeps a copy.
        adapter_name: a name that no adapter of this model has.
        low_cpu_mem_usage: leave the new factors on the meta device until values are loaded.
        state_dict: adapt the layers of these keys instead of ``config.target_modules``.

    Raises:
        TargetError: see :class:`GraloraTuner`.
        ValueError: the adapter name is taken or invalid.
    """
    check_adapter_name(model, adapter_name)
    with warnings.catch_warnings():
        # the caller asked for a second adapter
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        GraloraTuner(
            model,
            copy.deepcopy(config),
            adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=dict(state_dict) if state_dict is not None else None,
        )
    mark_adapted(model, True)
    return model


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name that is taken, or that PEFT could not recognize in the keys of a state dict.

    Raises:
        ValueError: the message says what is allowed.
    """
    where = type(model).__name__
    if adapter_name in (getattr(model, "peft_config", None) or {}):
        raise ValueError(
            f"{where} already has an adapter named {adapter_name!r}. Choose another "
            "`adapter_name`, or delete that one with `delete_adapters`."
        )
    problem = None
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        problem = "a name must be a string of at least one character, without a dot"
    elif hasattr(nn.ModuleDict(), adapter_name) or hasattr(nn.ParameterDict(), adapter_name):
        problem = "an attribute of torch's modules has that name"
    elif adapter_name in {part for name, _ in model.named_parameters() for part in name.split(".")}:
        problem = f"a layer or weight of {where} has that name"
    if problem:
        raise ValueError(f"{adapter_name!r} cannot be an `adapter_name`: {problem}.")


def eject(model: nn.Module, *adapter_names: str) -> None:
    """Remove GraLoRA adapters from ``model``, and the layers that are left without an adapter.

    The other adapters keep their state, and none becomes active instead. A fused update stays in
    the base weight, as it does after diffusers' ``unload_lora_weights``.
    """
    for parent in list(model.modules()):
        for attribute, module in list(parent.named_children()):
            if isinstance(module, GraloraLayer):
                for name in adapter_names:
                    module.forget(name)
                if not module.gralora_A:
                    setattr(parent, attribute, module.base_layer)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                for name in adapter_names:
                    left = [active for active in module.active_adapters if active != name]
                    module.delete_adapter(name, new_active_adapters=left)
                if not module._adapters:
                    setattr(parent, attribute, module.original_module)
    configs = getattr(model, "peft_config", None)
    if configs is not None:
        for name in adapter_names:
            configs.pop(name, None)
        if not configs:
            del model.peft_config
            mark_adapted(model, False)
    guard_projections(model, _computes_more)


def _computes_more(layer: nn.Module) -> bool:
    """Whether a layer has an adapter of this package that is not merged into its weight."""
    return isinstance(layer, GraloraLayer) and not set(layer.gralora_A) <= set(
        layer.merged_adapters
    )


@contextmanager
def unchanged_on_error(models: Iterable[nn.Module], adapter_name: str) -> Iterator[None]:
    """If the body raises while it adds ``adapter_name``, leave the models as they were."""
    models = list(models)
    modules = [module for model in models for module in model.modules()]
    tuned = [m for m in modules if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    states = [(module._active_adapter, module._disable_adapters) for module in tuned]
    parameters = [parameter for model in models for parameter in model.parameters()]
    trainable = [parameter.requires_grad for parameter in parameters]
    is_new = not any(adapter_name in m.r for m in modules if isinstance(m, GraloraLayer))
    try:
        yield
    except BaseException:
        for model in models if is_new else ():  # PEFT allows an adapter to be replaced
            eject(model, adapter_name)
        for module, state in zip(tuned, states, strict=True):
            module._active_adapter, module._disable_adapters = state
        for parameter, requires_grad in zip(parameters, trainable, strict=True):
            parameter.requires_grad = requires_grad
        raise


@contextmanager
def _merged_kept(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Hide merged adapters from PEFT, which would unmerge them to make the new one active.

    An earlier adapter with the same name stays visible: a layer must unmerge it before its factors
    are replaced, because its update could not be subtracted from the base weight afterwards.
    """
    merged = {m: m.merged_adapters for m in model.modules() if isinstance(m, GraloraLayer)}
    for layer, names in merged.items():
        layer.merged_adapters = [name for name in names if name == adapter_name]
    try:
        yield
    finally:
        for layer, names in merged.items():
            kept = layer.merged_adapters
            layer.merged_adapters = [n for n in names if n != adapter_name or n in kept]


def mark_adapted(model: Any, adapted: bool) -> None:
    """Tell the adapter methods of diffusers and transformers whether there are adapters."""
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = adapted


@contextmanager
def adapters_disabled(*models: nn.Module) -> Iterator[None]:
    """Inside, the models predict as if they had no adapter, and no gradients are recorded."""
    layers = [m for model in models for m in model.modules() if isinstance(m, BaseTunerLayer)]
    # PEFT's enable_adapters would also change requires_grad, which DDP does not allow midway
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        with torch.no_grad():
            yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was
