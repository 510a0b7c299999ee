"""What exported files say of themselves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from gralora_diffusion import GraloraConfig, get_family
from gralora_diffusion.adapters.adapter_file import (
    Adapter,
    ComponentAdapter,
    read_adapter,
    save_adapter,
)
from gralora_diffusion.export.metadata import adapter_hash, export_metadata
from gralora_diffusion.io.tensor_files import HASH_FIELDS

#: As the trainer writes them; see tests/training/test_metadata.py.
TRAINED = {
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.architecture": "stable-diffusion-v2-768-v/gralora",
    "modelspec.implementation": "gralora-diffusion",
    "modelspec.title": "rex",
    "modelspec.trigger_phrase": "a sks dog",
    "modelspec.resolution": "768x768",
    "modelspec.date": "2026-01-02T03:04:05Z",
    "modelspec.prediction_type": "v",
    "modelspec.hash_sha256": "0x" + "1" * 64,
    "ss_base_model_version": "sd_v2_v",
    "ss_v2": "True",
    "ss_network_module": "gralora_diffusion",
    "ss_network_dim": "4",
    "ss_network_alpha": "6",
    "ss_network_args": '{"algo": "gralora"}',
    "ss_network_dropout": "0.1",
    "ss_tag_frequency": '{"rex": {"a sks dog": 3}}',
    "sshs_model_hash": "1" * 64,
    "sshs_legacy_hash": "1" * 8,
    "lora_adapter_metadata": '{"unet.r": 3}',
    "_quantization_metadata": '{"layers": {}}',
    "mine": "kept",
}
FAMILY = get_family("stable-diffusion")
SOURCE = {
    "components": {"unet": {"r": 4, "gralora_k": 2, "alpha": 6, "hybrid_r": 1}},
    "scale": 0.5,
}


def adapter(metadata: dict[str, str] | None = None, **changes) -> Adapter:
    torch.manual_seed(0)
    values = {"r": 4, "gralora_k": 2, "alpha": 6, "hybrid_r": 1, "target_modules": ["q"], **changes}
    tensors = {"b.q.gralora_A": torch.randn(2, 3, 4), "b.q.gralora_B": torch.randn(2, 4, 5)}
    part = ComponentAdapter(GraloraConfig(**values), tensors)
    return Adapter({"unet": part}, "stable-diffusion", TRAINED if metadata is None else metadata)


def source_of(fields: dict[str, str]) -> dict[str, object]:
    assert {key: fields.pop(key) for key in HASH_FIELDS} == HASH_FIELDS
    return json.loads(fields.pop("gralora_source"))


def test_lora():
    made = export_metadata(
        adapter(),
        kind="lora",
        family=FAMILY,
        ranks={"a": 9, "b": 9},
        alpha=9,
        scale=0.5,
        license="MIT",
    )
    source = source_of(made)
    assert source.pop("adapter") == {
        "family": "stable-diffusion",
        "hash_sha256": adapter_hash(adapter()),
    }
    assert source == SOURCE
    changed = {
        "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.license": "MIT",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "9",
        "ss_network_alpha": "9.0",
        "ss_network_args": "{}",
    }
    of_its_tensors = ("lora_adapter_metadata", "_quantization_metadata", *HASH_FIELDS)
    assert made == {k: v for k, v in TRAINED.items() if k not in of_its_tensors} | changed


def test_lora_of_several_ranks_in_the_names_of_diffusers():
    made = export_metadata(
        adapter(),
        kind="lora",
        family=FAMILY,
        ranks={"unet.a.b": 9, "unet.c": 8, "unet.d": 9, "text_encoder.text_model.q": 3},
        alpha=9,
        original_names=False,
        title="other",
    )
    assert made["ss_network_dim"] == "Dynamic"
    assert made["ss_network_alpha"] == "9.0"
    assert json.loads(made["lora_adapter_metadata"]) == {
        "unet.r": 9,
        "unet.lora_alpha": 9,
        "unet.rank_pattern": {"^c": 8},
        "unet.alpha_pattern": {"^c": 8},
        "unet.target_modules": ["a.b", "c", "d"],
        "text_encoder.r": 3,
        "text_encoder.lora_alpha": 3,
        "text_encoder.rank_pattern": {},
        "text_encoder.alpha_pattern": {},
        "text_encoder.target_modules": ["q"],
    }
    assert made["modelspec.implementation"] == "diffusers"
    assert made["modelspec.title"] == "other"


def test_diff():
    made = export_metadata(adapter(), kind="diff", family=FAMILY)
    assert made["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    network = {key: value for key, value in made.items() if key.startswith("ss_network_")}
    assert network == {
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": '{"algo": "full"}',
        "ss_network_dropout": "0.1",
    }


BASE = {
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-v2-inpainting",
    "modelspec.implementation": "sgm",
    "modelspec.title": "A base",
    "modelspec.license": "CreativeML Open RAIL-M",
    "modelspec.author": "somebody else",
    "modelspec.description": "of the base",
    "modelspec.thumbnail": "data:image/jpeg;base64,xx",
    "modelspec.date": "2022-01-01",
    "modelspec.hash_sha256": "0x" + "2" * 64,
    "modelspec.hash_md5": "0x22",
    "modelspec.resolution": "512x512",
    "modelspec.encoder_layer": "2",
    "prompt": "{}",
    "workflow": "{}",
}


def test_checkpoint():
    """The base says how to compute with it and its terms; what is of its own past goes."""
    made = export_metadata(
        adapter(), kind="checkpoint", family=FAMILY, base_metadata=BASE, base_name="x", title="new"
    )
    source_of(made)
    assert made == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v2-inpainting",
        "modelspec.implementation": "sgm",
        "modelspec.title": "new",
        "modelspec.merged_from": "A base, rex",
        "modelspec.license": "CreativeML Open RAIL-M",
        "modelspec.trigger_phrase": "a sks dog",
        "modelspec.resolution": "512x512",
        "modelspec.encoder_layer": "2",
        "modelspec.date": "2026-01-02T03:04:05Z",
        "modelspec.prediction_type": "v",
        "ss_base_model_version": "sd_v2_v",
        "ss_v2": "True",
        "ss_tag_frequency": '{"rex": {"a sks dog": 3}}',
        "mine": "kept",
    }


def test_checkpoint_of_a_base_that_says_nothing():
    made = export_metadata(
        adapter(), kind="checkpoint", family=FAMILY, base_name="base.safetensors"
    )
    assert made["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    assert made["modelspec.merged_from"] == "base.safetensors, rex"
    assert made["modelspec.title"] == "rex"


def test_an_adapter_of_some_timesteps_does_not_limit_its_base():
    field = "modelspec.timestep_range"
    some = adapter()
    some.metadata[field] = "200,999"
    base = {"modelspec.timestep_range": "0,499"}
    assert field not in export_metadata(some, kind="checkpoint", family=FAMILY)
    made = export_metadata(some, kind="checkpoint", family=FAMILY, base_metadata=base)
    assert made[field] == "0,499"
    assert export_metadata(some, kind="lora", family=FAMILY)[field] == "200,999"


def test_an_adapter_that_says_nothing_is_called_as_its_family_or_base():
    bare = adapter({}, rank_pattern={"q": 8})
    options = {"kind": "lora", "family": FAMILY, "ranks": {"a": 9}, "alpha": 9}
    made = export_metadata(bare, **options, made={"energy": 0.9})
    source = source_of(made)
    assert source["energy"] == 0.9
    assert source["components"]["unet"]["rank_pattern"] == {"q": 8}
    assert made == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "GraLoRA for stable-diffusion-v1",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "9",
        "ss_network_alpha": "9.0",
        "ss_network_args": "{}",
    }
    names = FAMILY.published_names({"cross_attention_dim": 1024})
    made = export_metadata(bare, **options, names=names)
    assert made["modelspec.architecture"] == "stable-diffusion-v2-512/lora"
    assert made["ss_v2"] == "True"


def test_the_note_of_origin_names_the_native_file(tmp_path: Path):
    path = save_adapter(adapter(), tmp_path / "rex.safetensors")
    content = path.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    assert adapter_hash(read_adapter(path)) == "0x" + hashlib.sha256(tensors).hexdigest()
    assert read_adapter(path).metadata["modelspec.hash_sha256"] == adapter_hash(adapter())


def test_fields_that_are_none():
    with pytest.raises(
        ValueError, match=r"unknown metadata fields: colour\. Choose from title, author"
    ):
        export_metadata(adapter(), kind="lora", family=FAMILY, colour="red")
