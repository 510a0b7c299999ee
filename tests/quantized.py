"""Quantize tiny models on any machine, and read what is stored without the library's help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

from tests.models import stable_diffusion

KINDS = ["bnb-nf4", "bnb-int8", "torchao-fp8", "torchao-int8"]
#: The same for what goes through ``from_pretrained``: diffusers wants a GPU for bitsandbytes.
LOADABLE = [
    pytest.param(kind, marks=pytest.mark.gpu if kind.startswith("bnb") else ()) for kind in KINDS
]


def pipeline() -> StableDiffusionPipeline:
    """Every width a multiple of 64: for others bitsandbytes 0.50 unpacks nf4 wrongly on the CPU.

    It begins a new block of 64 weights with every row, where it packed them one after the other.
    """
    return stable_diffusion(block_out_channels=(64, 64), cross_attention_dim=64)


def quantize(model: nn.Module, kind: str, **changes: Any) -> nn.Module:
    """Quantize the linear layers of a model on the CPU, in place; return the model.

    bitsandbytes' layers are kept to multiplying by the dequantized weight, as they do in training.
    In evaluation, on the CPU, LLM.int8 rounds the input too, so the layers stay in training mode;
    and 4-bit weights are packed anew, with a loss, on processors that know AVX-512 BF16.

    Args:
        changes: further arguments of ``BitsAndBytesConfig``.
    """
    if kind.startswith("torchao"):
        quantize_(model, Float8WeightOnlyConfig() if "fp8" in kind else Int8WeightOnlyConfig())
        return model.requires_grad_(False)
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from diffusers import BitsAndBytesConfig
    from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = BitsAndBytesConfig(**(nf4 if "nf4" in kind else {"load_in_8bit": True}), **changes)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    replace_with_bnb_linear(model, modules_to_not_convert=[], quantization_config=config)
    for name, layer in model.named_modules():
        if isinstance(layer, (Linear4bit, Linear8bitLt)):
            quantized: Any = type(layer.weight)
            arguments = vars(layer.weight)
            new = quantized(weights[f"{name}.weight"], requires_grad=False, **arguments)
            layer.weight = new.to("cpu")  # which quantizes
            layer.support_avx512bf16_for_cpu = False
            if layer.bias is not None:
                layer.bias = nn.Parameter(weights[f"{name}.bias"], requires_grad=False)
    return model.requires_grad_(False)


def parts(layer: nn.Module) -> dict[str, Tensor]:
    """The tensors that a quantized layer's weight is stored in."""
    weight: Any = layer.weight
    if hasattr(weight, "qdata"):
        return {"data": weight.qdata, "scale": weight.scale}
    if (state := getattr(weight, "quant_state", None)) is not None:
        return {"data": weight.data, "absmax": state.absmax}
    if hasattr(layer, "state"):
        scale = layer.state.SCB if layer.state.SCB is not None else weight.SCB
        return {"data": weight.data, "scale": scale}
    return {"data": weight}


def stored(*models: nn.Module) -> dict[str, Tensor]:
    """A copy of all that the models' weights are stored in, adapters aside."""
    tensors = {}
    for number, model in enumerate(models):
        for name, module in model.named_modules():
            if isinstance(getattr(module, "weight", None), nn.Parameter | Tensor):
                if "gralora_" in name or hasattr(module, "gralora_A"):
                    continue
                path = name.replace(".base_layer", "")
                for part, tensor in parts(module).items():
                    tensors[f"{number}.{path}.{part}"] = tensor.detach().clone()
    return tensors


def identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def dequantized(layer: nn.Module) -> Tensor:
    """The weight (out, in) that the stored numbers stand for, in float64, by their definition."""
    weight: Any = layer.weight
    if (state := getattr(weight, "quant_state", None)) is not None:
        packed = weight.data.view(torch.uint8).flatten().int()
        numbers = state.code.double()[torch.stack([packed >> 4, packed & 15], dim=-1).flatten()]
        scales = state.absmax.double().repeat_interleave(state.blocksize)[: len(numbers)]
        return (numbers * scales).reshape(layer.out_features, layer.in_features)
    data, scale = parts(layer).values()
    step = scale.double().reshape(-1, 1)
    return data.double() * (step / 127 if hasattr(layer, "state") else step)


def write_gguf(tensors: dict[str, Tensor], path: Path, kind: str) -> dict[str, Tensor]:
    """Write a denoiser, its matrices in blocks of 32 numbers where they fit; return its values."""
    import gguf

    stored = gguf.GGMLQuantizationType[kind]
    writer, values = gguf.GGUFWriter(path, arch="flux"), {}
    for key, tensor in tensors.items():
        data = tensor.float().numpy()
        if tensor.dim() == 2 and tensor.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(data, stored)
            writer.add_tensor(key, packed, raw_dtype=stored)
            data = gguf.quants.dequantize(packed, stored)
        else:
            writer.add_tensor(key, np.ascontiguousarray(data))
        values[key] = torch.from_numpy(np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
