"""Runs of other kinds: edits, masks, fills, held-out images, sets, streaming, prompts, a stop."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from diffusers.pipelines.flux import pipeline_flux_kontext
from PIL import Image

from gralora_diffusion.training import loop
from gralora_diffusion.training.runtime import control
from tests import pipeline_classes
from tests.models import PIPELINES
from tests.rehearsal.device import Gpu
from tests.rehearsal.training import SHORT, train_and_resume
from tests.training.runs import adapter, make_shapes, run

_VALIDATION = {
    "validation_steps": 2,
    "num_validation_images": 1,
    "validation_inference_steps": 1,
    "skip_final_inference": True,
}


def _plain(folder: Path, family: str) -> Path:
    PIPELINES[family]().save_pretrained(folder / "base")
    return folder / "base"


def _editing(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """An editing base of this class; images with a control image each."""
    pipeline_classes.build(name).save_pretrained(folder / "base")
    controls = make_shapes(folder / "controls", [(96, 64)] * 2, seed=1)
    return {
        "pretrained_model_name_or_path": folder / "base",
        "control_data_dir": controls,
        "mixed_precision": "bf16",
        "validation_prompt": "a dog",
        "validation_image": controls / "0.png",
        **_VALIDATION,
        **changes,
    }


def _measured_edits(folder: Path) -> dict[str, Any]:
    """Edits with text encoders and an average of the weights; held-out pairs are measured."""
    return {
        **_editing(folder, "StableDiffusionInstructPix2PixPipeline"),
        "control_dropout": 0.3,  # of one of two rows in each step
        "train_batch_size": 2,
        "train_text_encoder": True,
        "use_ema": True,
        "held_out_data_dir": make_shapes(folder / "held out", [(48, 32)] * 2, seed=2),
        "held_out_control_data_dir": make_shapes(folder / "before", [(48, 32)] * 2, seed=3),
        "held_out_steps": 2,
        "held_out_noises": 1,
    }


def _write_masks(images: Path) -> None:
    """Write a mask beside each image."""
    for path in sorted(images.glob("*.png")):
        mask = Image.new("L", Image.open(path).size, 0)
        mask.paste(255, (4, 4, 30, 20))
        mask.save(path.with_suffix(".mask.png"))


def _masked(folder: Path, outside: str, **changes: Any) -> dict[str, Any]:
    """The loss outside counts the base's prediction, or little."""
    _write_masks(folder / "images")
    return {
        "pretrained_model_name_or_path": _plain(folder, "stable-diffusion"),
        "masked_loss": True,
        "mask_outside": outside,
        "mixed_precision": "bf16",
        **changes,
    }


def _filling(folder: Path, family: str, **changes: Any) -> dict[str, Any]:
    """A base that fills: at the masks of the images, or at random ones."""
    _write_masks(folder / "images")
    pipeline_classes.build_filling(family).save_pretrained(folder / "base")
    return {
        "pretrained_model_name_or_path": folder / "base",
        "cache_latents": False,
        "mixed_precision": "bf16",
        "validation_prompt": "a dog",
        **_VALIDATION,
        **changes,
    }


def _held_out(folder: Path, **changes: Any) -> dict[str, Any]:
    """Images whose loss is measured, in the average of the weights; the best adapter is kept."""
    return {
        "pretrained_model_name_or_path": _plain(folder, "stable-diffusion"),
        "held_out_data_dir": make_shapes(folder / "held out", [(48, 32)] * 2, seed=2),
        "held_out_steps": 2,
        "held_out_noises": 1,
        "train_batch_size": 3,  # an image's noise levels in one pass
        "use_ema": True,
        "mixed_precision": "bf16",
        **changes,
    }


def _sets(folder: Path, **changes: Any) -> dict[str, Any]:
    """Sets of images with weights, resolutions and settings of their own."""
    images, others = str(folder / "images"), make_shapes(folder / "others", [(48, 32)], seed=2)
    sets = [
        {"folder": images, "prompt": "a dog", "resolutions": [16, 32], "loss_weight": 0.5},
        {"folder": images, "prompt": "a cat", "random_flip": True, "share": 0.4},
        {"folder": str(others), "role": "prior", "prompt": "a dog", "loss_weight": 0.7},
    ]
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump(sets))
    return {
        "pretrained_model_name_or_path": _plain(folder, "stable-diffusion"),
        "data_config": file,
        "instance_data_dir": None,
        "instance_prompt": None,
        "mixed_precision": "fp16",
        **changes,
    }


