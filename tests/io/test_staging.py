"""Outputs appear whole or not at all; a killed or refused export harms nothing."""

from __future__ import annotations

import multiprocessing
import random
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file

from gralora_diffusion import cli
from gralora_diffusion.export import export_fused
from gralora_diffusion.export.rounding import RoundingError
from gralora_diffusion.io.staging import OutputError, check_output, find_overlap, staged
from tests.models import PIPELINES, adapt_everywhere
from tests.originals import ORIGINALS, transformer_alone, write

if sys.platform == "linux":
    import resource


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def folder_of(path, *files: str):
    path.mkdir()
    for name in files:
        (path / name).write_text(f"{path.name} {name}")
    return path


def test_a_file_appears_whole(tmp_path):
    output = tmp_path / "deep" / "out.safetensors"
    with staged(output) as path:
        assert path.name == output.name
        path.write_text("half")
        assert not output.exists()
        path.write_text("whole")
    assert output.read_text() == "whole"
    assert names(output.parent) == {output.name}


def test_a_folder_takes_the_place_of_another(tmp_path):
    output = folder_of(tmp_path / "out", "model_index.json", "old")
    with staged(output) as path:
        folder_of(path, "model_index.json", "new")
        assert names(output) == {"model_index.json", "old"}
    assert names(output) == {"model_index.json", "new"}
    assert names(tmp_path) == {"out"}


def write_half(output, made: str | None) -> None:
    with staged(output) as path:
        if made == "file":
            path.write_text("half")
        elif made == "folder":
            folder_of(path, "half")
        raise KeyboardInterrupt


@pytest.mark.parametrize("made", [None, "file", "folder"])
def test_what_was_there_stays_when_something_goes_wrong(made, tmp_path):
    folder = folder_of(tmp_path / "folder", "model_index.json")
    file = tmp_path / "file"
    file.write_text("precious")
    for output in (folder, file, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            write_half(output, made)
    assert names(tmp_path) == {"folder", "file"}
    assert names(folder) == {"model_index.json"}
    assert file.read_text() == "precious"


def test_a_folder_that_was_not_written_does_not_remove_the_old_one(tmp_path):
    output = folder_of(tmp_path / "out", "model_index.json")
    with pytest.raises(FileNotFoundError), staged(output):
        pass
    assert names(tmp_path) == {"out"}
    assert names(output) == {"model_index.json"}


def test_outputs_that_are_refused(tmp_path):
    base, other = folder_of(tmp_path / "base", "model_index.json"), folder_of(tmp_path / "other")
    file = tmp_path / "file"
    file.write_text("base")
    link = tmp_path / "link"
    link.symlink_to(file)
    for output in (base, base / "unet", base / "a" / "b", tmp_path):
        with pytest.raises(OutputError, match="which is read"):
            check_output(output, True, [base])
    for output in (file, link, tmp_path / "other" / ".." / "file"):
        with pytest.raises(OutputError, match="which is read"):
            check_output(output, True, [file])
    with pytest.raises(OutputError, match="exists already"):
        check_output(file, False, [base])
    with pytest.raises(OutputError, match="is a folder without a pipeline, so it is not replaced"):
        check_output(other, True, [base])
    check_output(tmp_path / "new", False, [base])
    check_output(file, True, [base])
    check_output(tmp_path / "bases", False, [base])


def test_what_is_read_is_found_through_links(tmp_path):
    base = folder_of(tmp_path / "base", "model_index.json")
    weights = folder_of(base / "unet", "weights")
    blob = tmp_path / "blob"
    blob.write_text("blob")
    (base / "unet" / "linked").symlink_to(blob)
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "hard").hardlink_to(weights / "weights")
    elsewhere = folder_of(tmp_path / "elsewhere")
    (elsewhere / "unet").symlink_to(weights)
    (weights / "loop").symlink_to(base)
    inside = [base, weights, weights / "weights", weights / "new", tmp_path / "link" / "a" / "b"]
    inside += [tmp_path / "link", elsewhere / "unet", elsewhere / "unet" / "new"]
    inside += [tmp_path / "hard", blob, elsewhere / ".." / "base" / "x", tmp_path]
    for output in inside:
        assert find_overlap(output, [None, "owner/name", base]), output
        with pytest.raises(OutputError, match="which is read"):
            check_output(output, True, [str(base)])
    # through a link to it, or to a part of it
    assert find_overlap(weights / "weights", [elsewhere])
    assert find_overlap(weights, [elsewhere])
    assert find_overlap(blob, [tmp_path / "link"])
    # a folder that is replaced takes the link in it along
    assert find_overlap(elsewhere, [elsewhere / "unet" / "weights"]) is None
    assert find_overlap(elsewhere, [elsewhere / "unet"])
    apart = [elsewhere / "new", tmp_path / "new", tmp_path / "basement", base / ".." / "x"]
    for output in apart:
        assert find_overlap(output, [base, blob, "no/such", None]) is None, output


