"""Which tensors are written in which dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gralora_diffusion.export.choices import DTYPE_CHOICES
from gralora_diffusion.export.dtypes import converted
from gralora_diffusion.export.rounding import DTYPES, Rounding
from gralora_diffusion.export.streaming import OutputTensor, Piece, write_streamed
from tests.export.test_streaming import load_file

FP8 = torch.float8_e4m3fn
PLANNED = [  # component, key, shape, dtype
    ("unet", "m.linear.weight", (4, 6), torch.bfloat16),
    ("unet", "m.linear.bias", (4,), torch.bfloat16),
    ("unet", "m.conv.weight", (4, 6, 3, 3), torch.float16),
    ("unet", "m.table", (4, 6), torch.float32),
    ("unet", "m.positions", (1, 6), torch.int64),
    ("text_encoder", "t.linear.weight", (4, 6), torch.float32),
    ("", "vae.linear.weight", (4, 6), torch.float32),
]


def planned() -> list[tuple[str, OutputTensor]]:
    return [
        (owner, OutputTensor(key, shape, dtype, (Piece(torch.ones(shape).to(dtype), 0, shape[0]),)))
        for owner, key, shape, dtype in PLANNED
    ]


def test_keep():
    assert converted(planned(), "keep", "unet")[0].dtype == torch.bfloat16
    kept = [(o.key, o.dtype, o.scale_key) for o in converted(planned(), "keep", "unet", "m.")]
    assert kept == [(key, dtype, None) for _, key, _, dtype in PLANNED]


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_one_dtype_for_all_of_the_components(name):
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    made = {o.key: o.dtype for o in converted(planned(), name, "unet", "m.")}
    expected = {key: dtypes[name] for _, key, *_ in PLANNED}
    expected |= {"m.positions": torch.int64, "vae.linear.weight": torch.float32}
    assert made == expected


@pytest.mark.parametrize("prefix", [None, "", "m."])
def test_fp8_of_the_matrices_of_the_denoiser(prefix, tmp_path):
    made = converted(planned(), "fp8_e4m3", "unet", prefix)
    expected: dict[str, tuple[Any, str | None]] = {k: (dtype, None) for _, k, _, dtype in PLANNED}
    scale = None if prefix is None else "m.linear.scale_weight"
    expected["m.linear.weight"] = (FP8, scale)
    if prefix is not None:
        expected[f"{prefix}scaled_fp8"] = (FP8, None)
    assert {o.key: (o.dtype, o.scale_key) for o in made} == expected
    write_streamed(tmp_path / "a.safetensors", made, {}, Rounding(), progress=False)
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(expected) | ({scale} if scale else set())
    if prefix is not None:
        assert found[f"{prefix}scaled_fp8"].shape == (2,)
        assert found[scale].dtype == torch.float32
        assert found[scale].shape == ()
        assert (found["m.linear.weight"].float() * found[scale]).unique().tolist() == [1]


def test_choices():
    assert DTYPE_CHOICES == ("keep", "fp32", "bf16", "fp16", "fp8_e4m3")
    assert list(DTYPES) == [name for name in DTYPE_CHOICES if name != "keep"]
