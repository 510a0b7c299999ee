"""FLUX.2 klein: as FLUX.2 dev, but with a smaller language model and without a guidance input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from .base import UNKNOWN, ControlCount, PublishedNames
from .flux2 import Flux2, layer_marks


class Flux2Klein(Flux2):
    name = "flux2-klein"
    pipeline_classes = (
        "Flux2KleinPipeline",
        "Flux2KleinInpaintPipeline",
        "Flux2KleinKVPipeline",
    )
    edit_pipelines = MappingProxyType(
        dict.fromkeys(
            ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline"),
            ControlCount(0, None),
        )
    )
    # diffusers takes a klein file for dev, which has a guidance input; and there are several klein
    # models with the same keys
    single_file_keys = ("single_stream_modulation.lin.weight",)
    single_file_default = False
    known_as = ("flux-2-klein", "flux2-klein")
    layer_marks = layer_marks(3072, 4096)  # 4B and 9B

    def count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            for prompt in prompts
        ]
        return super(Flux2, self).count_tokens(tokenizer, texts)

    def published_names(
        self, denoiser: Mapping[str, Any] = UNKNOWN, scheduler: Mapping[str, Any] = UNKNOWN
    ) -> PublishedNames:
        sizes = {24: "klein-4b", 32: "klein-9b"}
        return self._names(sizes.get(denoiser.get("num_attention_heads", 0), "klein"))


FAMILY = Flux2Klein()
