"""Runs that start from an adapter, above all from an imported LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from gralora_diffusion.adapters.adapter_file import (
    WEIGHTS_NAME,
    Adapter,
    read_adapter,
    save_adapter,
)
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.lora_import import gralora_from_lora
from gralora_diffusion.training import loop
from tests import models
from tests.lora_import.loras import KOHYA, pairs, save
from tests.reference import relative_error
from tests.training import runs

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CLIP = ("q_proj", "k_proj", "v_proj", "out_proj")
SHAPE: dict[str, Any] = {"rank": 12, "gralora_k": 4, "hybrid_rank": 1}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 2 on what the preset attention names, in the names of sd-scripts."""
    torch.manual_seed(0)
    pipe, tensors = models.stable_diffusion(), {}
    for component, endings in (("unet", ATTENTION), ("text_encoder", CLIP)):
        for path, (down, up) in pairs(getattr(pipe, component), endings, 2).items():
            level = "" if component == "unet" or path.startswith("text_model") else "text_model_"
            name = f"{KOHYA[component]}_{level}{path.replace('.', '_')}"
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up / 4}
    return save(tensors, tmp_path_factory.mktemp("lora") / "lora.safetensors")


@pytest.fixture(scope="module")
def start(lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter made of it."""
    adapter, _ = gralora_from_lora(
        lora, "stable-diffusion", SHAPE["rank"], SHAPE["gralora_k"], SHAPE["hybrid_rank"]
    )
    return save_adapter(adapter, tmp_path_factory.mktemp("start") / WEIGHTS_NAME)


def pipeline(base: Path) -> Any:
    """In fp64, as the tiny base enlarges what rounding does."""
    pipe = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(base: Path, adapter: Path) -> torch.Tensor:
    pipe = pipeline(base)
    pipe.load_gralora_weights(adapter)
    return models.draw(pipe)


def test_a_run_starts_at_the_image_of_the_lora_and_goes_on(base, images, lora, start, tmp_path):
    options = {
        **SHAPE,
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        "initial_adapter": start,
        "train_text_encoder": True,
    }
    # a step of learning rates that change nothing in fp32
    rates = {"learning_rate": 1e-30, "text_encoder_lr": 1e-30}
    still = runs.run(**options, **rates, max_train_steps=1, output_dir=tmp_path / "a")
    pipe = pipeline(base)
    bare = models.draw(pipe)
    pipe.load_lora_weights(lora)
    theirs = models.draw(pipe)
    assert relative_error(theirs, bare) > 0.01
    assert relative_error(image(base, still), theirs) < 1e-6

    moved = runs.run(**options, max_train_steps=3, learning_rate=1e-2, output_dir=tmp_path / "b")
    first, last = runs.adapter(start.parent), runs.adapter(moved)
    for key, tensor in last.items():
        before = first[
            key if key in first else key.replace("encoder.layers", "text_model.encoder.layers", 1)
        ]
        assert not torch.equal(tensor, before), key
    assert relative_error(image(base, moved), theirs) > 1e-3
    # the same first loss: where both began
    assert runs.metrics(moved)[0]["loss"] == runs.metrics(still)[0]["loss"]


def test_what_a_run_wrote_is_taken_as_it_is_and_a_checkpoint_wins_over_it(base, images, tmp_path):
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        "output_dir": tmp_path / "a",
        "checkpointing_steps": 2,
    }
    first = runs.run(**options, max_train_steps=2)
    again = runs.run(
        **{**options, "output_dir": tmp_path / "b"},
        initial_adapter=first,
        max_train_steps=1,
        learning_rate=1e-30,
    )
    assert runs.adapter(again).keys() == runs.adapter(first).keys()
    runs.assert_close(first, again, 0.0)
    whole = runs.run(**{**options, "output_dir": tmp_path / "c"}, max_train_steps=4)
    runs.run(
        **options,
        max_train_steps=4,
        resume_from_checkpoint="latest",
        initial_adapter=tmp_path / "not there any more",
    )
    runs.assert_same_run(whole, first)


def unet_only(start: Path, folder: Path, **changes: Any) -> Path:
    """The adapter without the text encoder's part, and with other values in its config."""
    adapter = read_adapter(start)
    part = adapter.components["unet"]
    for name, value in changes.items():
        setattr(part.config, name, value)
    return save_adapter(Adapter({"unet": part}, adapter.family), folder / WEIGHTS_NAME)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"rank": 16, "gralora_k": 2, "hybrid_rank": 0},
            "unet has rank 12 there and 16 here, gralora_k 4 there and 2 here, hybrid_rank 1 there "
            "and 0 here, lora_alpha 13 there and 16 here. Give --rank 12 --gralora_k 4 "
            "--hybrid_rank 1 --lora_alpha 13",
        ),
        ({"lora_alpha": 4}, "lora_alpha 13 there and 4 here. Give --lora_alpha 13"),
        (
            {"target_preset": "attention+ff"},
            "8 only here, such as down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj. "
            "Give --target_preset attention",
        ),
        ({"lora_layers": "to_q"}, "only there, such as .*to_k. Give --target_preset attention"),
        (
            {"train_text_encoder": True},
            "it adapts unet, but the run adapts unet, text_encoder. Leave out --train_text_encoder",
        ),
        (
            {"rank_pattern": "to_q=8"},
            "to_q of unet has rank 12 there and 8 here.* Give the --rank_pattern",
        ),
        ({"initial_adapter": "/absent.safetensors"}, "/absent.safetensors: no such file"),
    ],
)
def test_options_that_do_not_agree(options, text, base, images, start, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "load_base", lambda *_: pytest.fail("the base was loaded"))
    usual = {
        **SHAPE,
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        "initial_adapter": unet_only(start, tmp_path),
        "output_dir": tmp_path / "out",
    }
    with pytest.raises(ConfigError, match=text.replace("+", r"\+")):
        runs.run(**{**usual, **options})
    assert not (tmp_path / "out").exists()


def test_a_text_encoder_that_the_run_leaves_alone(base, images, start, tmp_path):
    with pytest.raises(ConfigError, match="Give --train_text_encoder --text_encoders text_encoder"):
        runs.run(
            **SHAPE,
            pretrained_model_name_or_path=base,
            instance_data_dir=images,
            initial_adapter=start,
            output_dir=tmp_path / "out",
        )


def test_layers_that_no_preset_has(base, images, tmp_path):
    """The option that is named brings the run about."""
    tensors = {
        f"unet.{path}.lora_{side}.weight": factor
        for path, pair in pairs(models.stable_diffusion().unet, ("attn1.to_q", "conv1"), 2).items()
        for side, factor in zip("AB", pair, strict=True)
    }
    adapter, _ = gralora_from_lora(tensors, "stable-diffusion", 8, 4)
    start = save_adapter(adapter, tmp_path / "start" / WEIGHTS_NAME)
    options = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        "initial_adapter": start,
        "rank": 8,
        "gralora_k": 4,
        "max_train_steps": 1,
        "learning_rate": 1e-30,
        "output_dir": tmp_path / "out",
    }
    with pytest.raises(ConfigError, match="Give --lora_layers 're:") as caught:
        runs.run(**options)
    layers = str(caught.value).partition("--lora_layers '")[2].rpartition("'")[0]
    folder = runs.run(**options, lora_layers=layers)
    written = runs.adapter(folder)
    assert written.keys() == runs.adapter(start.parent).keys()
    for key, tensor in runs.adapter(start.parent).items():
        torch.testing.assert_close(written[key], tensor, rtol=0, atol=1e-29)  # zeros have moved