def cached(cache: Path, repository: str) -> Path:
    """Make a repository in a Hub cache, as huggingface_hub lays it out; return a file's link."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    blob, link = folder / "blobs" / ("a" * 64), folder / "snapshots" / ("0" * 40) / "weights"
    for path in (blob, link):
        path.parent.mkdir(parents=True)
    blob.write_text("weights")
    link.symlink_to(Path("..", "..", "blobs", blob.name))
    return link


def test_what_is_read_from_the_hubs_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    link = cached(tmp_path / "hub", "me/cat")
    assert try_to_load_from_cache("me/cat", link.name, revision="0" * 40) == str(link)
    other = cached(tmp_path / "other", "me/dog")
    for source in ("me/cat", "me/cat/folder"):
        for output in (link, link.resolve(), link.with_name("new"), tmp_path / "hub"):
            with pytest.raises(OutputError, match="which is read"):
                check_output(output, True, [source])
        assert find_overlap(other, [source]) is None
        assert find_overlap(tmp_path / "new", [source]) is None
    (tmp_path / "link").symlink_to(link)
    (tmp_path / "hard").hardlink_to(link.resolve())
    for output in (tmp_path / "link", tmp_path / "hard"):
        assert find_overlap(output, ["me/cat"]), output
    assert find_overlap(other, ["me/dog"]) is None  # it is not read from there
    assert find_overlap(other.resolve(), ["me/dog"], tmp_path / "other")
    assert find_overlap(link, ["me/cat"], tmp_path / "other")  # an adapter is read from the usual
    assert find_overlap(link, [str(tmp_path / "me/cat"), "cat", "me/bird"]) is None


@pytest.mark.parametrize("command", ["export", "import", "sample"])
def test_no_command_writes_into_the_hubs_cache(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    link = cached(tmp_path, "me/cat")
    output = {"sample": "grid.png"}.get(command, "new.safetensors")
    line = {
        "export": ["--format=checkpoint", "--adapter={}", "--base={}"],
        "import": ["--lora={}", "--base={}", "--rank=4", "--gralora_k=2"],
        "sample": ["--adapter={}", "--base={}", "--prompt=a cat"],
    }[command]
    for names in (("me/cat", "me/dog"), ("me/dog", "me/cat")):
        sources = iter(names)
        given = [text.format(next(sources)) if "{}" in text else text for text in line]
        with pytest.raises(SystemExit) as caught:
            cli.main([command, *given, f"--output={link.with_name(output)}"])
        assert caught.value.code == 2
        assert f"overlaps {tmp_path / 'models--me--cat'}, which is read" in capsys.readouterr().err


@pytest.mark.parametrize("index", [None, "", "[1, 2]", "3", "{", "[" * 10_000])
def test_a_folder_that_is_no_pipeline_is_not_replaced(index, tmp_path):
    output = folder_of(tmp_path / "out")
    if index is not None:
        (output / "model_index.json").write_text(index)
    with pytest.raises(OutputError, match="is a folder without a pipeline, so it is not replaced"):
        check_output(output, True, [])


QUIET = {"progress": False, "overwrite": True}


def forked(call: Callable[..., Any], *arguments: Any, **options: Any) -> BaseProcess:
    """A started process that has all that was imported here."""
    process = multiprocessing.get_context("fork").Process(
        target=call, args=arguments, kwargs=options, daemon=True
    )
    process.start()
    return process


def wide_flux():
    """A transformer of 80 MB in bf16."""
    pipe = PIPELINES["flux"](
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=128,
        num_attention_heads=5,
        axes_dims_rope=(32, 48, 48),
    )
    pipe.transformer.to(torch.bfloat16)
    return pipe


@pytest.mark.skipif(sys.platform != "linux", reason="forks and kills")
def test_killed_at_random_moments(tmp_path):
    """No damaged file under the final name: none, or what was there, or the whole new one."""
    pipe = wide_flux()
    base = write(transformer_alone(ORIGINALS["flux"](pipe)), tmp_path / "base.safetensors")
    assert base.stat().st_size > 60e6
    adapt_everywhere(pipe, ["transformer"]).save_gralora_weights(tmp_path / "adapter")
    del pipe
    before = base.read_bytes()
    export_fused(tmp_path / "adapter", base, tmp_path / "whole", progress=False)
    expected = (tmp_path / "whole").read_bytes()
    output, chance = tmp_path / "out", random.Random(0)
    seconds, killed, number = 60.0, 0, -1
    while killed < 8:
        number += 1
        if number == 6:
            output.write_bytes(b"what was there")
        held = output.read_bytes() if output.exists() else None
        start = time.monotonic()
        process = forked(export_fused, tmp_path / "adapter", base, output, **QUIET)
        if number:
            process.join(chance.uniform(0, seconds))
            process.kill()
        process.join()
        finished = process.exitcode == 0
        killed += not finished
        if finished:  # the first one has told how long it takes, unless others were busy then
            seconds = min(seconds, time.monotonic() - start)
        found = output.read_bytes() if output.exists() else None
        assert found == expected or (found == held and not finished)
        if found == expected:
            output.unlink()
        assert base.read_bytes() == before
    # nor does what was left beside it keep a later export from its work
    export_fused(tmp_path / "adapter", base, output, **QUIET)
    assert output.read_bytes() == expected


def export_limited(*arguments, **options) -> None:
    """Export with a limit on the size of files, as a disk with little space has it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000,) * 2)
    with pytest.raises(OSError, match="File too large"):
        export_fused(*arguments, **options)


