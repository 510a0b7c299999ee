"""What ``--verify`` draws with: the base in its dtype, the adapter where it belongs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from gralora_diffusion.adapters.adapter_file import Adapter, read_adapter
from gralora_diffusion.export import export_fused, verification
from gralora_diffusion.export.verification import Verification
from tests.models import adapt_everywhere, stable_diffusion
from tests.originals import ORIGINALS, write


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there was one: all is as on one but for the last step, to the device."""

    def place(pipe: Any, device: torch.device) -> None:
        assert device.type == "cuda"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(verification, "place", place)


def opened_pipeline(base: Path, **options: Any) -> Any:
    check = Verification(Adapter({}), base, base / "never written", **options)
    return check._pipeline(verification.open_base(base))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("on_a_gpu")
def test_a_base_computes_in_its_own_dtype(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    diffusers.utils.logging.enable_propagation()
    stable_diffusion().save_pretrained(tmp_path / "fp32")
    pipe = stable_diffusion().to(dtype)
    pipe.save_pretrained(tmp_path / "folder")
    tensors = ORIGINALS["stable-diffusion"](pipe)
    file = write(tensors, tmp_path / "file.safetensors")
    caplog.clear()
    for loaded in (
        opened_pipeline(tmp_path / "folder"),
        opened_pipeline(file, base_config=str(tmp_path / "fp32")),
    ):
        assert loaded.unet.dtype == loaded.text_encoder.dtype == dtype
        expected = pipe.unet.state_dict()
        assert all(torch.equal(t, expected[k]) for k, t in loaded.unet.state_dict().items())
    assert "is not a `torch.dtype`" not in caplog.text


@pytest.mark.usefixtures("on_a_gpu")
def test_a_base_stored_in_fp8_computes_in_bf16(tmp_path: Path) -> None:
    stable_diffusion().save_pretrained(tmp_path / "config")
    whole = write(ORIGINALS["stable-diffusion"](stable_diffusion()), tmp_path / "whole.safetensors")
    tensors = {
        key: t.to(torch.float8_e4m3fn) if key.startswith("model.") and t.dim() > 1 else t
        for key, t in load_file(whole).items()
    }
    save_file(tensors, tmp_path / "fp8.safetensors")
    pipe = opened_pipeline(tmp_path / "fp8.safetensors", base_config=str(tmp_path / "config"))
    assert pipe.unet.dtype == torch.bfloat16


def test_on_a_cpu_it_computes_in_fp32(tmp_path: Path) -> None:
    stable_diffusion().to(torch.bfloat16).save_pretrained(tmp_path)
    assert opened_pipeline(tmp_path).unet.dtype == torch.float32


def test_a_lone_peft_folder_is_of_the_component_that_it_is_named_after(tmp_path: Path) -> None:
    """The name is the only evidence of the component; without it, the denoiser is assumed."""
    stable_diffusion().save_pretrained(tmp_path / "base")
    pipe = adapt_everywhere(stable_diffusion(), ["text_encoder"])
    pipe.save_gralora_weights(tmp_path / "adapter", peft_format=True)
    adapter = read_adapter(tmp_path / "adapter" / "text_encoder")
    output = tmp_path / "fused.safetensors"
    check = Verification(adapter, tmp_path / "base", output, steps=2, size=32)
    export_fused(adapter, tmp_path / "base", output, verify=check.check_fused)
    told = json.loads((tmp_path / "fused.safetensors.parity.json").read_text())
    assert {"fused weights", "LoRA by load_lora_weights"} == set(told["ways"])
    assert all(way["relative"] < 1e-4 for way in told["ways"].values())
