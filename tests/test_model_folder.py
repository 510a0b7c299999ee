"""Weight files against what diffusers and transformers write."""

import pytest

from gralora_diffusion import AdapterFileError
from gralora_diffusion.model_folder import read_json, shards, weight_files

from . import models

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
    with pytest.raises(AdapterFileError, match=f"names files that lack: {parts[0].name}"):
        weight_files(tmp_path / "many", variant)
    index.write_text("{")
    with pytest.raises(AdapterFileError, match="not readable as JSON"):
        weight_files(tmp_path / "many", variant)


def test_what_is_no_object_of_json(tmp_path):
    (tmp_path / "a.json").write_text("[1, 2]")
    with pytest.raises(AdapterFileError, match=r"a\.json: not readable as JSON"):
        read_json(tmp_path / "a.json")