@pytest.mark.skipif(sys.platform != "linux", reason="forks, limits files as Linux does")
def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path):
    pipe = PIPELINES["stable-diffusion"]()
    pipe.save_pretrained(tmp_path / "base")
    adapt_everywhere(pipe).save_gralora_weights(tmp_path / "adapter")
    export_fused(tmp_path / "adapter", tmp_path / "base", tmp_path / "file", progress=False)
    export_fused(
        tmp_path / "adapter",
        tmp_path / "base",
        tmp_path / "folder",
        format="diffusers",
        progress=False,
    )
    before = load_file(tmp_path / "file")
    assert (tmp_path / "file").stat().st_size > 200_000
    held = names(tmp_path)
    for name, kind in (("file", "checkpoint"), ("folder", "diffusers"), ("new", "diffusers")):
        places = [tmp_path / part for part in ("adapter", "base", name)]
        process = forked(export_limited, *places, format=kind, **QUIET)
        process.join()
        assert process.exitcode == 0
        assert names(tmp_path) == held
    found = load_file(tmp_path / "file")
    assert all(torch.equal(found[key], tensor) for key, tensor in before.items())
    PIPELINES["stable-diffusion"]().from_pretrained(tmp_path / "folder")


def test_a_refused_value_leaves_what_was_there(tmp_path):
    pipe = PIPELINES["stable-diffusion"]()
    pipe.save_pretrained(tmp_path / "base")
    adapt_everywhere(pipe).save_gralora_weights(tmp_path / "adapter")
    output = tmp_path / "out"
    output.write_bytes(b"precious")
    held = names(tmp_path)
    with pytest.raises(RoundingError, match=r"^model\.diffusion_model\.[\w.]+ has .* of fp16 is"):
        export_fused(
            tmp_path / "adapter",
            tmp_path / "base",
            output,
            dtype="fp16",
            scale=1e7,
            **QUIET,
        )
    assert output.read_bytes() == b"precious"
    assert names(tmp_path) == held
