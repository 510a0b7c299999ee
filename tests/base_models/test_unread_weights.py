"""A denoiser without its weights, which are read later: the same model as loaded whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gralora_diffusion.base_models.loading import load_base
from gralora_diffusion.base_models.options import BaseModelOptions
from gralora_diffusion.base_models.unread_weights import unread_model
from gralora_diffusion.families import ModelFamily, get_family
from gralora_diffusion.io.errors import AdapterFileError
from tests.models import PIPELINES, stable_diffusion

FAMILY = get_family("stable-diffusion")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def options(base: Path, **others: Any) -> BaseModelOptions:
    return BaseModelOptions(pretrained_model_name_or_path=str(base), **others)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    stable_diffusion().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", PIPELINES)
def test_every_family_reads_the_weights_of_its_base(
    name: str, dtype: torch.dtype, saved_base: Callable[[str], Path]
) -> None:
    family, chosen = get_family(name), options(saved_base(name))
    check_models(chosen, family, dtype, (family.denoiser, *family.all_text_encoders))


def check_models(
    chosen: BaseModelOptions, family: ModelFamily, dtype: torch.dtype, names: Sequence[str]
) -> None:
    """Compare models that are read later with those that are loaded whole."""
    expected = load_base(chosen, family, dtype)
    made = {name: unread_model(chosen, family, name, dtype) for name in names}
    models = {name: model for name, (model, _) in made.items()}
    pipe = load_base(chosen, family, dtype, models=models)
    for name, (model, weights) in made.items():
        whole = getattr(expected, name)
        assert all(parameter.isnan().all() for parameter in model.parameters())
        assert getattr(pipe, name) is model
        there, here = tensors(whole), tensors(model)
        assert here.keys() == there.keys()
        assert model.dtype == whole.dtype == dtype
        for key, tensor in there.items():
            read = here[key]
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            if isinstance(read, nn.Parameter):  # buffers have their values
                weights.read(key, read := torch.empty_like(tensor))
            assert torch.equal(read, tensor), key
        assert {key: module.training for key, module in model.named_modules()} == {
            key: module.training for key, module in whole.named_modules()
        }


def tensors(model: Any) -> dict[str, Tensor]:
    """Parameters and all buffers, also those that no file has."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def test_rows_of_a_weight(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = load_file(base / WEIGHTS)
    key = "down_blocks.0.resnets.0.conv1.weight"
    monkeypatch.setattr("gralora_diffusion.base_models.unread_weights._BUFFER", 40)
    _, weights = unread_model(options(base), FAMILY, "unet", torch.float32)
    part = torch.empty(3, *stored[key].shape[1:], dtype=torch.float64)
    weights.read(key.replace(".weight", ".base_layer.weight"), part, 2)
    assert torch.equal(part, stored[key][2:5].double())
    assert torch.equal(weights.first_values(key, 5, torch.float32), stored[key].flatten()[:5])
    weights.read(key, torch.empty(0, *stored[key].shape[1:]), len(stored[key]))  # no row is left


def test_a_file_that_shrinks(base: Path) -> None:
    model, weights = unread_model(options(base), FAMILY, "unet", torch.float32)
    (base / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes()[:-8])
    stored = [rows.tensor for places in weights.places.values() for rows in places]
    last = max(stored, key=lambda tensor: tensor.offset).key
    with pytest.raises(AdapterFileError, match=f"it ends within {last}"):
        weights.read(last, torch.empty(model.state_dict()[last].shape))


def test_shards_and_a_variant_that_only_others_have(tmp_path: Path) -> None:
    pipe = stable_diffusion()
    pipe.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    _, weights = unread_model(options(tmp_path, variant="fp16"), FAMILY, "unet", torch.float32)
    for key, tensor in pipe.unet.state_dict().items():
        read = torch.empty_like(tensor)
        weights.read(key, read)
        assert torch.equal(read, tensor)


def test_bases_that_are_loaded_whole(base: Path, tmp_path: Path) -> None:
    def why() -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared
            unread_model(options(base), FAMILY, "unet", torch.float32)
        return str(caught.value)

    stored, config = load_file(base / WEIGHTS), base / "unet" / "config.json"
    save_file({**stored, "more": torch.ones(1)}, base / WEIGHTS)
    assert "exactly the names" in why()
    save_file({key: stored[key] for key in sorted(stored)[1:]}, base / WEIGHTS)
    assert "exactly the names" in why()
    (base / WEIGHTS).write_bytes(b"broken")
    assert "safetensors" in why()
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**settings, "quantization_config": {}}), encoding="utf-8")
    assert "quantized" in why()
