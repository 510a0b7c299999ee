"""ComfyUI nodes that load a native GraLoRA file; this folder belongs in ``custom_nodes``."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import comfy.lora
import comfy.sd
import folder_paths

from .conversion import (
    DENOISERS,
    GraloraError,
    GraloraFile,
    check_family,
    lora_for,
    read_gralora,
    weight_shapes,
)

_STRENGTH = ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01})


def _version(path: str) -> tuple[str, int, int]:
    status = os.stat(path)
    return path, status.st_mtime_ns, status.st_size


class GraloraLoader:
    """Attaches a GraLoRA to a model and its text encoders, as the equivalent LoRA."""

    RETURN_TYPES: ClassVar = ("MODEL", "CLIP")
    FUNCTION = "load"
    CATEGORY = "model/loaders"
    DESCRIPTION = "Loads a GraLoRA file of gralora_diffusion from the loras folder."

    def __init__(self) -> None:
        self._read: tuple[tuple[str, int, int], GraloraFile] | None = None

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "gralora_name": (folder_paths.get_filename_list("loras"),),
                "strength_model": _STRENGTH,
                "strength_clip": _STRENGTH,
            }
        }

    @classmethod
    def IS_CHANGED(cls, gralora_name: str, **_: Any) -> str:
        """Return the file's version, so that a newly trained file of the same name is reloaded."""
        return str(_version(folder_paths.get_full_path_or_raise("loras", gralora_name)))

    def load(
        self, model: Any, clip: Any, gralora_name: str, strength_model: float, strength_clip: float
    ) -> tuple[Any, Any]:
        if strength_model == 0 and strength_clip == 0:
            return model, clip
        file = self._file(gralora_name)
        check_family(file, [c.__name__ for c in type(model.model.model_config).__mro__])
        if strength_model:
            targets = comfy.lora.model_lora_keys_unet(model.model, {})
            layers = [layer for layer in file.layers if layer.component in DENOISERS]
            lora = lora_for(layers, targets, weight_shapes(model.model))
            if lora:
                model, _ = comfy.sd.load_lora_for_models(model, None, lora, strength_model, 0)
        if strength_clip:
            encoders = clip.cond_stage_model
            targets = comfy.lora.model_lora_keys_clip(encoders, {})
            layers = [layer for layer in file.layers if layer.component not in DENOISERS]
            lora = lora_for(layers, targets, weight_shapes(encoders))
            if lora:
                _, clip = comfy.sd.load_lora_for_models(None, clip, lora, 0, strength_clip)
        return model, clip

    def _file(self, name: str) -> GraloraFile:
        version = _version(folder_paths.get_full_path_or_raise("loras", name))
        if self._read is None or self._read[0] != version:
            self._read = None  # frees the old file before the new one is read
            self._read = version, read_gralora(version[0])
        return self._read[1]


class GraloraLoaderModelOnly(GraloraLoader):
    """The same for a file without text encoders."""

    RETURN_TYPES: ClassVar = ("MODEL",)
    FUNCTION = "load_model_only"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        required = super().INPUT_TYPES()["required"]
        left_out = ("clip", "strength_clip")
        return {"required": {key: v for key, v in required.items() if key not in left_out}}

    def load_model_only(self, model: Any, gralora_name: str, strength_model: float) -> tuple[Any]:
        if strength_model == 0:
            return (model,)
        text = sorted({x.component for x in self._file(gralora_name).layers} - set(DENOISERS))
        if text:
            raise GraloraError(
                f"{gralora_name} also adapts {', '.join(text)}, which this node would leave out. "
                "Use Load GraLoRA. To leave them out, set its strength_clip to 0."
            )
        return (self.load(model, None, gralora_name, strength_model, 0)[0],)


NODE_CLASS_MAPPINGS = {
    "GraloraLoader": GraloraLoader,
    "GraloraLoaderModelOnly": GraloraLoaderModelOnly,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "GraloraLoader": "Load GraLoRA",
    "GraloraLoaderModelOnly": "Load GraLoRA (Model Only)",
}