def _streamed(folder: Path, family: str) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": _plain(folder, family),
        "offload_base": "blocks",
        "gradient_checkpointing": True,
        "mixed_precision": "bf16",
    }


def _prompts(folder: Path, family: str) -> dict[str, Any]:
    """Prompts with sizes, steps and strengths of their own."""
    entries = [{"prompt": "a dog", "width": 64, "height": 32}, {"prompt": "a cat", "scale": 0.5}]
    file = folder / "prompts.yaml"
    file.write_text(yaml.safe_dump(entries))
    return {
        "pretrained_model_name_or_path": _plain(folder, family),
        "validation_prompts_file": file,
        "mixed_precision": "fp16",
        **_VALIDATION,
    }


#: Name -> what makes the data in a folder, and returns the options of a run.
KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "edits/flux-kontext": partial(_editing, name="FluxKontextPipeline"),
    "edits/flux2-klein": partial(_editing, name="Flux2KleinPipeline", cache_latents=False),
    "edits/pix2pix": _measured_edits,
    "masked/base": partial(_masked, outside="base"),
    "masked/weight": partial(_masked, outside="weight", cache_latents=False),
    "fills/stable-diffusion": partial(_filling, family="stable-diffusion"),
    "fills/flux": partial(_filling, family="flux", inpaint_given_masks=True),
    "held-out/cached": _held_out,
    "held-out/encoders": partial(
        _held_out, cache_latents=False, train_text_encoder=True, mixed_precision="fp16"
    ),
    "sets": _sets,
    "streamed/flux": partial(_streamed, family="flux"),
    "streamed/stable-diffusion-xl": partial(_streamed, family="stable-diffusion-xl"),
    "prompts/stable-diffusion": partial(_prompts, family="stable-diffusion"),
}


def rehearse(kind: str, gpu: Gpu, folder: Path, changes: dict[str, Any]) -> Iterator[str]:
    """Train, resume from the checkpoint in the middle, and yield what is wrong."""
    make_shapes(folder / "images", [(48, 32)] * 2)
    with small_kontext():
        chosen = KINDS[kind](folder)
        common = {"instance_data_dir": folder / "images", "output_dir": folder / "run", **SHORT}
        yield from train_and_resume(gpu, {**common, **chosen, **changes})


def small_kontext() -> Any:
    """Kontext's sizes, small enough for tiny models."""
    sizes = [(48, 32), (32, 32), (32, 48)]
    return mock.patch.object(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", sizes)


def stopped(folder: Path, changes: dict[str, Any]) -> Iterator[str]:
    """A run that is asked to stop ends after its step, and is resumed as if it had not."""
    chosen = {
        "pretrained_model_name_or_path": _plain(folder, "stable-diffusion"),
        "instance_data_dir": make_shapes(folder / "images", [(48, 32)] * 2),
        "mixed_precision": "bf16",
        **SHORT,
        "checkpointing_steps": 1000,
        **changes,
    }
    whole = adapter(run(**chosen, output_dir=folder / "whole"))
    out, plain, count = folder / "stopped", loop.mean_loss, itertools.count(1)

    def mean_loss(*args: Any) -> Any:
        if next(count) == 2:
            control.request(out, "stop")
        return plain(*args)

    always = mock.patch.object(control, "_LOOK_SECONDS", 0.0)  # steps take less than it waits
    with always, mock.patch.object(loop, "mean_loss", mean_loss):
        run(**chosen, output_dir=out)
    status = control.read_status(out)
    if (status.state, status.step) != ("stopped", 2):
        yield f"it {status.state} at step {status.step}, not stopped at step 2"
    run(**chosen, output_dir=out, resume_from_checkpoint="latest")
    again = adapter(out)
    if any(not torch.equal(tensor, again[name]) for name, tensor in whole.items()):
        yield "the resumed run differs"
    shutil.rmtree(out)
