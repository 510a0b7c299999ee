"""Time per training step: ``python -m tests.performance.train_step``.

In each round one step of the trainer, all that ``Trainer.train`` does between two checkpoints, and
one of a bare loop over the same denoiser with the same adapter: stored latents and prompts, noise,
forward, loss, backward, clipping, AdamW. The bare loop also with PEFT's adapters on the same layers
and with as many parameters.

Bases: ``tiny`` is the one of the tests, ``bundled`` is samples/tiny-base, ``medium`` a UNet of
Stable Diffusion's kind with 34 million weights on latents of 32 x 32.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

from gralora_diffusion.adapters.layers import GraloraLayer
from gralora_diffusion.base_models.loading import find_base_family
from gralora_diffusion.training.checkpoints.store import CheckpointStore
from gralora_diffusion.training.checks.options import validate
from gralora_diffusion.training.config.training_config import TrainingConfig, parse_config
from gralora_diffusion.training.data.data_module import find_images
from gralora_diffusion.training.loop import Trainer
from gralora_diffusion.training.optimization.optimizers import build_optimizer
from gralora_diffusion.training.outputs.metrics import MetricsFile
from gralora_diffusion.training.runtime.acceleration import (
    accelerate_left_as_it_was,
    compile_repeated_blocks,
    make_accelerator,
)
from tests import ROOT
from tests.performance.measuring import (
    Run,
    add_measuring_options,
    interleaved,
    machine,
    prepare,
    print_results,
    ratios,
    spread,
)
from tests.performance.peers import Sizes, adapted
from tests.tiny.stable_diffusion import build
from tests.training.runs import make_images

TRAINER = "trainer"
#: What the bare loop trains, by the names of ``peers``.
METHODS = ("ours", "peft-lora", "peft-gralora")
#: Base -> side of the images.
BASES = {"tiny": 64, "bundled": 64, "medium": 64}
MEDIUM = {
    "block_out_channels": (128, 256, 256),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "sample_size": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}


def base_folder(name: str, folder: Path) -> Path:
    if name == "bundled":
        return ROOT / "samples" / "tiny-base"
    build(**(MEDIUM if name == "medium" else {})).save_pretrained(folder / name)
    return folder / name


def training_config(
    base: Path, name: str, folder: Path, args: argparse.Namespace
) -> TrainingConfig:
    options = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": make_images(folder / "pictures", 8, BASES[name]),
        "instance_prompt": "a sks toy",
        "resolution": BASES[name],
        "train_batch_size": args.batch_size,
        "rank": args.rank,
        "gralora_k": args.gralora_k,
        "mixed_precision": args.mixed_precision,
        "learning_rate": 1e-4,
        "max_train_steps": 10**6,
        "torch_compile": args.compile,
        "output_dir": folder / "adapter",
    }
    config = parse_config([f"--{key}={value}" for key, value in options.items()])
    validate(config)
    return config


def make_trainer(config: TrainingConfig) -> Trainer:
    family = find_base_family(config)
    accelerator = make_accelerator(config)
    accelerator.init_trackers("benchmark")
    store = CheckpointStore(config.output_dir, config.checkpoints_total_limit)
    trainer = Trainer(config, family, find_images(config), [], accelerator, store)
    trainer.set_up()
    return trainer


def bare_loop(trainer: Trainer, denoiser: nn.Module, device: torch.device) -> Run:
    """One step of a plain loop, with the trainer's latents, prompts and settings."""
    family, config, data = trainer.family, trainer.config, trainer.data
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = build_optimizer(config, parameters)
    stored = [data.instance[position] for position in range(8)]
    latents = torch.stack([sample["mean"] for sample in stored]).to(device).float()
    assert data.prompts is not None
    encoded = {
        key: value.to(device) for key, value in data.prompts.batch([stored[0]["prompt"]]).items()
    }
    scheduler = DDPMScheduler.from_config(trainer.pipe.scheduler.config)
    steps, count = scheduler.config.num_train_timesteps, config.train_batch_size
    of_v = scheduler.config.prediction_type == "v_prediction"
    autocast = trainer.accelerator.autocast

    def step() -> None:
        chosen = latents[torch.randint(len(latents), (count,), device=device)]
        noise = torch.randn_like(chosen)
        timesteps = torch.randint(steps, (count,), device=device)
        noisy = scheduler.add_noise(chosen, noise, timesteps)
        target = scheduler.get_velocity(chosen, noise, timesteps) if of_v else noise
        conditioning = {
            key: value.expand(count, *value.shape[1:]) for key, value in encoded.items()
        }
        with autocast():
            prediction = family.predict(denoiser, noisy.to(denoiser.dtype), timesteps, conditioning)
        loss = F.mse_loss(prediction.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def measure(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        stack.enter_context(accelerate_left_as_it_was())
        # the bar is drawn, but not over this program's own lines
        silent = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stderr(silent))
        folder = Path(place)
        base = base_folder(name, folder)
        trainer = make_trainer(training_config(base, name, folder, args))
        ours = getattr(trainer.pipe, trainer.family.denoiser)
        paths = [path for path, m in ours.named_modules() if isinstance(m, GraloraLayer)]
        frozen = UNet2DConditionModel.from_pretrained(base, subfolder="unet").to(device, ours.dtype)
        frozen.requires_grad_(False).train()
        sizes = Sizes(args.rank, args.gralora_k)
        runs = {}
        for method in METHODS:
            denoiser = adapted(frozen, method, paths, sizes)
            if args.compile:
                compile_repeated_blocks(denoiser)
            runs[method] = bare_loop(trainer, denoiser, device)
        steps = trainer.steps(MetricsFile(folder / "adapter"))
        runs[TRAINER] = lambda: next(steps)
        times = interleaved(runs, device, args.rounds, args.seconds)
        steps.close()
        trainer.accelerator.end_training()
    over = {method: ratios(times[TRAINER], times[method]) for method in METHODS}
    return {
        "base": name,
        "weights": sum(p.numel() for p in frozen.parameters()),
        "layers": len(paths),
        "rounds": len(times[TRAINER]),
        "ms": {run: 1e3 * median(values) for run, values in times.items()},
        "trainer_over": {method: median(values) for method, values in over.items()},
        "spread": {method: spread(values) for method, values in over.items()},
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--gralora_k", type=int, default=2)
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--compile", action="store_true", help="all with --torch_compile")
    add_measuring_options(parser, rounds=61, seconds=60)
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    device = prepare(args)
    where = machine(device, "diffusers", "peft", "accelerate")
    results = [measure(name, args, device) for name in args.bases]
    head = ["base", "weights", "layers", *(f"bare, {m}, ms" for m in METHODS), "trainer, ms"]
    head += [f"trainer / bare, {method}" for method in METHODS]
    lines = [
        [row["base"], f"{row['weights'] / 1e6:.1f} M", str(row["layers"])]
        + [f"{row['ms'][run]:.1f}" for run in (*METHODS, TRAINER)]
        + [f"{row['trainer_over'][m]:.3f} ± {row['spread'][m]:.3f}" for m in METHODS]
        for row in results
    ]
    print_results(args, where, head, lines, results)


if __name__ == "__main__":
    main()
