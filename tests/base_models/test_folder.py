"""Weight files against what diffusers and transformers write."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from gralora_diffusion import AdapterFileError
from gralora_diffusion.base_models.folder import (
    check_weight_files,
    read_json,
    read_pipeline_index,
    shards,
    weight_files,
)
from gralora_diffusion.io.file_names import PIPELINE_INDEX
from tests import models

MODELS = {"unet": models.unet, "text_encoder": models.text_encoder}


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_one_file_or_shards_and_their_index(name, variant, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "one", variant=variant)
    written = set((tmp_path / "one").glob("*.safetensors"))
    assert len(written) == 1
    assert weight_files(tmp_path / "one", variant) == list(written)
    assert weight_files(tmp_path / "one", "fp32") == []

    model.save_pretrained(tmp_path / "many", variant=variant, max_shard_size="60KB")
    *parts, index = weight_files(tmp_path / "many", variant)
    assert len(parts) > 1
    assert parts == sorted((tmp_path / "many").glob("*.safetensors")) == shards(index)
    assert index.suffix == ".json"
    parts[0].unlink()
    with pytest.raises(AdapterFileError, match=f"names files that are missing: {parts[0].name}"):
        weight_files(tmp_path / "many", variant)
    index.write_text("{")
    with pytest.raises(AdapterFileError, match="cannot be read as JSON"):
        weight_files(tmp_path / "many", variant)


def test_what_is_no_object_of_json(tmp_path):
    (tmp_path / "a.json").write_text("[1, 2]")
    with pytest.raises(AdapterFileError, match=r"a\.json cannot be read as JSON"):
        read_json(tmp_path / "a.json")


INDEX = "diffusion_pytorch_model.safetensors.index.json"


def index_of(folder, *names):
    folder.mkdir(exist_ok=True)
    weight_map = {f"layer{i}.weight": name for i, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / INDEX


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/secret.safetensors",
        "sub/a.safetensors",
        "..\\a.safetensors",
        "C:a.safetensors",
        "a.bin",
        "..",
        "",
        "a\0.safetensors",
        "a\x1b.safetensors",
    ],
)
def test_an_index_names_safetensors_files_beside_it_alone(name, tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(b"")
    index = index_of(tmp_path / "unet", "good.safetensors", name)
    (index.parent / "good.safetensors").write_bytes(b"")
    with pytest.raises(AdapterFileError, match=r"Only \.safetensors files in the folder") as caught:
        weight_files(index.parent)
    assert f"it names {name!r}. Only" in str(caught.value)


def test_links_lead_to_where_the_index_leads(tmp_path):
    """As in the Hub's cache, where all files of a snapshot are links."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    index = index_of(blobs, "a.safetensors")
    save_file({"layer0.weight": torch.ones(1)}, blobs / "123")
    (snapshot / INDEX).symlink_to(index)
    (snapshot / "a.safetensors").symlink_to(blobs / "123")
    assert weight_files(snapshot) == [snapshot / "a.safetensors", snapshot / INDEX]

    own = index_of(tmp_path / "own", "a.safetensors")
    (own.parent / "a.safetensors").symlink_to(blobs / "123")
    with pytest.raises(AdapterFileError, match=r"it names 'a\.safetensors'\. Only"):
        weight_files(own.parent)


def test_a_shard_lacks_what_the_index_says_of_it(tmp_path):
    index = index_of(tmp_path, "a.safetensors", "b.safetensors")
    save_file({"layer0.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    save_file({"layer1.weight": torch.ones(1)}, tmp_path / "b.safetensors")
    assert len(shards(index)) == 2
    save_file({"layer0.weight": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(
        AdapterFileError, match=r"files that it names do not contain layer1\.weight\."
    ):
        shards(index)
    (tmp_path / "b.safetensors").write_bytes(b"")
    with pytest.raises(AdapterFileError, match=r"b\.safetensors: .*an empty file"):
        shards(index)


def test_a_shard_that_is_no_file(tmp_path):
    index = index_of(tmp_path, "a.safetensors")
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"missing: a\.safetensors"):
        shards(index)


@pytest.mark.parametrize("weight_map", [None, {}, [], "a", 3, {"a": 3}, {"a": ["b"]}, {"a": None}])
def test_an_index_that_names_no_files(weight_map, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(AdapterFileError, match=rf"{INDEX}: its weight_map must map"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["../unet", "/etc", "a\\b", "unet/..", "", "a b"])
def test_components_of_a_pipeline_are_no_paths(name, tmp_path):
    good = {"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / PIPELINE_INDEX).write_text(json.dumps(good))
    assert read_pipeline_index(tmp_path) == good
    (tmp_path / PIPELINE_INDEX).write_text(json.dumps({**good, name: ["diffusers", "X"]}))
    with pytest.raises(
        AdapterFileError, match=r"model_index\.json: .* cannot be the name"
    ) as error:
        read_pipeline_index(tmp_path)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"num_layers": 10**9}, "its num_layers is 1000000000"),
        ({"layers_per_block": [2, -1]}, "its layers_per_block is -1"),
        ({"text_config": {"num_hidden_layers": 1001}}, "its num_hidden_layers is 1001"),
        ({"num_hidden_layers": 1000, "down_block_types": ["A"], "sample_size": 10**9}, None),
    ],
)
def test_impossible_numbers_of_layers(config, problem, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    if problem is None:
        check_weight_files(tmp_path)
        return
    with pytest.raises(AdapterFileError, match=f"{problem}; it must be from 0 to 1000"):
        check_weight_files(tmp_path)
