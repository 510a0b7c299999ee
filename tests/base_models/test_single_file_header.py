"""What can be read from an original file's header, without its weights."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type

from gralora_diffusion.base_models.single_file_header import OriginalHeader
from gralora_diffusion.families import get_family
from gralora_diffusion.io.tensor_files import StoredTensor

PREFIX = "model.diffusion_model."
PLAIN = {
    f"{PREFIX}a.weight": "BF16",
    f"{PREFIX}a.bias": "BF16",
    "text_encoders.t5xxl.transformer.b.weight": "F32",
    "text_encoders.clip_l.transformer.position_ids": "I64",
}


def header(metadata=None, **dtypes: str) -> OriginalHeader:
    held = {**PLAIN, **{key.replace("__", "."): dtype for key, dtype in dtypes.items()}}
    tensors = {
        key: StoredTensor(Path("x"), key, dtype, (2, 2), 0, 4) for key, dtype in held.items()
    }
    return OriginalHeader(tensors, metadata or {})


def told(layers) -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        (f"{PREFIX}scaled_fp8", "F8_E4M3"),
        (f"{PREFIX}a.scale_weight", "F32"),
        (f"{PREFIX}a.weight_scale", "F32"),
        (f"{PREFIX}a.weight_s_rel", "F8_E4M3"),
        (f"{PREFIX}a.comfy_quant", "U8"),
        (f"{PREFIX}a.weight.absmax", "U8"),
        (f"{PREFIX}a.qweight", "I8"),
        (f"{PREFIX}a.weight", "I8"),
        (f"{PREFIX}a.weight", "U8"),
        (f"{PREFIX}a.weight", "F4"),
    ],
)
def test_quantized(key, dtype):
    file = header(**{key: dtype})
    assert file.quantized == file.quantized_below(PREFIX) == key
    other = key.replace(PREFIX, "text_encoders.t5xxl.transformer.")
    file = header(**{other: dtype})
    assert file.quantized == other
    assert file.quantized_below(PREFIX) is None


def test_not_quantized():
    assert header().quantized is None
    assert header(**{f"{PREFIX}a.weight": "F8_E4M3"}).quantized is None  # plain, without scales
    assert header(told({})).quantized is None


@pytest.mark.parametrize("name", [f"{PREFIX}a", "a"])
def test_only_the_header_tells(name):
    file = header(told({name: {"format": "asym_w4a8_int8"}}))
    assert file.quantized_below(PREFIX) == f"{PREFIX}a.weight"
    file = header(told({"text_encoders.t5xxl.transformer.b": {"format": "nvfp4"}}))
    assert file.quantized == "text_encoders.t5xxl.transformer.b.weight"
    assert file.quantized_below(PREFIX) is None


@pytest.mark.parametrize(
    ("inputs", "outputs", "kind"),
    [
        (4, 4, None),
        (8, 8, None),  # a base with more channels than usual, such as the bundled one
        (9, 4, "inpainting"),
        (8, 4, "instruct-pix2pix"),
    ],
)
def test_a_base_for_another_task_has_more_inputs_than_outputs(inputs, outputs, kind):
    shapes = {"input_blocks.0.0.weight": (320, inputs, 3, 3), "out.2.weight": (outputs, 320, 3, 3)}
    tensors = {
        PREFIX + key: StoredTensor(Path("x"), PREFIX + key, "F16", shape, 0, 4)
        for key, shape in shapes.items()
    }
    file = OriginalHeader(tensors)
    assert file.other_kind(get_family("stable-diffusion")) == kind


VERSION_2 = f"{PREFIX}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
XL = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"


@pytest.mark.parametrize("others", [{}, {VERSION_2: (8, 768)}, {VERSION_2: (8, 1024)}, {XL: (8,)}])
def test_bases_for_inpainting_have_the_kinds_of_diffusers(others):
    shapes = {f"{PREFIX}input_blocks.0.0.weight": (32, 9, 3, 3), **others}
    header = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    tensors = {
        key: StoredTensor(Path("x"), key, "F16", shape, 0, 4) for key, shape in shapes.items()
    }
    assert OriginalHeader(tensors).kind == infer_diffusers_model_type(header)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"layers": 3}', "[" * 100_000])
def test_a_header_that_cannot_be_read_counts_as_quantized(text):
    assert header({"_quantization_metadata": text}).quantized_below(PREFIX)


def test_a_first_weight_without_inputs():
    shapes = {"input_blocks.0.0.weight": (320,), "out.2.weight": (4, 320, 3, 3)}
    tensors = {
        PREFIX + key: StoredTensor(Path("x"), PREFIX + key, "F16", shape, 0, 4)
        for key, shape in shapes.items()
    }
    assert OriginalHeader(tensors).other_kind(get_family("stable-diffusion")) is None
