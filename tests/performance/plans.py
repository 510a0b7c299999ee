"""Plans against the resident memory of the same runs: ``python -m tests.performance.plans``.

Trains on random bases of about ``--megabytes``, on the CPU: whole, with gradient checkpointing,
streamed, and in two processes that share the base. For the phases of loading and encoding, and for
the steps, it prints the peak of the plan and that of the process. Libraries grow, too, when they
are first used. How much is shown by the same run on a tiny base, and is subtracted. It needs Linux,
which counts the peaks.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gralora_diffusion.base_models.loading import find_base_family
from gralora_diffusion.training.config.training_config import parse_config
from gralora_diffusion.training.data.data_module import find_images
from gralora_diffusion.training.dry_run.memory_check import with_offloading
from gralora_diffusion.training.dry_run.plan import plan_run
from gralora_diffusion.training.runtime.sharding import Sharding
from tests.forked import Forked, fork_ranks
from tests.models import PIPELINES, stable_diffusion
from tests.performance.recipes import Processes
from tests.performance.sharding import GROWTH, filled, make_base
from tests.training.runs import arguments, make_images

#: Prints the peaks until the end of loading and encoding, and of the steps.
PROGRAM = f"""
import sys
from gralora_diffusion.training import loop, run
from gralora_diffusion.training.config.training_config import parse_config
{GROWTH}
class Trainer(loop.Trainer):
    def _set_up_models(self):
        super()._set_up_models()
        # weights are mapped from files, which counts as far as they were read and for too long:
        # they get memory of their own, as on a device, and the peak is counted from here on
        for model in self.pipe.components.values():
            for parameter in model.parameters() if hasattr(model, "parameters") else ():
                if parameter.untyped_storage().nbytes() >= parameter.nbytes:  # no placeholder
                    parameter.data = parameter.data.clone()
        Path("/proc/self/clear_refs").write_text("5")

    def set_up(self):
        super().set_up()
        print("growth", growth())
        Path("/proc/self/clear_refs").write_text("5")

run.Trainer = Trainer
run.train(parse_config(sys.argv[1:]))
print("growth", growth())
"""
#: Rows of a plan that only the steps have.
OF_STEPS = ("optimizer", "gathered", "ring", "ema", "exchange", "activations", "gradients")
#: name of a way to train -> its options.
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "checkpointing": {"gradient_checkpointing": True},
    "streamed": {"gradient_checkpointing": True, "offload_base": "blocks"},
    "2 processes": {"gradient_checkpointing": True},
}


def flux(folder: Path, size: int) -> None:
    """Write a base whose larger text encoder has half of the denoiser's size."""
    make_base(folder, size, 512 if size else 32, size // 2)


def flux2_klein(folder: Path, size: int) -> None:
    pipe = PIPELINES["flux2-klein"]()
    config = dict(pipe.transformer.config) | ({"num_attention_heads": 48} if size else {})

    def denoiser(layers: int) -> Any:
        return type(pipe.transformer).from_config(config | {"num_single_layers": layers})

    pipe.transformer = filled(denoiser, size)
    pipe.save_pretrained(folder)


def unet(folder: Path, size: int) -> None:
    widths = (192, 384, 768) if size else (32, 32, 32)
    pipe = stable_diffusion(
        block_out_channels=widths,
        down_block_types=(*["CrossAttnDownBlock2D"] * 2, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 2),
        layers_per_block=2,
        cross_attention_dim=64,
        norm_num_groups=32,
    )
    pipe.unet.to(torch.bfloat16)
    pipe.save_pretrained(folder)


BASES: dict[str, Callable[[Path, int], None]] = {
    "flux": flux,
    "flux2-klein": flux2_klein,
    "stable-diffusion": unet,
}


@dataclass(frozen=True)
class Peaks:
    """Bytes at the peak of loading and encoding, and of the steps."""

    before: int
    steps: int


def measure(base: Path, images: Path, output: Path, way: str, resolution: int) -> Peaks:
    """Return by how much the memory of a process grew; of two, of the one that grew more."""
    line = options(base, images, output, way, resolution)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ["ACCELERATE_USE_FSDP"] = str(way == "2 processes").lower()
    if way == "2 processes":
        results = fork_ranks(PROGRAM, *line, timeout=1800)
    else:
        results = [Forked(PROGRAM, *line).wait(1800)]
    found = []
    for code, text in results:
        if code:
            raise RuntimeError(text[-3000:])
        lines = [line.split() for line in text.splitlines()]
        found.append([int(line[1]) for line in lines if line[:1] == ["growth"]])
    return Peaks(*(max(sizes) for sizes in zip(*found, strict=True)))


def planned(base: Path, images: Path, output: Path, way: str, resolution: int) -> Peaks:
    """Return the peaks of the plan for the CPU."""
    config = parse_config(options(base, images, output, way, resolution))
    accelerator = Processes(cpu=True, mixed_precision="bf16")
    sharding = None
    if way == "2 processes":
        accelerator.count, sharding = 2, Sharding()
    family, examples = find_base_family(config), find_images(config)
    plan = plan_run(config, family, examples, [], accelerator, sharding)
    plan = with_offloading(plan, config, sharding, 1 << 60)
    before = [plan.peak(phase) for phase in plan.phases if phase != "steps"]
    # a base in parts is whole only after everything is encoded
    rows = (row for row in plan.memory if row.name not in OF_STEPS)
    loaded = sum(row.bytes.get("steps", 0) for row in rows)
    return Peaks(max(*before, loaded), plan.peak("steps"))


def options(base: Path, images: Path, output: Path, way: str, resolution: int) -> list[str]:
    """Return the command line of a run."""
    return arguments(
        pretrained_model_name_or_path=base,
        instance_data_dir=images,
        output_dir=output,
        mixed_precision="bf16",
        max_train_steps=2,
        train_batch_size=1,
        resolution=resolution,
        **WAYS[way],
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=400, help="size of the denoiser")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    heads = ("base", "way", "phase", "plan MB", "measured MB", "besides MB", "of plan")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = make_images(folder / "images", 1, args.resolution)
        for name in args.bases:
            for label, size in (("large", args.megabytes * 1_000_000), ("tiny", 0)):
                BASES[name](folder / name / label, size)
            for way in args.ways:
                runs = {
                    label: (folder / name / label, images, folder / f"{name} {way} {label}", way)
                    for label in ("large", "tiny")
                }
                plans = {label: planned(*run, args.resolution) for label, run in runs.items()}
                found = {label: measure(*run, args.resolution) for label, run in runs.items()}
                for phase in ("before", "steps"):
                    plan, tiny = (getattr(plans[label], phase) for label in ("large", "tiny"))
                    besides = max(0, getattr(found["tiny"], phase) - tiny)
                    measured = getattr(found["large"], phase) - besides
                    numbers = [f"{n / 1e6:,.0f}" for n in (plan, measured, besides)]
                    cells = [name, way, phase, *numbers, f"{measured / plan:.2f}"]
                    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
