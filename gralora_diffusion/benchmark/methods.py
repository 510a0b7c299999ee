"""What is compared: GraLoRA, PEFT's LoRA, DoRA and LoHa, and fine-tuning of the whole denoiser.

Every method goes on the same layers, with scaling 1 and fp32 parameters. A name says all of it:
``lora-r32``, ``gralora-r32-k2``, ``gralora-r24-k2-h8``, ``dora-r32``, ``loha-r4``, ``full``; with a
learning rate of its own ``full-lr1e-5``. ``base`` is the base as it is, with nothing trained.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers.training_utils import cast_training_params
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from gralora_diffusion.adapters.adapter_file import WEIGHTS_NAME, save_adapter
from gralora_diffusion.adapters.injection import mark_adapted
from gralora_diffusion.adapters.placement.targets import find_targets
from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.tensor_files import write_safetensors
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.seeds import seed_from
from gralora_diffusion.training.optimization.adapters import (
    ADAPTER_NAME,
    adapter_configs,
    add_adapters,
    extract,
    trained_components,
)

_NAME = re.compile(
    r"(?P<kind>lora|dora|loha)-r(?P<rank>\d+)"
    r"|(?P<gralora>gralora)-r(?P<r>\d+)-k(?P<k>\d+)(-h(?P<h>\d+))?"
    r"|(?P<full>full)"
)
_LEARNING_RATE = re.compile(r"(?P<name>.*?)-lr(?P<rate>\d+(\.\d+)?(e-?\d+)?)")

#: What a name may be.
FORMS = (
    "lora-r<rank>, dora-r<rank>, loha-r<rank>, gralora-r<rank>-k<k>, "
    "gralora-r<rank>-k<k>-h<hybrid rank> or full, with -lr<learning rate> behind it if it is to "
    "have one of its own; or base"
)


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        rank: of LoRA and the like; of GraLoRA without its hybrid part; 0 of full fine-tuning.
        learning_rate: as it is written in the name; "": that of the run.
    """

    kind: str
    rank: int = 0
    k: int = 1
    hybrid_rank: int = 0
    learning_rate: str = ""

    @classmethod
    def parse(cls, name: str) -> Method:
        """Read a name.

        Raises:
            ConfigError: it is none.
        """
        method = _read(name)
        if method is None:
            raise ConfigError([f"--methods has '{name}'. {_nearest(name)}A method is {FORMS}"])
        if not method.is_sound:
            raise ConfigError(
                [f"--methods has '{name}'; rank and k must be at least 1, and k divide the rank"]
            )
        if method.name != name:  # else a unit would have two folders, or two units one
            raise ConfigError([f"--methods has '{name}'; write {method.name}"])
        return method

    @property
    def is_sound(self) -> bool:
        """Whether k divides the rank, of methods that have one."""
        if self.kind in ("full", "base"):
            return True
        return self.rank >= 1 and self.k >= 1 and self.rank % self.k == 0

    @property
    def name(self) -> str:
        parts = [self.kind]
        if self.rank:
            parts.append(f"r{self.rank}")
        if self.kind == "gralora":
            parts += [f"k{self.k}"] + ([f"h{self.hybrid_rank}"] if self.hybrid_rank else [])
        return "-".join(parts) + (f"-lr{self.learning_rate}" if self.learning_rate else "")

    @property
    def update_rank(self) -> int | None:
        """The rank that an update can have; None if only the layer limits it.

        DoRA's also scales the rows of the base's weight.
        """
        return {
            "gralora": self.k * self.rank + self.hybrid_rank,
            "loha": self.rank**2,
            "dora": None,
            "full": None,
            "base": 0,
        }.get(self.kind, self.rank)

    def configured(self, config: TrainingConfig) -> TrainingConfig:
        """The options of a run with this method: rank, k, learning rate, and scaling 1."""
        rank, k = (self.rank, self.k) if self.kind == "gralora" else (max(1, self.rank), 1)
        rate = float(self.learning_rate) if self.learning_rate else config.learning_rate
        return replace(
            config,
            rank=rank,
            gralora_k=k,
            hybrid_rank=self.hybrid_rank,
            lora_alpha=None,
            learning_rate=rate,
        )

    def told(self, config: TrainingConfig) -> dict[str, Any]:
        """Those of these options that the method has, with their values; None for the others."""
        gralora = self.kind == "gralora"
        return {
            "rank": self.rank or None,
            "gralora_k": self.k if gralora else None,
            "hybrid_rank": self.hybrid_rank if gralora else None,
            "learning_rate": None if self.kind == "base" else config.learning_rate,
        }

    def attach(self, pipe: Any, family: ModelFamily, config: TrainingConfig) -> tuple[str, ...]:
        """Put it on a bare pipeline, new, the same for the same seed; return the components.

        Args:
            config: what :meth:`configured` gave.

        Raises:
            ConfigError: it does not fit the base.
        """
        if self.kind == "gralora":
            return add_adapters(pipe, family, config)
        components = trained_components(config, family)
        if self.kind == "full":
            for component in components:
                model = getattr(pipe, component)
                model.requires_grad_(True)
                cast_training_params(model, torch.float32)
            return components
        models = {component: getattr(pipe, component) for component in components}
        for component, theirs in adapter_configs(models, family, config).items():
            paths = find_targets(models[component], theirs)
            torch.manual_seed(seed_from(config.seed, "adapter", component))
            peft.inject_adapter_in_model(
                self._peft_config("|".join(map(re.escape, paths)), config.lora_dropout),
                models[component],
                ADAPTER_NAME,
            )
            cast_training_params(models[component], torch.float32)
        return components

    def _peft_config(self, targets: str, dropout: float) -> peft.PeftConfig:
        if self.kind == "loha":
            return peft.LoHaConfig(
                r=self.rank, alpha=self.rank, target_modules=targets, module_dropout=dropout
            )
        return peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.rank,
            target_modules=targets,
            lora_dropout=dropout,
            use_dora=self.kind == "dora",
        )

    def save(self, pipe: Any, family: ModelFamily, components: Sequence[str], folder: Path) -> None:
        """Write what was trained: GraLoRA's own file, or ``adapter.safetensors`` by PEFT's names.

        Nothing for full fine-tuning, whose file would be as large as the base.
        """
        if self.kind == "gralora":
            save_adapter(extract(pipe, family, components), folder / WEIGHTS_NAME)
        elif self.kind != "full":
            tensors = {
                f"{component}.{key}": tensor.detach().cpu().contiguous()
                for component in components
                for key, tensor in get_peft_model_state_dict(
                    getattr(pipe, component), adapter_name=ADAPTER_NAME
                ).items()
            }
            write_safetensors(tensors, folder / "adapter.safetensors", {"method": self.name})


