"""GGUF files as bases, written with llama.cpp's own package."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
from safetensors.torch import save_file

from gralora_diffusion import BaseModelOptions, get_family, load_base
from gralora_diffusion.base_models.gguf_file import read_tensors
from gralora_diffusion.base_models.loading import find_base_family
from gralora_diffusion.export.main import main as export
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.checkpoints.resume import describe_base
from gralora_diffusion.training.config.training_config import TrainingConfig
from tests.models import PIPELINES
from tests.originals import ORIGINALS, transformer_alone
from tests.quantized import write_gguf
from tests.training.runs import assert_same_run, learned, run

FAMILY = get_family("flux2-klein")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, its denoiser as GGUF files, and the values in one of them as a single file."""
    folder = tmp_path_factory.mktemp("gguf")
    pipe = PIPELINES["flux2-klein"]()
    pipe.save_pretrained(folder / "base")
    tensors = transformer_alone(ORIGINALS["flux2-klein"](pipe))
    values = write_gguf(tensors, folder / "Q8_0.gguf", "Q8_0")
    save_file(values, folder / "values.safetensors")
    write_gguf(tensors, folder / "Q4_0.gguf", "Q4_0")
    write_gguf(tensors, folder / "BF16.gguf", "BF16")
    return folder


def options(folder: Path, name: str) -> BaseModelOptions:
    return BaseModelOptions(
        pretrained_model_name_or_path=str(folder / name), base_config=str(folder / "base")
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
def test_weights_stay_packed(kind: str, base: Path) -> None:
    chosen = options(base, f"{kind}.gguf")
    family = find_base_family(chosen)
    assert family is FAMILY
    packed = load_base(chosen, family, torch.float32).transformer
    whole = load_base(options(base, "base"), family, torch.float32).transformer
    kinds = {type(p).__name__ for p in packed.parameters()}
    assert kinds == {"Parameter", "GGUFParameter"}
    loss = {"Q8_0": 0.02, "Q4_0": 0.3, "BF16": 0.01}[kind]
    for name, weight in whole.named_parameters():
        found: Any = packed.get_parameter(name)
        if isinstance(found, GGUFParameter):
            found = dequantize_gguf_tensor(found)
        assert found.shape == weight.shape
        assert (found.float() - weight).abs().max() <= loss * weight.abs().max()


def test_other_packed_weights_are_another_base(base: Path) -> None:
    """Also if all weights that are not packed are the same."""
    found = {}
    for kind in ("Q8_0", "Q4_0"):
        chosen = options(base, f"{kind}.gguf")
        for _ in range(2):
            pipe = load_base(chosen, FAMILY, torch.float32)
            config = TrainingConfig(pretrained_model_name_or_path=str(base / f"{kind}.gguf"))
            found.setdefault(kind, []).append(describe_base(pipe, config)["models"])
    assert found["Q8_0"][0] == found["Q8_0"][1]
    differing = {n for n, digest in found["Q8_0"][0].items() if digest != found["Q4_0"][0][n]}
    assert differing == {"transformer"}


def test_a_run_learns_what_it_does_on_the_values(
    base: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its adapter is exported for the unquantized base as any other."""
    chosen = {
        "instance_data_dir": images,
        "base_config": base / "base",
        "max_train_steps": 3,
        "gradient_checkpointing": True,
        "validation_prompt": "a dog",
        "num_validation_images": 1,
        "validation_inference_steps": 1,
    }
    file = base / "Q8_0.gguf"
    packed = run(pretrained_model_name_or_path=file, output_dir=tmp_path / "packed", **chosen)
    values = run(
        pretrained_model_name_or_path=base / "values.safetensors",
        output_dir=tmp_path / "values",
        **chosen,
    )
    streamed = run(
        pretrained_model_name_or_path=file,
        output_dir=tmp_path / "streamed",
        offload_base="blocks",
        **chosen,
    )
    assert_same_run(packed, streamed)
    losses = [[row["loss"] for row in learned(folder)] for folder in (packed, values)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert "| quantized base | transformer by gguf |" in (packed / "README.md").read_text()
    target = tmp_path / "fused"
    export(
        [
            *("--adapter", str(packed), "--format", "diffusers", "--base", str(base / "base")),
            *("--output", str(target)),
        ]
    )
    assert (target / "model_index.json").exists()


def test_files_that_cannot_be_read(base: Path, tmp_path: Path) -> None:
    content = (base / "Q4_0.gguf").read_bytes()
    for name, part in (("cut", content[:2000]), ("empty", b""), ("other", b"x" * 5000)):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(part)
        with pytest.raises(ConfigError, match="it is not a complete GGUF file"):
            find_base_family(BaseModelOptions(pretrained_model_name_or_path=str(path)))


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


#: Headers that promise more than there is: fields, values of an array, nested arrays, a long name.
ENDLESS = {
    "fields": struct.pack("<QQ", 0, 2**62),
    "values": struct.pack("<QQ", 0, 1) + text("a") + struct.pack("<IIQ", 9, 0, 2**40),
    "strings": struct.pack("<QQ", 0, 1) + text("a") + struct.pack("<IIQ", 9, 8, 3_000_000),
    "nested": struct.pack("<QQ", 0, 1) + text("a") + struct.pack("<I", 9) + b"\x09\0\0\0\1" * 999,
    "name": struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**63),
    "unknown": struct.pack("<QQ", 0, 1) + text("a") + struct.pack("<I", 77),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_headers_without_end_are_refused_at_once(name: str, tmp_path: Path) -> None:
    path = tmp_path / "endless.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + ENDLESS[name] + bytes(64))
    start = time.process_time()
    with pytest.raises(ValueError, match="it is not a complete GGUF file"):
        read_tensors(path)
    assert time.process_time() - start < 5


def test_formats_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "ternary.gguf"
    writer = gguf.GGUFWriter(path, arch="flux")
    stored = gguf.GGMLQuantizationType.TQ1_0
    writer.add_tensor("img_in.weight", np.zeros((2, 54), np.uint8), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"it has weights in TQ1_0, which cannot be read. The fo"):
        find_base_family(BaseModelOptions(pretrained_model_name_or_path=str(path)))
