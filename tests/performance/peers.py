"""Adapters to compare with: PEFT's, LyCORIS' and ours, put on the same frozen module.

Copies share the frozen weights. The adapters are fp32 and all but LoKr's have as many parameters as
a LoRA of ``rank``; of a hybrid, ``hybrid_rank`` of them are plain.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import GraloraConfig, LoraConfig, inject_adapter_in_model
from torch import nn

from gralora_diffusion import inject

LYCORIS_ABSENT = "LyCORIS is not installed (pip install lycoris-lora): its methods are left out"


@dataclass(frozen=True)
class Sizes:
    rank: int = 32
    k: int = 2
    hybrid_rank: int = 0

    def gralora(self, targets: list[str]) -> GraloraConfig:
        return GraloraConfig(
            r=self.rank - self.hybrid_rank,
            gralora_k=self.k,
            hybrid_r=self.hybrid_rank,
            alpha=self.rank,
            target_modules=targets,
            init_weights=False,
        )


def _lora(module: nn.Module, targets: list[str], sizes: Sizes) -> None:
    config = LoraConfig(
        r=sizes.rank, lora_alpha=sizes.rank, target_modules=targets, init_lora_weights=False
    )
    inject_adapter_in_model(config, module)


def _peft_gralora(module: nn.Module, targets: list[str], sizes: Sizes) -> None:
    inject_adapter_in_model(sizes.gralora(targets), module)


def _ours(module: nn.Module, targets: list[str], sizes: Sizes) -> None:
    inject(module, sizes.gralora(targets))


def _lycoris(name: str) -> Callable[[nn.Module, list[str], Sizes], None]:
    def put(module: nn.Module, targets: list[str], sizes: Sizes) -> None:
        import lycoris  # optional

        module_class = getattr(lycoris, name)
        adapters = nn.ModuleList()
        for path in targets:
            layer = module.get_submodule(path)
            adapter = module_class(
                path.replace(".", "_"), layer, 1.0, lora_dim=sizes.rank, alpha=sizes.rank
            )
            adapter.apply_to()
            adapters.append(adapter.to(layer.weight.device))
        for parameter in adapters.parameters():
            nn.init.normal_(parameter, std=0.02)  # not zero
        module.adapters = adapters

    return put


METHODS: dict[str, Callable[[nn.Module, list[str], Sizes], None]] = {
    "peft-lora": _lora,
    "peft-gralora": _peft_gralora,
    "lycoris-locon": _lycoris("LoConModule"),
    "lycoris-lokr": _lycoris("LokrModule"),
    "ours": _ours,
}


def adapted_paths(module: nn.Module, endings: Sequence[str]) -> list[str]:
    """The linear layers whose path ends with one of ``endings``."""
    return [
        path
        for path, part in module.named_modules()
        if isinstance(part, nn.Linear) and any(f".{path}".endswith(f".{e}") for e in endings)
    ]


def shared_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module with its very weights."""
    weights: dict[int, Any] = {id(tensor): tensor for tensor in module.parameters()}
    return copy.deepcopy(module, weights)


def adapted(module: nn.Module, method: str, targets: list[str], sizes: Sizes) -> nn.Module:
    """Return a copy of a frozen module, with its very weights, adapted at the paths ``targets``.

    Raises:
        ImportError: the method's package is not installed.
    """
    changed = shared_copy(module)
    with torch.random.fork_rng():
        METHODS[method](changed, targets, sizes)
    for parameter in changed.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return changed
