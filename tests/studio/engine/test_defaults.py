"""The values for empty fields against those that a run resolves."""

from __future__ import annotations

import json
import shutil

import pytest

from gralora_diffusion.base_models.loading import find_base_family
from gralora_diffusion.base_models.meta_base import empty_base
from gralora_diffusion.io.dtypes import torch_dtype
from gralora_diffusion.studio.engine.defaults import base_defaults, decided_by_base
from gralora_diffusion.training.checks.base import resolve_defaults
from gralora_diffusion.training.config.training_config import TrainingConfig
from tests import ROOT

BASE = ROOT / "samples/tiny-base"


def config(**given):
    return TrainingConfig(**({"pretrained_model_name_or_path": str(BASE)} | given))


@pytest.mark.parametrize(
    "given", [{}, {"optimizer": "prodigy"}, {"learning_rate": 3e-4, "resolution": 32}]
)
def test_they_are_those_of_a_run(given):
    options = config(**given)
    family = find_base_family(options)
    resolved = resolve_defaults(
        options, family, empty_base(options, family, torch_dtype("fp32")), "no"
    )
    wanted = {name: getattr(resolved, name) for name in decided_by_base()}
    empty = [name for name in wanted if getattr(options, name) is None]
    assert base_defaults(options) == {
        name: str(wanted[name]) for name in empty if wanted[name] is not None
    }
    assert "adam_weight_decay" in empty


def test_families(tmp_path):
    for index in ({"_class_name": "FluxPipeline"}, {"_class_name": "OtherPipeline"}, []):
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        found = base_defaults(config(pretrained_model_name_or_path=str(tmp_path)))
        assert found.get("guidance_scale") == ("3.5" if "FluxPipeline" in str(index) else None)
        assert "resolution" not in found  # its denoiser has no config
    by_name = config(pretrained_model_name_or_path="no/such", family="stable-diffusion-3")
    assert base_defaults(by_name)["weighting_scheme"] == "logit_normal"
    for nothing in ("", "no/such", "no/such/base", "\0", str(BASE / "README.md")):
        assert base_defaults(config(pretrained_model_name_or_path=nothing)) == {}


def test_a_single_file(tmp_path):
    shutil.copy(BASE / "model_index.json", tmp_path / "other.safetensors")
    damaged = config(pretrained_model_name_or_path=str(tmp_path / "other.safetensors"))
    assert base_defaults(damaged) == {}
