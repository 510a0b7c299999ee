"""Fused files against pipelines that were fused in memory, written by independent writers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gralora_diffusion import get_family
from gralora_diffusion.export import export_fused

from ..models import PIPELINES, adapt_everywhere, merged
from ..originals import ORIGINALS, transformer_alone, write
from ..tiny.parts import text_encoder_with_projection


def tiny(name: str) -> Any:
    """A tiny pipeline that has what its original file holds."""
    pipe = PIPELINES[name]()
    if name == "stable-diffusion-3":
        torch.manual_seed(0)
        pipe.text_encoder = text_encoder_with_projection(32, 32)
        pipe.text_encoder.text_projection.weight.data.copy_(torch.eye(32))
    return pipe


def held(name: str) -> list[str]:
    """Components that may have an adapter and are in the original file."""
    family = get_family(name)
    return [c for c in family.components if c in family.original_layouts]


@pytest.fixture(scope="module", params=list(PIPELINES))
def case(request, tmp_path_factory):
    """Family, base pipeline, adapter on all that the file holds, all tensors fused."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    adapt_everywhere(tiny(name), held(name)).save_gralora_weights(folder / "adapter")
    tiny(name).save_pretrained(folder / "base")
    return name, folder, ORIGINALS[name](merged([(folder / "adapter", 1.0)], tiny(name)))


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.allclose(found[key], tensor, rtol=1e-6, atol=1e-7), key


def test_from_an_original_file(case, tmp_path):
    name, folder, expected = case
    base = write(ORIGINALS[name](tiny(name)), tmp_path / "base.safetensors")
    before = base.read_bytes()
    report = export_fused(folder / "adapter", base, tmp_path / "fused.safetensors")
    assert set(report.layers) == set(held(name))
    found, original = load_file(tmp_path / "fused.safetensors"), load_file(base)
    assert set(found) == set(original)
    agree(found, expected)
    assert base.read_bytes() == before
    changed = {key for key in found if not torch.equal(found[key], original[key])}
    assert changed == {key for key in expected if not torch.equal(expected[key], original[key])}


def test_from_a_diffusers_folder(case, tmp_path):
    name, folder, expected = case
    export_fused(folder / "adapter", folder / "base", tmp_path / "fused.safetensors")
    found = load_file(tmp_path / "fused.safetensors")
    if name.startswith("flux2"):  # written with bare keys
        expected = transformer_alone(expected)
    extra = {key for key in expected if key not in found}
    assert all(key.endswith((".position_ids", "logit_scale", "betas", "decay")) for key in extra)
    agree(found, {key: tensor for key, tensor in expected.items() if key in found})
    more = set(found) - set(expected)
    assert all(key.endswith("clip_l.transformer.text_projection.weight") for key in more)


def test_the_denoiser_alone(case, tmp_path):
    name, folder, expected = case
    denoiser = get_family(name).denoiser
    adapt_everywhere(tiny(name), [denoiser]).save_gralora_weights(tmp_path / "adapter")
    expected = transformer_alone(ORIGINALS[name](merged([(tmp_path / "adapter", 1.0)], tiny(name))))
    base = write(ORIGINALS[name](tiny(name)), tmp_path / "base.safetensors")
    alone = write(transformer_alone(ORIGINALS[name](tiny(name))), tmp_path / "alone.safetensors")
    for number, source in enumerate((folder / "base", base, alone)):
        output = tmp_path / f"{number}.safetensors"
        export_fused(tmp_path / "adapter", source, output, denoiser_only=source != alone)
        found = load_file(output)
        assert set(found) == set(expected)
        agree(found, expected)


def test_a_diffusers_folder(case, tmp_path):
    name, folder, _ = case
    components = list(get_family(name).components)
    adapt_everywhere(tiny(name)).save_gralora_weights(tmp_path / "adapter")
    export_fused(tmp_path / "adapter", folder / "base", tmp_path / "fused", format="diffusers")
    found = type(tiny(name)).from_pretrained(tmp_path / "fused")
    expected = merged([(tmp_path / "adapter", 1.0)], tiny(name))
    for component in (*components, "vae"):
        agree(getattr(found, component).state_dict(), getattr(expected, component).state_dict())
    names = {str(p.relative_to(folder / "base")) for p in (folder / "base").rglob("*")}
    assert names == {
        str(p.relative_to(tmp_path / "fused")) for p in (tmp_path / "fused").rglob("*")
    }
