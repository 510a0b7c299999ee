"""Files with random damage are read, or refused with the error that the reader documents."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gralora_diffusion import AdapterFileError, GraloraConfig
from gralora_diffusion.adapters.adapter_file import (
    Adapter,
    ComponentAdapter,
    read_adapter,
    save_adapter,
)
from gralora_diffusion.base_models.folder import PIPELINE_INDEX, read_pipeline_index, shards
from gralora_diffusion.io.tensor_files import read_header

#: Of an adapter file, whose config has many fields, and of an index.
MUTATIONS, INDEX_MUTATIONS = 1500, 300
#: What values of JSON are replaced by.
ODD = (None, True, -1, 0, 10**400, float("nan"), "", "(", "../x", "\0", "\ud800", [], [[]], {})


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Some bytes replaced, removed, doubled, or cut off."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed) or 1)
        what = chance.randrange(4)
        if what == 0:
            changed[at : at + 1] = chance.randbytes(1)
        elif what == 1:
            del changed[at : at + chance.randint(1, 8)]
        elif what == 2:
            changed[at:at] = changed[at : at + chance.randint(1, 8)]
        else:
            del changed[at + len(changed) // 2 :]
    return bytes(changed)


def replaced(value: object, chance: random.Random) -> object:
    """A copy of JSON in which one value, at whatever depth, is another."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        return {**value, key: replaced(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        at = chance.randrange(len(value))
        return [*value[:at], replaced(value[at], chance), *value[at + 1 :]]
    return chance.choice(ODD)


def count_refusals(path: Path, versions: list[bytes], read: Callable[[Path], object]) -> int:
    """How many versions of a file are refused; any other error ends the test."""
    refused = 0
    for version in versions:
        path.write_bytes(version)
        try:
            read(path)
        except AdapterFileError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
    return refused


def adapter_file(folder: Path) -> Path:
    config = GraloraConfig(
        r=4,
        gralora_k=2,
        alpha=8,
        target_modules=["to_q"],
        rank_pattern={"a": 8},
        layers_to_transform=[1],
        layers_pattern=["blocks"],
        modules_to_save=["norm"],
    )
    tensors = {"to_q.gralora_A": torch.ones(2, 4, 4), "to_q.gralora_B": torch.ones(2, 4, 4)}
    return save_adapter(
        Adapter({"unet": ComponentAdapter(config, tensors)}), folder / "a.safetensors"
    )


def with_header(data: bytes, chance: random.Random) -> bytes:
    """The file with one value of its header, or of the config in it, replaced."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if chance.random() < 0.7:
        said = header["__metadata__"]
        key = "gralora_adapter_metadata"
        said[key] = json.dumps(replaced(json.loads(said[key]), chance))
    else:
        header = replaced(header, chance)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


@pytest.mark.parametrize("read", [read_adapter, read_header])
@pytest.mark.parametrize("damage", [damaged, with_header])
def test_adapter_files(damage, read, tmp_path):
    path, chance = adapter_file(tmp_path), random.Random(0)
    data = path.read_bytes()
    read(path)
    versions = [damage(data, chance) for _ in range(MUTATIONS)]
    assert count_refusals(path, versions, read) > MUTATIONS // 10


INDEXES = {
    "diffusion_pytorch_model.safetensors.index.json": (
        {"metadata": {"total_size": 4}, "weight_map": {"a": "a.safetensors", "b": "a.safetensors"}},
        shards,
    ),
    PIPELINE_INDEX: (
        {"_class_name": "X", "unet": ["diffusers", "Y"], "text_encoder": [None, None]},
        lambda path: read_pipeline_index(path.parent),
    ),
}


@pytest.mark.parametrize("name", INDEXES)
def test_indexes(name, tmp_path):
    content, read = INDEXES[name]
    (tmp_path / "a.safetensors").write_bytes(b"")
    path, chance = tmp_path / name, random.Random(0)
    data = json.dumps(content).encode()
    path.write_bytes(data)
    read(path)
    versions = [damaged(data, chance) for _ in range(INDEX_MUTATIONS)]
    versions += [json.dumps(replaced(content, chance)).encode() for _ in range(INDEX_MUTATIONS)]
    assert count_refusals(path, versions, read) > INDEX_MUTATIONS // 10
