"""The options that select the base model and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from gralora_diffusion.options.fields import Fixed, MayDiffer, Place, Unrecorded, option


@dataclass(kw_only=True)
class BaseModelOptions:
    """The model that is adapted."""

    _argument_group_name: ClassVar[str] = "Base model"

    config: Annotated[str | None, Place(), MayDiffer(commands=True), Unrecorded()] = option(
        None,
        "YAML file of options, one `name: value` per line, or the name of a bundled one, such as "
        "sdxl; the command line overrides it",
    )
    pretrained_model_name_or_path: Annotated[str, Place(read=True, hub_id=True)] = option(
        "",
        "Required. The base model: a diffusers folder, a Hub id (owner/name) or a single "
        ".safetensors or .gguf file",
    )
    base_config: Annotated[str | None, Place(read=True, hub_id=True)] = option(
        None,
        "For a base in a single file: folder or Hub id of a pipeline of the same "
        "kind, which provides the configuration and the models that the file does not contain "
        "(default: found on the Hub)",
    )
    revision: str | None = option(None, "Branch, tag or commit of the base on the Hub")
    variant: str | None = option(None, "Variant of the base's weight files, such as fp16")
    cache_dir: Annotated[str | None, Place(), MayDiffer(commands=True)] = option(
        None, "Folder for downloads (default: the Hub's cache)"
    )
    pretrained_vae_model_name_or_path: Annotated[str | None, Place(read=True, hub_id=True)] = (
        option(None, "VAE to use instead of the base's: a folder or a Hub id")
    )
    leave_out_text_encoders: list[str] | None = option(
        None,
        "Text encoders of the base that are not loaded, to save memory, such as text_encoder_3 "
        "(T5) of Stable Diffusion 3",
    )
    family: str | None = option(
        None, "Model family of the base, such as stable-diffusion (default: detected)"
    )
    quantization: Annotated[
        Literal["bnb-nf4", "bnb-int8", "torchao-fp8", "torchao-int8"] | None, Fixed()
    ] = option(
        None,
        "Store the frozen denoiser in 8 or 4 bits (needs bitsandbytes and a GPU, or torchao)",
    )
    quantize_text_encoders: bool = option(False, "Quantize the text encoders too")
    bnb_quantization_config_path: Annotated[str | None, Place(read=True)] = option(
        None, "JSON file with arguments for BitsAndBytesConfig, instead of --quantization"
    )

    @property
    def is_gguf(self) -> bool:
        """Whether the base is a GGUF file, whose denoiser stays quantized."""
        return self.pretrained_model_name_or_path.lower().endswith(".gguf")

    @property
    def quantizes(self) -> bool:
        """Whether any part of the base is quantized."""
        return bool(
            self.quantization or self.bnb_quantization_config_path or self.quantize_text_encoders
        )
