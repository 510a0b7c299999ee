"""The compared methods: GraLoRA, its rivals in PEFT, and full fine-tuning of the denoiser.

Every method is attached to the same layers, with fp32 parameters. Its name is its whole definition:
``lora-r32``, ``gralora-r32-k2``, ``gralora-r24-k2-h8``, ``oft-b64``, ``full``, and with its own
learning rate ``full-lr1e-5``. ``base`` is the base without any training. ``rivals`` cites them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.file_names import WEIGHTS_NAME
from gralora_diffusion.io.tensor_files import write_safetensors
from gralora_diffusion.training.config.training_config import TrainingConfig

if TYPE_CHECKING:
    from torch import Tensor


class Kind(NamedTuple):
    """A kind of method.

    Attributes:
        title: what readers know it as.
        letters: of its numbers, in the order of a name.
    """

    title: str
    letters: str = ""


#: Everything that can be compared; names, messages and help texts follow from it.
KINDS = {
    "lora": Kind("LoRA", "r"),
    "dora": Kind("DoRA", "r"),
    "loha": Kind("LoHa", "r"),
    "rslora": Kind("rsLoRA", "r"),
    "pissa": Kind("PiSSA", "r"),
    "scaledlora": Kind("LoRA with scaled input channels", "r"),
    "loraplus": Kind("LoRA+", "rx"),
    "lokr": Kind("LoKr", "rf"),
    "oft": Kind("OFT", "b"),
    "boft": Kind("BOFT", "bm"),
    "gralora": Kind("GraLoRA", "rkh"),
    "full": Kind("full fine-tuning"),
    "base": Kind("the base"),
}
#: Letters of numbers -> fields of a method.
_FIELDS = {
    "r": "rank",
    "k": "k",
    "h": "hybrid_rank",
    "x": "ratio",
    "f": "factor",
    "b": "block_size",
    "m": "butterflies",
}
#: Numbers of suggested names.
_USUAL = {"r": 32, "k": 2, "h": 8, "x": 16, "f": 4, "b": 64, "m": 1}
_OPTIONAL = "h"
# numbers are bounded: int and float refuse or overflow with more digits than any of these has
_DIGITS = r"\d{1,6}"
_LEARNING_RATE = re.compile(rf"(?P<name>.*?)-lr(?P<rate>{_DIGITS}(\.\d{{1,20}})?(e-?\d{{1,2}})?)")

#: Letters of numbers -> what stands for them in a form.
_WORDS = {letter: field.replace("_", " ") for letter, field in _FIELDS.items()}


def _forms(kind: str) -> list[str]:
    """Return the forms of a kind's names: without what is optional, and with it."""
    letters = KINDS[kind].letters
    kept = dict.fromkeys(("".join(f for f in letters if f not in _OPTIONAL), letters))
    return ["-".join([kind, *(f"{f}<{_WORDS[f]}>" for f in some)]) for some in kept]


