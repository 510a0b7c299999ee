"""Exporting with ``--verify``, generating, and a benchmark's trials, on the pretended GPU."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from gralora_diffusion.benchmark.methods import Method
from gralora_diffusion.benchmark.runner import Runner
from gralora_diffusion.benchmark.tasks import read_tasks
from gralora_diffusion.export.main import main as export
from gralora_diffusion.pipelines.sample_command import main as sample
from tests.benchmark import judges, runs
from tests.models import adapt_everywhere, stable_diffusion
from tests.rehearsal.device import Gpu


def export_verified(gpu: Gpu, folder: Path) -> Iterator[str]:
    """Export an adapter of a small effect with ``--verify``; also with room for one pipeline."""
    base, adapter = _base_and_adapter(folder)
    for name, form, free in (
        ("fused.safetensors", "checkpoint", gpu.total),
        ("fused", "diffusers", 1000),
    ):
        gpu.free = free
        output = folder / name
        line = ["--adapter", str(adapter), "--base", str(base), "--output", str(output)]
        line += ["--format", form, "--verify", "--verify_size", "32", "--verify_steps", "1"]
        if problem := _failure(export, line):
            yield f"{form}: {problem}"
            continue
        report = json.loads((folder / f"{name}.parity.json").read_text())
        if not report["device"].startswith("cuda"):
            yield f"{form}: verified on {report['device']}"
        if report["verdict"] != "passed":
            yield f"{form}: {report['verdict']}"


def generate(gpu: Gpu, folder: Path) -> Iterator[str]:
    """``gralora sample`` with much and with little memory."""
    base, adapter = _base_and_adapter(folder)
    for free in (gpu.total, 1000):
        gpu.free = free
        output = folder / f"grid-{free}.png"
        line = ["--base", str(base), "--adapter", str(adapter), "--prompt", "a dog"]
        line += ["--size", "32", "--num_inference_steps", "1", "--output", str(output)]
        if problem := _failure(sample, line):
            yield f"with {free} bytes free: {problem}"
        elif not output.exists():
            yield f"with {free} bytes free: no {output.name}"


def trials(folder: Path) -> Iterator[str]:
    """Trials of a benchmark that train text encoders; the base is the same afterwards."""
    world = folder / "world"
    stable_diffusion().save_pretrained(world / "base")
    judges.save_dinov2(world / "dinov2")
    judges.save_clip(world / "clip")
    runs.clone(world / "dreambooth")
    settings = runs.settings(
        world,
        folder / "out",
        subjects=["dog"],
        train_text_encoder=True,
        cache_latents=False,
        use_ema=True,
        protocols=["subject", "drift"],
        prior_images=None,
        max_train_steps=2,
        inference_steps=1,
        images_per_prompt=1,
        mixed_precision="bf16",
    )
    (task,) = read_tasks(settings)
    runner = Runner(settings, task.config)
    pipe = runner.pipe
    models = {name: getattr(pipe, name) for name in ("unet", "vae", "text_encoder")}
    devices = {name: model.device for name, model in models.items()}
    weights = {
        (name, key): tensor.cpu().clone()
        for name, model in models.items()
        for key, tensor in model.state_dict().items()
    }
    for name in ("lora-r4", "gralora-r4-k2"):
        result = runner.run(task, Method.parse(name), 0, folder / "out" / name)
        if "drift_dinov2" not in result.scores:
            yield f"{name}: no score of drift"
        for component, model in models.items():
            if model.device != devices[component]:
                yield f"{name}: {component} stays on {model.device}"
            for key, tensor in model.state_dict().items():
                if not torch.equal(tensor.cpu(), weights[component, key]):
                    yield f"{name}: {component}'s {key} has changed"


def _base_and_adapter(folder: Path) -> tuple[Path, Path]:
    base, adapter = folder / "base", folder / "adapter"
    if not base.exists():
        stable_diffusion().save_pretrained(base)
        pipe = adapt_everywhere(stable_diffusion())
        with torch.no_grad():
            for name, parameter in pipe.unet.named_parameters():
                if "gralora" in name:  # so small an effect that TF32 would hide it
                    parameter.mul_(0.2)
        pipe.save_gralora_weights(adapter)
    return base, adapter


def _failure(command: object, line: list[str]) -> str | None:
    """Run a command; return what it says if it fails."""
    assert callable(command)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            command(line)
    except SystemExit as exit:
        if exit.code:
            return f"{exit.code}: {said.getvalue()[-800:]}"
    return None
