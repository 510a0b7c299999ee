"""A quantized frozen base: the supported kinds, their requirements, and the libraries' settings.

diffusers and transformers quantize the base when they load it. The adapter is attached afterwards,
and it is fp32 whatever the base is stored in.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
import transformers
from diffusers.quantizers import DiffusersAutoQuantizer
from torch import nn

from gralora_diffusion.adapters.placement.targets import quantization_of
from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.dtypes import short_name
from gralora_diffusion.io.json_files import read_object

from .options import BaseModelOptions

#: Label of a quantized base in model cards.
QUANTIZED_BASE = "quantized base"
#: --quantization -> the package that quantizes.
PACKAGES = {
    "bnb-nf4": "bitsandbytes",
    "bnb-int8": "bitsandbytes",
    "torchao-fp8": "torchao",
    "torchao-int8": "torchao",
}


def check_quantization(options: BaseModelOptions) -> Iterator[str]:
    """Yield problems with the quantization options, or reasons why this machine cannot use them."""
    if options.quantization and options.bnb_quantization_config_path:
        yield (
            "--quantization and --bnb_quantization_config_path exclude each other, because both "
            "set how the base is quantized. Leave one out"
        )
        return
    if not (flag := _flag(options)):
        if options.quantize_text_encoders:
            yield (
                "--quantize_text_encoders needs --quantization or --bnb_quantization_config_path, "
                "which set the kind of quantization"
            )
        return
    package = PACKAGES.get(options.quantization or "bnb-nf4")
    if package is None:
        return  # an invalid choice, which is reported elsewhere
    if Path(options.pretrained_model_name_or_path).is_file():
        yield (
            f"{flag} needs a base in diffusers' folder layout, because diffusers does not quantize "
            "a single file when it loads it. Load the file once in Python with from_single_file of "
            "its pipeline, write it with save_pretrained, and pass that folder"
        )
    if importlib.util.find_spec(package) is None:
        yield f"{flag} needs: pip install {package}"
        return
    try:
        wanted = _model_config(options, diffusers, torch.float32)
    except (OSError, ValueError, TypeError) as error:
        yield f"{flag}: {error}"
        return
    try:
        # diffusers' own check of packages, versions and devices
        DiffusersAutoQuantizer.from_config(wanted, pre_quantized=False).validate_environment()
    except (ImportError, RuntimeError, ValueError) as error:
        advice = "" if package == "torchao" else " The torchao kinds work without a GPU"
        yield f"{flag} cannot be used on this machine: {error}{advice}"


def loading_arguments(
    options: BaseModelOptions, family: ModelFamily, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the arguments that make ``from_pretrained`` of the family's pipeline quantize.

    Args:
        dtype: the dtype that the base computes in.

    Raises:
        ValueError: the base is quantized already.
    """
    if not (flag := _flag(options)):
        return {}
    _refuse_quantized(options, family, flag)
    mapping = {
        name: _model_config(options, diffusers if name == family.denoiser else transformers, dtype)
        for name in _quantized_components(options, family)
    }
    # LLM.int8 always computes in fp16, and warns about it at every product
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=mapping)}


def quantize_empty(
    options: BaseModelOptions, family: ModelFamily, name: str, model: nn.Module, dtype: torch.dtype
) -> int:
    """Quantize a model on the meta device as it would be on loading, as far as possible.

    torchao's tensors can be created there. Those of bitsandbytes cannot, so their layers stay
    unquantized and compute the same shapes.

    Args:
        name: the model's attribute of the pipeline.

    Returns:
        How many bytes the model on the meta device has more than the quantized model.
    """
    if options.is_gguf and name == family.denoiser:
        from .gguf_file import read_tensors

        tensors = read_tensors(Path(options.pretrained_model_name_or_path)).values()
        return sum(p.nbytes for p in model.parameters()) - sum(t.nbytes for t in tensors)
    wanted: Any = None
    stored = getattr(getattr(model, "config", None), "quantization_config", None)
    if _flag(options) and name in _quantized_components(options, family):
        wanted = _model_config(options, diffusers, dtype)
    elif stored and name == family.denoiser:  # it is quantized on disk
        wanted = DiffusersAutoQuantizer.from_dict(dict(stored))
    if isinstance(wanted, diffusers.TorchAoConfig):
        from torchao.quantization import quantize_

        quantize_(model, wanted.quant_type)
        model.requires_grad_(False)
    if not isinstance(wanted, diffusers.BitsAndBytesConfig):
        return 0
    # 4 bits, and an fp32 scale for 64 weights, or an 8-bit scale with an fp32 scale for 256 of them
    scale = 1 / 64 + 4 / (64 * 256) if wanted.bnb_4bit_use_double_quant else 4 / 64
    per_weight = 0.5 + scale if wanted.load_in_4bit else 1.0
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    numbers = sum(layer.weight.numel() for layer in layers)
    scales = 0 if wanted.load_in_4bit else 4 * sum(layer.out_features for layer in layers)
    return sum(layer.weight.nbytes for layer in layers) - int(numbers * per_weight) - scales


