"""Find attention whose projections diffusers has fused: an adapter on them would have no effect.

``fuse_qkv_projections`` joins the weights of ``to_q``, ``to_k`` and ``to_v`` (or of some of them)
in one new layer, which replaces them in the forward pass. The old layers stay in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

#: The joined layer -> the layers that it replaces (diffusers, ``fuse_projections`` of
#: ``models/attention.py``, ``models/attention_processor.py`` and of transformers such as Wan's).
_REPLACED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
_PROJECTIONS = frozenset(name for layers in _REPLACED.values() for name in layers)


def replaced_projections(model: nn.Module) -> set[str]:
    """Return the paths of the layers in ``model`` that a fused projection has replaced."""
    return {
        f"{name}.{layer}".lstrip(".")
        for name, module in model.named_modules()
        if _is_fused(module)
        for joined, layers in _REPLACED.items()
        if getattr(module, joined, None) is not None
        for layer in layers
    }


def adapted_joints(model: nn.Module) -> list[str]:
    """Return the paths of fused projections in use that have an adapter of their own.

    diffusers fuses the projections of FLUX.2 for LoKr files that were made for joined ones, and
    puts the adapter there. Unfusing the projections deletes it without a word.
    """
    return sorted(
        f"{name}.{joined}".lstrip(".")
        for name, module in model.named_modules()
        if _is_fused(module)
        for joined in _REPLACED
        if isinstance(layer := getattr(module, joined, None), BaseTunerLayer)
        and layer._get_available_adapters()
    )


def _is_fused(module: nn.Module) -> bool:
    if not getattr(module, "fused_projections", False):
        return False
    # After unfusing, the older Attention keeps the flag and the joined layers and only gets its own
    # processor back. The newer classes delete both.
    processor = type(getattr(module, "processor", None)).__name__
    return hasattr(module, "unfuse_projections") or processor.startswith("Fused")


def guard_projections(model: nn.Module, is_adapted: Callable[[nn.Module], bool]) -> None:
    """Have attention in ``model`` refuse to fuse projections while one of them is adapted.

    ``fuse_projections`` would copy the bare weights and silently drop the adapter. Call this again
    whenever adapters were added or removed: a module without adapted projections gets its own
    method back.

    Args:
        model: any module.
        is_adapted: whether a layer computes something that is not in its weight. It is called again
            when projections are fused, so a merged adapter does not prevent fusing.
    """
    for name, module in model.named_modules():
        if not hasattr(type(module), "fuse_projections"):
            continue
        if any(is_adapted(layer) for layer in _projections(module)):
            module.fuse_projections = partial(_fuse_projections, module, name, is_adapted)
        else:
            vars(module).pop("fuse_projections", None)


def _projections(module: nn.Module) -> Iterator[nn.Module]:
    return (layer for name, layer in module.named_children() if name in _PROJECTIONS)


def _fuse_projections(
    module: Any, name: str, is_adapted: Callable[[nn.Module], bool], *args: Any, **kwargs: Any
) -> None:
    if any(is_adapted(layer) for layer in _projections(module)):
        raise ValueError(
            f"{name or type(module).__name__} has a GraLoRA adapter on its projections, and fusing "
            "them would drop it. Either merge the adapter first with `fuse_gralora()`, or remove "
            "it with `unload_gralora_weights()`."
        )
    type(module).fuse_projections(module, *args, **kwargs)
