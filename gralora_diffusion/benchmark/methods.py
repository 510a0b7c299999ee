"""The compared methods: GraLoRA, PEFT's LoRA, DoRA and LoHa, and full fine-tuning of the denoiser.

Every method is attached to the same layers, with scaling 1 and fp32 parameters. Its name is its
whole definition: ``lora-r32``, ``gralora-r32-k2``, ``gralora-r24-k2-h8``, ``dora-r32``,
``loha-r4``, ``full``, and with its own learning rate ``full-lr1e-5``. ``base`` is the base without
any training.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.file_names import WEIGHTS_NAME
from gralora_diffusion.io.tensor_files import write_safetensors
from gralora_diffusion.training.config.training_config import TrainingConfig

if TYPE_CHECKING:
    import peft
    from torch import Tensor

_NAME = re.compile(
    r"(?P<kind>lora|dora|loha)-r(?P<rank>\d+)"
    r"|(?P<gralora>gralora)-r(?P<r>\d+)-k(?P<k>\d+)(-h(?P<h>\d+))?"
    r"|(?P<full>full)"
)
_LEARNING_RATE = re.compile(r"(?P<name>.*?)-lr(?P<rate>\d+(\.\d+)?(e-?\d+)?)")

#: Allowed names, for messages.
FORMS = (
    "lora-r<rank>, dora-r<rank>, loha-r<rank>, gralora-r<rank>-k<k>, "
    "gralora-r<rank>-k<k>-h<hybrid rank> or full, followed by -lr<learning rate> if it has its own "
    "learning rate; or base"
)


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        rank: of LoRA and similar methods; of GraLoRA without its hybrid part; 0 for full
            fine-tuning.
        learning_rate: as written in the name; "" for that of the run.
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
            ConfigError: it is not a method's name.
        """
        method = _read(name)
        if method is None:
            raise ConfigError(
                [
                    f"--methods contains '{name}', which is not a method. {_nearest(name)}A method "
                    f"is {FORMS}"
                ]
            )
        if not method.is_sound:
            raise ConfigError(
                [
                    f"--methods contains '{name}'; rank and k must be at least 1, and k must "
                    "divide the rank"
                ]
            )
        if method.name != name:  # otherwise a trial would have two folders, or two trials one
            raise ConfigError([f"--methods contains '{name}'; write {method.name}"])
        return method

    @property
    def is_sound(self) -> bool:
        """Whether rank and k are at least 1 and k divides the rank, if the method has them."""
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
        """The maximum rank of an update; None if only the layer limits it.

        DoRA's update also scales the rows of the base's weight.
        """
        return {
            "gralora": self.k * self.rank + self.hybrid_rank,
            "loha": self.rank**2,
            "dora": None,
            "full": None,
            "base": 0,
        }.get(self.kind, self.rank)

    def configured(self, config: TrainingConfig) -> TrainingConfig:
        """Return a run's options with this method's rank, k and learning rate, and scaling 1."""
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

    def reported_options(self, config: TrainingConfig) -> dict[str, Any]:
        """Return the values of these options that the method has, and None for the others."""
        gralora = self.kind == "gralora"
        return {
            "rank": self.rank or None,
            "gralora_k": self.k if gralora else None,
            "hybrid_rank": self.hybrid_rank if gralora else None,
            "learning_rate": None if self.kind == "base" else config.learning_rate,
        }

    def attach(self, pipe: Any, family: ModelFamily, config: TrainingConfig) -> tuple[str, ...]:
        """Attach a new adapter to a bare pipeline, determined by the seed; return the components.

        Args:
            config: result of :meth:`configured`.

        Raises:
            ConfigError: it does not fit the base.
        """
        # names of methods are checked without these, which take seconds to import
        import peft
        import torch
        from diffusers.training_utils import cast_training_params

        from gralora_diffusion.adapters.placement.targets import find_targets
        from gralora_diffusion.training.data.seeds import seed_from
        from gralora_diffusion.training.optimization.adapters import (
            ADAPTER_NAME,
            adapter_configs,
            add_adapters,
            trained_components,
        )

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
        import peft

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
        """Write the adapter: GraLoRA's own file, or ``adapter.safetensors`` with PEFT's names.

        Nothing is written for full fine-tuning, whose file would be as large as the base.
        """
        from peft.utils import get_peft_model_state_dict

        from gralora_diffusion.adapters.adapter_file import save_adapter
        from gralora_diffusion.training.optimization.adapters import ADAPTER_NAME, extract

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
    """Read a name as a method with unchecked numbers; None if it is not a method's name."""
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
    """Suggest the most similar method's name with the numbers of this one; "" if there is none."""
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
    """Restore a bare pipeline's components afterwards, whatever is attached to them inside.

    For full fine-tuning, a copy of the weights is kept on the CPU.
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
    """Remove all adapters of any kind from a model; the base layers stay."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    from gralora_diffusion.adapters.injection import mark_adapted

    for parent in list(model.modules()):
        for attribute, module in list(parent.named_children()):
            if isinstance(module, BaseTunerLayer):
                setattr(parent, attribute, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    mark_adapted(model, False)