def _read(name: str) -> Method | None:
    """A name as a method, whose numbers may be anything; None if it is none."""
    if name == "base":
        return Method("base")
    own = _LEARNING_RATE.fullmatch(name)
    found = _NAME.fullmatch(own["name"] if own else name)
    if found is None or (own and not float(own["rate"])):
        return None
    rate = own["rate"] if own else ""
    if found["full"]:
        return Method("full", learning_rate=rate)
    if found["kind"]:
        return Method(found["kind"], int(found["rank"]), learning_rate=rate)
    return Method("gralora", int(found["r"]), int(found["k"]), int(found["h"] or 0), rate)


def _nearest(name: str) -> str:
    """Say which method's name, with the numbers of this one, is most like it; "" if none is."""
    text, _, rate = name.lower().partition("-lr")
    numbers = {"r": "32", "k": "2", "h": "8"} | dict(re.findall(r"([rkh])(\d+)", text))
    if not re.search(r"r\d", text) and (first := re.search(r"\d+", text)):
        numbers["r"] = first[0]  # as in lora32
    forms = ("lora-r{r}", "dora-r{r}", "loha-r{r}", "gralora-r{r}-k{k}", "gralora-r{r}-k{k}-h{h}")
    names = [form.format(**numbers) for form in forms] + ["full"]
    names += ["base", *(f"{one}-lr{rate}" for one in names if rate)]
    methods = (method for one in names if (method := _read(one)) is not None)
    known = [method.name for method in methods if method.is_sound]
    found = difflib.get_close_matches(name.lower(), known, n=1)
    return f"Did you mean {found[0]}? " if found else ""


@contextmanager
def bare_afterwards(pipe: Any, components: Sequence[str], method: Method) -> Iterator[None]:
    """Bring a bare pipeline's components back to what they are now, whatever is put on inside.

    For full fine-tuning a copy of the weights is kept on the CPU meanwhile.
    """
    models = [getattr(pipe, component) for component in components]
    kept: list[list[Tensor]] = []
    if method.kind == "full":
        kept = [[p.detach().cpu().clone() for p in model.parameters()] for model in models]
    try:
        yield
    finally:
        for model in models:
            detach(model)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
                parameter.grad = None
        for model, weights in zip(models, kept, strict=False):
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                parameter.data = weight.to(parameter.device)


def detach(model: Any) -> None:
    """Take every adapter off a model, of whatever kind; the base layers stay."""
    for parent in list(model.modules()):
        for attribute, module in list(parent.named_children()):
            if isinstance(module, BaseTunerLayer):
                setattr(parent, attribute, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    mark_adapted(model, False)
