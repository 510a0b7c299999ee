"""A quantized frozen base: the kinds there are, what each needs, how the libraries are told.

The base is quantized as it is loaded, by diffusers and transformers, and the adapter is put on
afterwards: it is fp32 whatever the base is stored in.
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

#: What a card calls a quantized base.
QUANTIZED_BASE = "quantized base"
#: --quantization -> the package that does it.
PACKAGES = {
    "bnb-nf4": "bitsandbytes",
    "bnb-int8": "bitsandbytes",
    "torchao-fp8": "torchao",
    "torchao-int8": "torchao",
}


def check_quantization(options: BaseModelOptions) -> Iterator[str]:
    """Yield what is wrong with the options about quantization, or with this machine for them."""
    if options.quantization and options.bnb_quantization_config_path:
        yield (
            "--quantization and --bnb_quantization_config_path exclude each other: both say how "
            "the base is quantized. Leave one out"
        )
        return
    if not (flag := _flag(options)):
        if options.quantize_text_encoders:
            yield (
                "--quantize_text_encoders needs --quantization or --bnb_quantization_config_path, "
                "which say how"
            )
        return
    package = PACKAGES.get(options.quantization or "bnb-nf4")
    if package is None:
        return  # no such choice, which is said elsewhere
    if Path(options.pretrained_model_name_or_path).is_file():
        yield (
            f"{flag} needs a base in diffusers' folder layout, for diffusers quantizes no single "
            "file as it loads it. Load the file once in Python, by from_single_file of its "
            "pipeline, write it by save_pretrained, and give that folder"
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
        # diffusers' own look at packages, versions and devices
        DiffusersAutoQuantizer.from_config(wanted, pre_quantized=False).validate_environment()
    except (ImportError, RuntimeError, ValueError) as error:
        advice = "" if package == "torchao" else " torchao's kinds work without a GPU"
        yield f"{flag} cannot be used on this machine: {error}{advice}"


def loading_arguments(
    options: BaseModelOptions, family: ModelFamily, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the arguments by which ``from_pretrained`` of the family's pipeline quantizes.

    Args:
        dtype: what the base computes in.

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
    # LLM.int8 computes in fp16 whatever it is given, and says so of every product
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=mapping)}


def quantize_empty(
    options: BaseModelOptions, family: ModelFamily, name: str, model: nn.Module, dtype: torch.dtype
) -> int:
    """Quantize a model on the meta device as it would be on loading, as far as that can be done.

    Torchao's tensors can be made there. What bitsandbytes makes cannot: its layers stay as they
    are, and compute the same shapes.

    Args:
        name: the model's attribute of the pipeline.

    Returns:
        The bytes that the model as it is now has too many.
    """
    wanted: Any = None
    theirs = getattr(getattr(model, "config", None), "quantization_config", None)
    if _flag(options) and name in _quantized_components(options, family):
        wanted = _model_config(options, diffusers, dtype)
    elif theirs and name == family.denoiser:  # it is quantized on disk
        wanted = DiffusersAutoQuantizer.from_dict(dict(theirs))
    if isinstance(wanted, diffusers.TorchAoConfig):
        from torchao.quantization import quantize_

        quantize_(model, wanted.quant_type)
        model.requires_grad_(False)
    if not isinstance(wanted, diffusers.BitsAndBytesConfig):
        return 0
    # 4 bits, and a scale of fp32 for 64 weights, or one of 8 bits with a scale of its own for 256
    scale = 1 / 64 + 4 / (64 * 256) if wanted.bnb_4bit_use_double_quant else 4 / 64
    per_weight = 0.5 + scale if wanted.load_in_4bit else 1.0
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    numbers = sum(layer.weight.numel() for layer in layers)
    scales = 0 if wanted.load_in_4bit else 4 * sum(layer.out_features for layer in layers)
    return sum(layer.weight.nbytes for layer in layers) - int(numbers * per_weight) - scales


def check_computing_dtype(pipe: Any, dtype: torch.dtype) -> None:
    """Refuse a base that was quantized by torchao from another precision: it computes in that.

    Raises:
        ValueError: names the component and the precision to take.
    """
    for name, component in pipe.components.items():
        for layer in component.modules() if isinstance(component, nn.Module) else ():
            quantized = (quantization_of(layer) or "").startswith("torchao")
            held: Any = layer.weight.dtype if quantized else dtype
            if held != dtype:
                theirs = str(held).removeprefix("torch.")
                flag = "no" if held == torch.float32 else short_name(held)
                raise ValueError(
                    f"its {name} was quantized from {theirs} and computes in nothing else, but "
                    f"{str(dtype).removeprefix('torch.')} is asked for. Give --mixed_precision "
                    f"{flag}, and the same to --prior_generation_precision if class pictures are "
                    "drawn"
                )


def quantization_facts(options: BaseModelOptions, pipe: Any) -> dict[str, str]:
    """Return what a model card says of a base that was quantized, on loading or on disk."""
    kinds = {}
    for name, model in pipe.components.items():
        if theirs := getattr(getattr(model, "config", None), "quantization_config", None):
            values = theirs if isinstance(theirs, dict) else theirs.to_dict()
            method = values.get("quant_method", "some method")
            kinds[name] = options.quantization or str(getattr(method, "value", method))
    told = ", ".join(f"{name} by {kind}" for name, kind in kinds.items())
    return {QUANTIZED_BASE: told} if told else {}


def _flag(options: BaseModelOptions) -> str | None:
    """The option that asks for quantization, with its value."""
    if options.quantization:
        return f"--quantization {options.quantization}"
    if options.bnb_quantization_config_path:
        return f"--bnb_quantization_config_path {options.bnb_quantization_config_path}"
    return None


def _quantized_components(options: BaseModelOptions, family: ModelFamily) -> tuple[str, ...]:
    encoders = family.all_text_encoders if options.quantize_text_encoders else ()
    return (family.denoiser, *encoders)


def _model_config(options: BaseModelOptions, library: ModuleType, dtype: torch.dtype) -> Any:
    """The config of one model, of the class that its library (diffusers, transformers) has."""
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
    if arguments.get("load_in_4bit"):  # as diffusers' scripts do, whatever a file says
        arguments["bnb_4bit_compute_dtype"] = dtype
    return library.BitsAndBytesConfig(**arguments)


def _read_arguments(path: Path) -> dict[str, Any]:
    """Read a file of arguments for diffusers' ``BitsAndBytesConfig``.

    Raises:
        ValueError: not such a file; says what is wrong with it.
    """
    try:
        arguments = read_object(path)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(
            f"must hold a JSON object, the arguments of BitsAndBytesConfig: {error}"
        ) from error
    parameters = inspect.signature(diffusers.BitsAndBytesConfig.__init__).parameters
    # what a config writes of itself, besides its arguments
    written = {"quant_method", "_load_in_4bit", "_load_in_8bit"}
    known = parameters.keys() - {"self", "kwargs"}
    if unknown := sorted(arguments.keys() - known - written):
        raise ValueError(
            f"BitsAndBytesConfig has no {', '.join(unknown)}; it takes {', '.join(sorted(known))}"
        )
    if not (arguments.get("load_in_4bit") or arguments.get("load_in_8bit")):
        raise ValueError('neither "load_in_4bit" nor "load_in_8bit" is true, so nothing would be')
    return {name: value for name, value in arguments.items() if name in known}


def _refuse_quantized(options: BaseModelOptions, family: ModelFamily, flag: str) -> None:
    """Raise ValueError if the denoiser on disk is quantized: diffusers would leave it so."""
    theirs = diffusers.AutoModel.load_config(
        options.pretrained_model_name_or_path,
        subfolder=family.denoiser,
        revision=options.revision,
        cache_dir=options.cache_dir,
    ).get("quantization_config")
    if theirs:
        method = theirs.get("quant_method", "some method")
        raise ValueError(
            f"its {family.denoiser} is quantized already ({method}), so {flag} has no use. Leave "
            "it out, or give the unquantized base"
        )
