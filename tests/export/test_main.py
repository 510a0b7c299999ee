"""``gralora export`` from its options to its files, on a tiny pipeline."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from gralora_diffusion.cli import main
from gralora_diffusion.io.tensor_files import HASH_FIELDS, file_hashes
from tests.models import adapt_everywhere, merged, stable_diffusion
from tests.originals import ORIGINALS, write


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base as folder and as file, and an adapter on UNet and text encoder."""
    folder = tmp_path_factory.mktemp("export")
    stable_diffusion().save_pretrained(folder / "base")
    write(ORIGINALS["stable-diffusion"](stable_diffusion()), folder / "base.safetensors")
    adapt_everywhere(stable_diffusion()).save_gralora_weights(folder / "adapter")
    return folder


def export(place: Path, output: Path, *options: str) -> None:
    main(["export", "--adapter", str(place / "adapter"), "--output", str(output), *options])


def test_every_format_verified(place, tmp_path, capsys):
    base = ["--base", str(place / "base"), "--verify", "--verify_size", "32"]
    lora, model, folder = (tmp_path / n for n in ("l.safetensors", "m.safetensors", "pipeline"))
    export(place, lora, "--format", "lora", "--trigger_phrase", "sks cat", *base)
    export(place, model, "--format", "checkpoint", *base, "--hash")
    export(place, folder, "--format", "diffusers", *base)
    told = capsys.readouterr().out
    assert "exact: the same update" in told
    assert told.count("passed\n") == 3
    for output in (lora, model, folder):
        report = json.loads((tmp_path / f"{output.name}.parity.json").read_text())
        assert report["verdict"] == "passed"
        assert report["ways"]["LoRA by load_lora_weights"]["relative"] < 1e-4
        if output != lora:
            assert report["ways"]["fused weights"]["relative"] < 1e-4
    with safe_open(lora, "pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "sks cat"
        assert file.metadata()["modelspec.architecture"].endswith("/lora")
    with safe_open(model, "pt") as file:
        assert file.metadata()["modelspec.hash_sha256"].startswith("0x")
    fused = DiffusionPipeline.from_pretrained(folder).unet.state_dict()
    expected = merged([(place / "adapter", 1.0)]).unet.state_dict()
    assert all(torch.allclose(fused[k], t, rtol=1e-6, atol=1e-7) for k, t in expected.items())


@pytest.mark.parametrize(
    ("options", "hashed"),
    [
        (["--format", "lora"], True),
        (["--format", "diff"], True),
        (["--format", "checkpoint", "--hash"], True),
        (["--format", "checkpoint"], False),
    ],
)
def test_hashes_are_those_of_the_tensors_or_not_there(options, hashed, place, tmp_path):
    output = tmp_path / "x.safetensors"
    export(place, output, *options, "--base", str(place / "base"))
    content = output.read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    with safe_open(output, "pt") as file:
        told = {key: text for key, text in file.metadata().items() if key in HASH_FIELDS}
    assert set(told) == (set(HASH_FIELDS) if hashed else set())
    if hashed:
        assert told["modelspec.hash_sha256"] == f"0x{digest}"
        assert told["sshs_model_hash"] == digest
        assert told["sshs_legacy_hash"] == file_hashes(output)["sshs_legacy_hash"]


def test_from_a_single_file_and_dense_updates(place, tmp_path):
    model, diff = tmp_path / "m.safetensors", tmp_path / "d.safetensors"
    base = str(place / "base.safetensors")
    export(place, model, "--format", "checkpoint", "--base", base, "--scale", "0.5")
    export(place, diff, "--format", "diff", "--base", base, "--scale", "0.5")
    before, after, updates = load_file(base), load_file(model), load_file(diff)
    for name, update in updates.items():
        if name.startswith("diffusion_model."):
            key = f"model.{name.removesuffix('.diff')}.weight"
            torch.testing.assert_close(after[key] - before[key], update, rtol=1e-4, atol=1e-6)


def test_a_file_that_draws_something_else_does_not_appear(place, tmp_path, capsys):
    lora = tmp_path / "l.safetensors"
    options = ["--base", str(place / "base"), "--verify", "--verify_size", "32", "--rank", "1"]
    with pytest.raises(SystemExit):
        export(place, lora, "--format", "lora", *options)
    assert "does not generate the same latents as the adapter" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


WRONG = [
    (["--format", "checkpoint"], "needs --base"),
    (["--format", "lora", "--verify"], "--verify needs --base"),
    (
        ["--format", "lora", "--denoiser_only"],
        "--denoiser_only: only allowed with --format checkpoint",
    ),
    (["--format", "diff", "--rank", "4"], "--rank: only allowed with --format lora"),
    (["--format", "diff", "--style", "kohya"], "--style: only allowed with --format lora"),
    (
        ["--format", "lora", "--stochastic_rounding"],
        "--stochastic_rounding: only allowed with --format",
    ),
    (["--format", "lora", "--energy", "1.5"], "--energy is 1.5"),
    (["--format", "lora", "--rank", "0"], "--rank is 0"),
    (["--format", "lora", "--verify_steps", "0"], "--verify_steps is 0"),
    (
        ["--format", "lora", "--verify_size", "100"],
        "--verify_size is 100; it must be a positive multiple",
    ),
    (["--format", "lora", "--verify_bound", "-1"], "--verify_bound is -1.0"),
    (
        ["--format", "checkpoint", "--base", "b", "--no_fp8_scale"],
        "only allowed with --dtype fp8_e4m3",
    ),
    (
        ["--format", "checkpoint", "--base", "b", "--family", "flux"],
        "--family: only allowed with --format lora",
    ),
    (
        ["--format", "onnx"],
        "--format is 'onnx'; it must be one of checkpoint, diffusers, lora",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_options_that_do_not_go_together(options, message, place, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export(place, tmp_path / "x.safetensors", *options)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_output_must_be_free_and_named_as_a_file(place, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export(place, tmp_path / "x.ckpt", "--format", "lora")
    assert "its name must end in .safetensors" in capsys.readouterr().err
    taken = tmp_path / "taken.safetensors"
    taken.write_text("mine")
    with pytest.raises(SystemExit):
        export(place, taken, "--format", "lora")
    assert "exists already. Choose another --output, or pass --overwrite" in capsys.readouterr().err
    assert taken.read_text() == "mine"
    export(place, taken, "--format", "lora", "--overwrite")
    assert load_file(taken)


def test_what_is_read_is_never_replaced(place, tmp_path, capsys):
    adapter = tmp_path / "adapter.safetensors"
    adapter.write_bytes((place / "adapter/pytorch_gralora_weights.safetensors").read_bytes())
    before = adapter.read_bytes()
    options = ["--adapter", str(adapter), "--output", str(adapter), "--overwrite"]
    with pytest.raises(SystemExit):
        main(["export", "--format", "lora", *options])
    assert "which is read. Choose another --output" in capsys.readouterr().err
    assert adapter.read_bytes() == before


@pytest.mark.parametrize("format", ["lora", "diff", "checkpoint", "diffusers"])
def test_the_base_is_never_replaced(format, place, tmp_path, capsys):
    """Nor a file in its folder or linked to from there, nor what completes it."""
    file = tmp_path / "base.safetensors"
    export(place, file, "--format", "checkpoint", "--base", str(place / "base"))
    folder = shutil.copytree(place / "base", tmp_path / "base")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    blob = weights.rename(tmp_path / "blob.safetensors")
    weights.symlink_to(blob)
    config = shutil.copytree(place / "base", tmp_path / "config")
    outputs = [(file, file), (folder, weights), (folder, blob)]
    if format == "diffusers":
        outputs = [(folder, folder), (folder, tmp_path)]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    for base, output in outputs:
        with pytest.raises(SystemExit):
            export(place, output, "--format", format, "--base", str(base), "--overwrite")
        assert "which is read. Choose another --output" in capsys.readouterr().err
    inside = config / "unet" / "x.safetensors"
    options = ["--base", str(folder), "--base_config", str(config)]
    with pytest.raises(SystemExit):
        export(place, inside, "--format", format, *options, "--overwrite")
    assert "which is read. Choose another --output" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_report_does_not_take_the_place_of_what_is_read(place, tmp_path, capsys):
    adapter = tmp_path / "x.safetensors.parity.json"
    adapter.write_bytes((place / "adapter/pytorch_gralora_weights.safetensors").read_bytes())
    before = adapter.read_bytes()
    output = ["--output", str(tmp_path / "x.safetensors"), "--format", "lora"]
    with pytest.raises(SystemExit):
        main(["export", "--adapter", str(adapter), *output])
    assert "the report on this output would replace" in capsys.readouterr().err
    assert adapter.read_bytes() == before


def test_what_cannot_be_drawn_with_is_told_before_anything_is_written(place, tmp_path, capsys):
    folder = shutil.copytree(place / "base", tmp_path / "base")
    config = json.loads((folder / "text_encoder/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "text_encoder/config.json").write_text(json.dumps(config))
    adapt_everywhere(stable_diffusion(), ["unet"]).save_gralora_weights(tmp_path / "unet")
    line = ["export", "--adapter", str(tmp_path / "unet"), "--format", "checkpoint"]
    line += ["--base", str(folder), "--output", str(tmp_path / "x.safetensors"), "--denoiser_only"]
    with pytest.raises(SystemExit):
        main([*line, "--verify"])
    assert "leave out --verify" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()
    main(line)
    assert load_file(tmp_path / "x.safetensors")


def test_a_folder_with_other_things_is_not_replaced(place, tmp_path, capsys):
    folder, base = tmp_path / "pipeline", ["--format", "diffusers", "--base", str(place / "base")]
    export(place, folder, *base)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        export(place, folder, *base, "--overwrite")
    assert "also contains notes.txt, which would be lost" in capsys.readouterr().err
    (folder / "notes.txt").unlink()
    export(place, folder, *base, "--overwrite")
    assert (folder / "model_index.json").is_file()


def test_scaled_fp8_is_verified(place, tmp_path, capsys):
    base = ["--format", "checkpoint", "--base", str(place / "base"), "--dtype", "fp8_e4m3"]
    export(place, tmp_path / "x.safetensors", *base, "--verify", "--verify_size", "32")
    assert "diffusers ignores the scales" in capsys.readouterr().out
    report = json.loads((tmp_path / "x.safetensors.parity.json").read_text())
    assert 0 < report["ways"]["fused weights"]["relative"] < 0.5
    export(place, tmp_path / "x.safetensors", *base, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_other_errors_say_what_to_do(place, tmp_path, capsys):
    output = tmp_path / "x.safetensors"
    for base, message in (
        (place / "nothing", "no such file or folder"),
        (
            place / "adapter" / "pytorch_gralora_weights.safetensors",
            "it is an adapter. Pass",
        ),
        (place / "adapter", "contains no model_index.json"),
    ):
        with pytest.raises(SystemExit):
            export(place, output, "--format", "checkpoint", "--base", str(base))
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
