"""Readers of bases: folders, single files, the Hub's cache, tokenizers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch

from gralora_diffusion.adapters.adapter_file import read_adapter
from gralora_diffusion.base_models.folder import (
    WEIGHT_NAMES,
    read_pipeline_index,
    weight_files,
)
from gralora_diffusion.base_models.gguf_file import read_tensors
from gralora_diffusion.base_models.loading import find_base_family, load_base
from gralora_diffusion.base_models.meta_base import empty_base
from gralora_diffusion.base_models.pipeline_index import PipelineIndex
from gralora_diffusion.base_models.single_file_header import OriginalFile, OriginalFileError
from gralora_diffusion.export.bases import BaseError, open_base
from gralora_diffusion.io.errors import AdapterFileError, ConfigError
from gralora_diffusion.io.file_names import WEIGHTS_NAME
from gralora_diffusion.lora_import.base import LoraBase
from gralora_diffusion.lora_import.files import read_file
from gralora_diffusion.pipelines import sample_command
from gralora_diffusion.training.checks.base import resolve_defaults
from gralora_diffusion.training.data.truncation import truncated_prompts
from tests import models, originals
from tests.tiny import PIPELINES

from .adapters import make_adapters, make_loras
from .reader import FAMILY, SD, Reader, sample_folder, save_tensors, training_config


@cache
def _base() -> str:
    """An undamaged pipeline, for all cases of a process."""
    folder = tempfile.mkdtemp()
    models.stable_diffusion().save_pretrained(folder)
    return folder


def _no_weights(folder: Path) -> None:
    models.stable_diffusion().save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()


def make_single(folder: Path) -> None:
    save_tensors(
        originals.ORIGINALS[SD](models.stable_diffusion()), sample_folder(folder, "single")
    )


def _make_gguf(folder: Path) -> None:
    writer = gguf.GGUFWriter(sample_folder(folder, "file") / "file.gguf", arch="flux")
    writer.add_array("names", ["a", "b"])
    writer.add_array("sizes", [1, 2, 3])
    writer.add_tensor("plain", np.ones((2, 3), dtype=np.float32))
    stored = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quants.quantize(np.ones((2, 32), dtype=np.float32), stored)
    writer.add_tensor("packed", packed, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _load_single(folder: Path) -> None:
    file = str(folder / "file.safetensors")
    config = training_config(pretrained_model_name_or_path=file, base_config=_base())
    load_base(config, find_base_family(config), torch.float32)


def make_model(folder: Path) -> None:
    """A pipeline whose denoiser is in two files."""
    part = sample_folder(folder, "pipeline")
    models.stable_diffusion().save_pretrained(part)
    models.stable_diffusion().unet.save_pretrained(part / "unet", max_shard_size="200KB")
    (part / "unet" / WEIGHT_NAMES[0][0]).unlink(missing_ok=True)


def _make_pipeline(folder: Path) -> None:
    _no_weights(sample_folder(folder, "pipeline"))


def _open_folder(folder: Path) -> None:
    base = open_base(folder)
    for component, files in base.files.items():
        assert weight_files(folder / component) == files
    assert base.canonical_shapes("unet")
    assert base.denoiser_dtype


def _read_index(folder: Path) -> None:
    assert isinstance(read_pipeline_index(folder), dict)


def _find_family(folder: Path) -> None:
    index = PipelineIndex("pretrained_model_name_or_path", str(folder), None)
    for component in ("unet", "vae", "text_encoder"):
        index.has_weights(component)
        assert component not in index or len(index.components[component]) == 2
    find_base_family(training_config(pretrained_model_name_or_path=str(folder)))


def _plan(folder: Path) -> None:
    config = training_config(pretrained_model_name_or_path=str(folder))
    pipe = empty_base(config, FAMILY, torch.float32)
    resolve_defaults(config, FAMILY, pipe, "no")


def _check_lora(folder: Path) -> None:
    pair = torch.ones(2, 32), torch.ones(32, 2)
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    LoraBase(str(folder)).check({"unet": {path: pair}}, "lora")


def _load(folder: Path) -> None:
    config = training_config(pretrained_model_name_or_path=str(folder))
    load_base(config, FAMILY, torch.float32)


def _sample(folder: Path) -> None:
    parser = sample_command.parser()
    line = ["--base", str(folder), "--prompt", "x", "--output", "x.png"]
    sample_command.open_pipeline(parser.parse_args(line), parser)


# -- the Hub's cache -------------------------------------------------------------------------------

_REPOSITORY, _COMMIT = "some/name", "0123456789abcdef" * 2 + "01234567"


def _move_into_cache(source: Path, cache_folder: Path) -> None:
    """Arrange a folder's files as the Hub's client does: a snapshot of links to blobs."""
    repository = cache_folder / f"models--{_REPOSITORY.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / _COMMIT, repository / "blobs"
    blobs.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(_COMMIT)
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        file.rename(blob)
    shutil.rmtree(source)


def _in_cache(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """The samples of another reader, each in a cache of its own."""

    def make_cached(folder: Path) -> None:
        make(sample_folder(folder, "..made"))
        for made in sorted((folder / "..made").iterdir()):
            _move_into_cache(made, sample_folder(folder, made.name))
        (folder / "..made").rmdir()

    return make_cached


def _make_adapters(folder: Path) -> None:
    make_adapters(folder)
    (folder / "native/file.safetensors").rename(folder / "native" / WEIGHTS_NAME)


def _load_cached(folder: Path) -> None:
    config = training_config(pretrained_model_name_or_path=_REPOSITORY, cache_dir=str(folder))
    load_base(config, find_base_family(config), torch.float32)


def _plan_cached(folder: Path) -> None:
    config = training_config(pretrained_model_name_or_path=_REPOSITORY, cache_dir=str(folder))
    empty_base(config, find_base_family(config), torch.float32)


def _snapshot(folder: Path) -> Path:
    return folder / f"models--{_REPOSITORY.replace('/', '--')}" / "snapshots" / _COMMIT


# -- tokenizers ------------------------------------------------------------------------------------


def _make_tokenizers(folder: Path) -> None:
    """Pipelines whose tokenizers are copies, and whose other folders are links to whole ones."""
    for family in ("stable-diffusion", "stable-diffusion-3", "flux2", "flux2-klein"):
        whole = Path(tempfile.mkdtemp())
        PIPELINES[family]().save_pretrained(whole)
        sample = sample_folder(folder, family)
        for part in sorted(whole.iterdir()):
            if part.name.startswith("tokenizer"):
                shutil.copytree(part, sample / part.name)
            else:
                (sample / part.name).symlink_to(part)
    _as_before_fast_tokenizers(folder / "stable-diffusion", folder / "vocabulary")


def _as_before_fast_tokenizers(source: Path, folder: Path) -> None:
    """The same with the files of bases from the time of Stable Diffusion 1.5."""
    shutil.copytree(source, folder, symlinks=True)
    tokenizer = folder / "tokenizer"
    described = json.loads((tokenizer / "tokenizer.json").read_text())
    (tokenizer / "tokenizer.json").unlink()
    (tokenizer / "vocab.json").write_text(json.dumps(described["model"]["vocab"]))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    end = {"content": "<|endoftext|>", **token}
    tokens = {"bos_token": {**end, "content": "<|startoftext|>"}, "eos_token": end}
    tokens |= {"unk_token": end, "pad_token": "<|endoftext|>"}
    (tokenizer / "special_tokens_map.json").write_text(json.dumps(tokens))


def _encode(folder: Path) -> None:
    config = training_config(pretrained_model_name_or_path=str(folder))
    family = find_base_family(config)
    pipe = load_base(config, family, torch.float32)
    truncated_prompts(pipe, family, config, [])
    with torch.no_grad():
        family.encode_prompts(pipe, ["a dog", ""], **config.encoding)


_FOLDER_ERRORS = (AdapterFileError, BaseError)
BASES: dict[str, Reader] = {
    "original_file": Reader(
        make_single,
        lambda f: OriginalFile(f / "file.safetensors").find_family(),
        (OriginalFileError,),
    ),
    "fused_file": Reader(
        make_single, lambda f: open_base(f / "file.safetensors"), (OriginalFileError, BaseError)
    ),
    "gguf": Reader(_make_gguf, lambda f: read_tensors(f / "file.gguf"), (OSError, ValueError)),
    "single_file": Reader(make_single, _load_single, (ConfigError,), slow=True),
    "fused_folder": Reader(make_model, _open_folder, _FOLDER_ERRORS),
    "pipeline_index": Reader(_make_pipeline, _read_index, (AdapterFileError,)),
    "base_family": Reader(_make_pipeline, _find_family, (ConfigError,)),
    "base_plan": Reader(_make_pipeline, _plan, (ConfigError,), slow=True),
    "base": Reader(make_model, _load, (ConfigError,), slow=True),
    "lora_base": Reader(_make_pipeline, _check_lora, (ValueError,)),
    "sample": Reader(make_model, _sample, (SystemExit,), slow=True),
    "hub_base": Reader(_in_cache(make_model), _load_cached, (ConfigError,), slow=True),
    "hub_plan": Reader(_in_cache(_make_pipeline), _plan_cached, (ConfigError,), slow=True),
    "hub_fused": Reader(
        _in_cache(make_model), lambda f: _open_folder(_snapshot(f)), _FOLDER_ERRORS
    ),
    "hub_adapter": Reader(
        _in_cache(_make_adapters),
        lambda f: read_adapter(_REPOSITORY, cache_dir=str(f)),
        (AdapterFileError,),
    ),
    "hub_lora": Reader(
        _in_cache(make_loras),
        lambda f: read_file(_REPOSITORY, FAMILY, hub_options={"cache_dir": str(f)}),
        (AdapterFileError,),
    ),
    "tokenizers": Reader(_make_tokenizers, _encode, (ConfigError,), slow=True),
}
