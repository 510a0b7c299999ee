"""Tell diffusers' own adapter methods which components hold adapters, and which are fused.

``set_adapters``, ``delete_adapters``, ``fuse_lora`` and the others visit the components in
``_lora_loadable_modules``, a list of the class, and record fused adapters in ``_merged_adapters``.
"""

from __future__ import annotations

from collections.abc import Iterable

from diffusers import DiffusionPipeline

from gralora_diffusion.adapters.compatibility import component_models, gralora_layers

_LISTED, _FUSED = "_lora_loadable_modules", "_merged_adapters"


def register_components(pipe: DiffusionPipeline) -> None:
    """Have diffusers' methods reach every component that holds a GraLoRA adapter.

    diffusers' list does not contain T5, because LoRAs do not train it. This pipeline, not its
    class, therefore gets its own list while it needs one. Pipelines without these methods have no
    list and get none.
    """
    listed = getattr(type(pipe), _LISTED, None)
    if not listed:
        return
    models = component_models(pipe)
    more = [name for name, m in models.items() if name not in listed and gralora_layers(m)]
    vars(pipe).pop(_LISTED, None)
    if more:
        setattr(pipe, _LISTED, [*listed, *more])


def register_fused(pipe: DiffusionPipeline, adapter_names: Iterable[str]) -> None:
    """Keep ``pipe.fused_loras`` and ``num_fused_loras`` correct for these adapters."""
    if hasattr(pipe, _FUSED):
        fused = {
            name
            for model in component_models(pipe).values()
            for layer in gralora_layers(model)
            for name in layer.merged_adapters
        }
        setattr(pipe, _FUSED, (getattr(pipe, _FUSED) - set(adapter_names)) | fused)
