"""The memory of two processes that share out a base: ``python -m tests.performance.sharding``.

Makes a FLUX-shaped base of ``--gigabytes`` whose other models are tiny, and trains on it in two
processes on the CPU, with and without FSDP. Prints by how much the memory of each process had grown
at most when everything was loaded, and at the end, beside what sharding promises: its part of the
weights and the blocks that are gathered at once. A run on a base of ``--gigabytes 0`` shows what
grows besides. It needs Linux, which counts the peaks.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from transformers import T5Config, T5EncoderModel

from gralora_diffusion.training.runtime.sharding import Sharding
from tests.forked import fork_ranks
from tests.models import PIPELINES
from tests.originals import write
from tests.originals.flux import transformer_tensors
from tests.training.runs import arguments, make_images

#: Defines ``growth``: by how many bytes the resident memory has grown at most. glibc would keep
#: freed blocks of up to 32 MiB, whose holes would count as used (``M_MMAP_THRESHOLD`` is -3).
GROWTH = """
import ctypes
from pathlib import Path

ctypes.CDLL(None).mallopt(-3, 1 << 20)

def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
before = kib("VmRSS")

def growth():
    return (kib("VmHWM") - before) * 1024
"""
PROGRAM = f"""
import sys
from gralora_diffusion.training import loop, run
from gralora_diffusion.training.config.training_config import parse_config
{GROWTH}
class Trainer(loop.Trainer):
    def set_up(self):
        super().set_up()
        print("growth", growth())

run.Trainer = Trainer
run.train(parse_config(sys.argv[1:]))
print("growth", growth())
"""


def make_base(folder: Path, size: int, width: int = 1536, encoder_size: int = 0) -> Any:
    """Write a base of FLUX's kind in bf16; return its pipeline, with empty models.

    Args:
        size: bytes of the denoiser, about.
        width: of the denoiser, a multiple of 16. A narrow one can be smaller.
        encoder_size: bytes of the larger text encoder, about; by default it is tiny.
    """
    pipe = PIPELINES["flux"]()
    heads = {"attention_head_dim": 16, "num_attention_heads": width // 16}
    small = dict(pipe.transformer.config) | heads | {"num_layers": 1}

    def denoiser(layers: int) -> FluxTransformer2DModel:
        return FluxTransformer2DModel.from_config(small | {"num_single_layers": layers})

    def encoder(layers: int) -> T5EncoderModel:
        config = T5Config.from_dict(
            pipe.text_encoder_2.config.to_dict() | {"num_layers": layers, "d_ff": 1 << 16}
        )
        return T5EncoderModel(config)

    pipe.transformer = filled(denoiser, size)
    if encoder_size:
        pipe.text_encoder_2 = filled(encoder, encoder_size)
    pipe.save_pretrained(folder)
    for model in (pipe.transformer, pipe.text_encoder_2):
        model.to("meta")
    return pipe


def filled(model_of: Callable[[int], Any], size: int) -> Any:
    """Return a model with so many layers that it has about ``size`` bytes in bf16."""
    with torch.device("meta"):
        bytes_of = [sum(p.numel() for p in model_of(n).parameters()) * 2 for n in (1, 2)]
        more = max(0, round((size - bytes_of[0]) / (bytes_of[1] - bytes_of[0])))
        model = model_of(1 + more)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e-3)
    return model


def write_file(folder: Path, path: Path) -> Path:
    """Write the denoiser of a base to an original single file."""
    model = FluxTransformer2DModel.from_pretrained(folder / "transformer", dtype=torch.bfloat16)
    return write(transformer_tensors(model), path)


def growths(base: Path, images: Path, output: Path, sharded: bool) -> list[list[int]]:
    """Return how far the memory of each process grew while loading, and over two steps."""
    os.environ["ACCELERATE_USE_FSDP"] = str(sharded).lower()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    line = arguments(
        pretrained_model_name_or_path=base,
        instance_data_dir=images,
        output_dir=output,
        mixed_precision="bf16",
        max_train_steps=2,
        train_batch_size=1,
        gradient_checkpointing=True,
    )
    found: list[list[int]] = []
    for code, text in fork_ranks(PROGRAM, *line, timeout=1800):
        if code:
            raise RuntimeError(text[-3000:])
        lines = [line.split() for line in text.splitlines()]
        found.append([int(line[1]) for line in lines if line[:1] == ["growth"]])
    return found


def main() -> None:
    command = argparse.ArgumentParser(prog="python -m tests.performance.sharding")
    command.add_argument("--gigabytes", type=float, default=2.0)
    args = command.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make_base(folder / "base", int(args.gigabytes * 1e9)).transformer
        images = make_images(folder / "images")
        whole = sum(p.nbytes for p in model.parameters())
        part, gathered = Sharding().bytes_needed(model, 2)
        print(f"denoiser {whole / 1e9:.2f} GB, promised {(part + gathered) / 1e9:.2f} GB")
        for sharded in (True, False):
            found = growths(folder / "base", images, folder / f"run_{sharded}", sharded)
            text = ", ".join(" and ".join(f"{size / 1e9:.2f} GB" for size in one) for one in found)
            print(f"{'in parts' if sharded else 'whole'}: {text}", flush=True)


if __name__ == "__main__":
    main()
