"""FLUX.2 klein: as FLUX.2 dev, with a smaller language model and without guidance as an input."""

from __future__ import annotations

from .flux2 import Flux2


class Flux2Klein(Flux2):
    name = "flux2-klein"
    pipeline_classes = (
        "Flux2KleinPipeline",
        "Flux2KleinInpaintPipeline",
        "Flux2KleinKVPipeline",
    )


FAMILY = Flux2Klein()