def check_computing_dtype(pipe: Any, dtype: torch.dtype) -> None:
    """Refuse a base that torchao quantized from another precision, because it computes in that.

    Raises:
        ValueError: the message names the component and the precision to use.
    """
    for name, component in pipe.components.items():
        for layer in component.modules() if isinstance(component, nn.Module) else ():
            quantized = (quantization_of(layer) or "").startswith("torchao")
            held: Any = layer.weight.dtype if quantized else dtype
            if held != dtype:
                stored = str(held).removeprefix("torch.")
                flag = "no" if held == torch.float32 else short_name(held)
                raise ValueError(
                    f"its {name} was quantized from {stored} and only computes in that, but the "
                    f"options ask for {str(dtype).removeprefix('torch.')}. Pass --mixed_precision "
                    f"{flag}, and the same as --prior_generation_precision if class images are "
                    "generated"
                )


def quantization_facts(options: BaseModelOptions, pipe: Any) -> dict[str, str]:
    """Return a model card's facts about a base that is quantized, on loading or on disk."""
    kinds = {}
    for name, model in pipe.components.items():
        if config := getattr(getattr(model, "config", None), "quantization_config", None):
            values = config if isinstance(config, dict) else config.to_dict()
            method = values.get("quant_method", "some method")
            kinds[name] = options.quantization or str(getattr(method, "value", method))
        elif method := getattr(model, "quantization_method", None):  # of a GGUF file
            kinds[name] = str(getattr(method, "value", method))
    text = ", ".join(f"{name} by {kind}" for name, kind in kinds.items())
    return {QUANTIZED_BASE: text} if text else {}


def _flag(options: BaseModelOptions) -> str | None:
    """Return the option that asks for quantization, with its value."""
    if options.quantization:
        return f"--quantization {options.quantization}"
    if options.bnb_quantization_config_path:
        return f"--bnb_quantization_config_path {options.bnb_quantization_config_path}"
    return None


def _quantized_components(options: BaseModelOptions, family: ModelFamily) -> tuple[str, ...]:
    encoders = family.all_text_encoders if options.quantize_text_encoders else ()
    return (family.denoiser, *encoders)


def _model_config(options: BaseModelOptions, library: ModuleType, dtype: torch.dtype) -> Any:
    """Return the config of one model, of the class in its library (diffusers, transformers)."""
    if PACKAGES.get(options.quantization or "") == "torchao":
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        fp8 = options.quantization == "torchao-fp8"
        return library.TorchAoConfig(Float8WeightOnlyConfig() if fp8 else Int8WeightOnlyConfig())
    if options.quantization == "bnb-int8":
        arguments: dict[str, Any] = {"load_in_8bit": True}
    elif options.quantization == "bnb-nf4":
        arguments = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    else:
        arguments = _read_arguments(Path(str(options.bnb_quantization_config_path)))
    if arguments.get("load_in_4bit"):  # as in diffusers' scripts, this overrides the file
        arguments["bnb_4bit_compute_dtype"] = dtype
    return library.BitsAndBytesConfig(**arguments)


def _read_arguments(path: Path) -> dict[str, Any]:
    """Read a file of arguments for diffusers' ``BitsAndBytesConfig``.

    Raises:
        ValueError: it is not such a file; the message says why.
    """
    try:
        arguments = read_object(path)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(
            f"must contain a JSON object with the arguments of BitsAndBytesConfig: {error}"
        ) from error
    parameters = inspect.signature(diffusers.BitsAndBytesConfig.__init__).parameters
    # fields that a config writes besides its arguments
    written = {"quant_method", "_load_in_4bit", "_load_in_8bit"}
    known = parameters.keys() - {"self", "kwargs"}
    if unknown := sorted(arguments.keys() - known - written):
        raise ValueError(
            f"BitsAndBytesConfig has no {', '.join(unknown)}; it takes {', '.join(sorted(known))}"
        )
    if not (arguments.get("load_in_4bit") or arguments.get("load_in_8bit")):
        raise ValueError(
            'neither "load_in_4bit" nor "load_in_8bit" is true, so nothing would be quantized. '
            "Set one of them"
        )
    return {name: value for name, value in arguments.items() if name in known}


def _refuse_quantized(options: BaseModelOptions, family: ModelFamily, flag: str) -> None:
    """Raise ValueError if the denoiser on disk is quantized, because diffusers would keep that."""
    stored = diffusers.AutoModel.load_config(
        options.pretrained_model_name_or_path,
        subfolder=family.denoiser,
        revision=options.revision,
        cache_dir=options.cache_dir,
    ).get("quantization_config")
    if stored:
        method = stored.get("quant_method", "some method")
        raise ValueError(
            f"its {family.denoiser} is already quantized ({method}), so {flag} would have no "
            "effect. Leave it out, or pass the unquantized base"
        )