_TRAINED = [kind for kind in KINDS if kind not in ("full", "base")]
#: Allowed names, for messages.
FORMS = (
    f"{', '.join(form for kind in _TRAINED for form in _forms(kind))} or full, followed by "
    "-lr<learning rate> if it has its own learning rate; or base"
)
#: The same with the methods' titles, for help texts.
TITLED_FORMS = ", ".join(
    f"{' or '.join(_forms(kind))} ({KINDS[kind].title})" for kind in (*_TRAINED, "full")
)


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        rank: of LoRA and similar methods; of GraLoRA without its hybrid part; 0 if it has none.
        learning_rate: as written in the name; "" for that of the run.
        ratio: LoRA+'s, of the second factor's rate to the first one's.
        factor: LoKr's, of the widths that its first matrix has.
        block_size: OFT's and BOFT's, of the rotated blocks.
        butterflies: BOFT's number of butterfly factors.
    """

    kind: str
    rank: int = 0
    k: int = 1
    hybrid_rank: int = 0
    learning_rate: str = ""
    ratio: int = 1
    factor: int = 1
    block_size: int = 0
    butterflies: int = 1

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
        if method.problem:
            raise ConfigError([f"--methods contains '{name}'; {method.problem}"])
        if method.name != name:  # otherwise a trial would have two folders, or trials one
            raise ConfigError([f"--methods contains '{name}'; write {method.name}"])
        return method

    @property
    def problem(self) -> str:
        """What is wrong with the numbers of the name; empty if nothing is."""
        letters = KINDS[self.kind].letters
        values = {letter: getattr(self, _FIELDS[letter]) for letter in letters}
        if "k" in letters and (min(values["r"], values["k"]) < 1 or self.rank % self.k):
            return "rank and k must be at least 1, and k must divide the rank"
        if low := [f for f, value in values.items() if f not in _OPTIONAL and value < 1]:
            return f"{_FIELDS[low[0]].replace('_', ' ')} must be at least 1"
        if "b" in letters and self.block_size < 2:
            return "a block of size 1 cannot be rotated"
        if self.kind == "boft" and self.block_size % 2:
            return "the block size must be even"
        return ""

    @property
    def name(self) -> str:
        numbers = {letter: getattr(self, _FIELDS[letter]) for letter in KINDS[self.kind].letters}
        parts = [f"{f}{value}" for f, value in numbers.items() if value or f not in _OPTIONAL]
        rate = [f"lr{self.learning_rate}"] if self.learning_rate else []
        return "-".join([self.kind, *parts, *rate])

    @property
    def update_rank(self) -> int | None:
        """The maximum rank of an update; None if only the layer limits it.

        DoRA's update also scales the rows of the base's weight. PiSSA's has the rank of what it
        learned and of what it began with. OFT and BOFT rotate the whole weight.
        """
        return {
            "gralora": self.k * self.rank + self.hybrid_rank,
            "loha": self.rank**2,
            "lokr": self.factor * self.rank,
            "pissa": 2 * self.rank,
            "dora": None,
            "oft": None,
            "boft": None,
            "full": None,
            "base": 0,
        }.get(self.kind, self.rank)

    def configured(self, config: TrainingConfig) -> TrainingConfig:
        """Return a run's options with this method's rank, k and learning rate, and scaling 1."""
        rank, k = (self.rank, self.k) if self.kind == "gralora" else (max(1, self.rank), 1)
        rate = float(self.learning_rate) if self.learning_rate else config.learning_rate
        ratio = float(self.ratio) if self.kind == "loraplus" else config.loraplus_lr_ratio
        return replace(
            config,
            rank=rank,
            gralora_k=k,
            hybrid_rank=self.hybrid_rank,
            lora_alpha=None,
            learning_rate=rate,
            loraplus_lr_ratio=ratio,
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
        import torch
        from diffusers.training_utils import cast_training_params

        from gralora_diffusion.adapters.placement.targets import find_targets
        from gralora_diffusion.training.data.seeds import seed_from
        from gralora_diffusion.training.optimization.adapters import (
            adapter_configs,
            add_adapters,
            trained_components,
        )

        from .rivals import attach_rival

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
            layers = find_targets(models[component], theirs)
            torch.manual_seed(seed_from(config.seed, "adapter", component))
            attach_rival(models[component], layers, self, config.lora_dropout)
            cast_training_params(models[component], torch.float32)
        return components

    def save(self, pipe: Any, family: ModelFamily, components: Sequence[str], folder: Path) -> None:
        """Write the adapter: GraLoRA's own file, or ``adapter.safetensors`` with PEFT's names.

        Nothing is written for full fine-tuning, whose file would be as large as the base.
        """
        from gralora_diffusion.adapters.adapter_file import save_adapter
        from gralora_diffusion.training.optimization.adapters import extract

        from .rivals import adapter_tensors

        if self.kind == "gralora":
            save_adapter(extract(pipe, family, components), folder / WEIGHTS_NAME)
        elif self.kind != "full":
            tensors = {
                f"{component}.{key}": tensor
                for component in components
                for key, tensor in adapter_tensors(getattr(pipe, component)).items()
            }
            write_safetensors(tensors, folder / "adapter.safetensors", {"method": self.name})


def _read(name: str) -> Method | None:
    """Read a name as a method with unchecked numbers; None if it is not a method's name."""
    own = _LEARNING_RATE.fullmatch(name)
    kind, *parts = (own["name"] if own else name).split("-")
    if kind not in KINDS or (own and (kind == "base" or not float(own["rate"]))):
        return None
    letters = KINDS[kind].letters
    numbers = [re.fullmatch(rf"([a-z])({_DIGITS})", part, re.ASCII) for part in parts]
    found = {match[1]: int(match[2]) for match in numbers if match}
    required = [letter for letter in letters if letter not in _OPTIONAL]
    given = [match[1] for match in numbers if match]
    if len(given) < len(parts) or given not in (required, [*letters]):
        return None
    values = {_FIELDS[letter]: value for letter, value in found.items()}
    return Method(kind, learning_rate=own["rate"] if own else "", **values)


def _nearest(name: str) -> str:
    """Suggest the most similar method's name with the numbers of this one; "" if there is none."""
    text, _, rate = name.lower().partition("-lr")
    numbers = {**_USUAL} | {f: int(n) for f, n in re.findall(rf"([rkhxfbm])({_DIGITS})", text)}
    if not re.search(r"[rb]\d", text) and (first := re.search(_DIGITS, text)):
        numbers["r"] = numbers["b"] = int(first[0])  # as in lora32
    methods = []
    for kind, (_, letters) in KINDS.items():
        for left_out in ("", _OPTIONAL) if _OPTIONAL in letters else ("",):
            kept = {_FIELDS[f]: numbers[f] for f in letters if f not in left_out}
            methods.append(Method(kind, **kept))
    methods += [replace(one, learning_rate=rate) for one in methods if rate]
    known = [method.name for method in methods if _read(method.name) and not method.problem]
    found = difflib.get_close_matches(name.lower(), known, n=1)
    return f"Did you mean {found[0]}? " if found else ""


@contextmanager
def bare_afterwards(pipe: Any, components: Sequence[str], method: Method) -> Iterator[None]:
    """Restore a bare pipeline's components afterwards, whatever is attached to them inside.

    For full fine-tuning, a copy of the weights is kept on the CPU. Methods that replace weights of
    the base keep the original ones with their layers.
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
    """Remove all adapters of any kind from a model; the base layers stay, with their weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    from gralora_diffusion.adapters.injection import mark_adapted

    from .rivals import bare_layer

    for parent in list(model.modules()):
        for attribute, module in list(parent.named_children()):
            if isinstance(module, BaseTunerLayer):
                setattr(parent, attribute, bare_layer(module))
    if hasattr(model, "peft_config"):
        del model.peft_config
    mark_adapted(model, False)
