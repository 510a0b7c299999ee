"""The config of an adapter: PEFT's, with patterns that set rank, k and alpha of single layers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import GraloraConfig as PeftGraloraConfig
from peft import PeftType
from peft.utils import CONFIG_NAME

from gralora_diffusion.adapters.placement.layer_config import PATTERNS


@dataclass
class GraloraConfig(PeftGraloraConfig):
    """PEFT's ``GraloraConfig`` with the patterns of PEFT's ``LoraConfig`` for single layers.

    The keys of the three mappings are regular expressions for the whole path of a layer or its end
    after a dot, such as ``to_q``, ``attn1\\.to_[qk]`` or ``^conv_in``. The first one that matches
    counts. The scaling of a layer is its own alpha / (its own rank + hybrid_r): as in PEFT's LoRA,
    alpha does not follow the rank.

    Only :func:`inject` and ``GraloraTuner`` use these fields. PEFT's own tuner ignores them.

    Args:
        rank_pattern: path -> rank in place of ``r``.
        k_pattern: path -> k in place of ``gralora_k``.
        alpha_pattern: path -> alpha in place of ``alpha``.
        exclude_modules: layers to leave out although ``target_modules`` names them: a list of
            endings of paths, or a regular expression for the whole path.
    """

    rank_pattern: dict[str, int] = field(default_factory=dict)
    k_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    exclude_modules: list[str] | set[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in PATTERNS:
            if getattr(self, name) is None:  # PEFT's LoRA allows None
                setattr(self, name, {})
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's. Without values in the additional fields, the result is exactly PEFT's."""
        ours = (*PATTERNS, "exclude_modules")
        return {key: v for key, v in super().to_dict().items() if v or key not in ours}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As PEFT's, which sorts all keys, but patterns keep their order because it matters."""
        super().save_pretrained(os.fspath(save_directory), **kwargs)
        path = Path(save_directory) / CONFIG_NAME
        values = json.loads(path.read_text(encoding="utf-8"))
        if ordered := {key: v for key, v in self.to_dict().items() if key in PATTERNS}:
            path.write_text(json.dumps({**values, **ordered}, indent=2), encoding="utf-8")

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> GraloraConfig:
        """As PEFT's, which would return PEFT's own config class."""
        if kwargs.get("peft_type") == PeftType.GRALORA:
            del kwargs["peft_type"]
        return super().from_peft_type(**kwargs)
