"""Continue the bundled tiny base in the shape of FLUX.1 as one that edits, as FLUX.1 Kontext does.

    python train_scripts/tiny_world/train_tiny_kontext_base.py --work_dir runs/tiny-kontext --bf16

The transformer gets the latents of the image to edit as further tokens, with position ids that
begin with 1 (arXiv 2506.15742). It has no new weights. Transformer and text encoders are trained,
by flow matching on the pairs of `tiny_edits`. Training resumes from its last checkpoint in the
work directory, and `--only_export` shows what a run that is still training has reached.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import tiny_flux_models as models
import tiny_world
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import FluxKontextPipeline
from PIL import Image
from tiny_base_run import Run
from tiny_base_stages import load_average, train_denoiser
from torch import nn
from train_tiny_edit_base import draw_edits, edit_batch, encode_edits, forget_origin
from train_tiny_flux_base import LENGTHS, OPTIONS, flow_loss, flow_sigmas, save

BASE = Path(__file__).resolve().parents[2] / "samples/tiny-flux-base"


def build_denoiser(pipe: FluxKontextPipeline) -> models.Denoiser:
    return models.Denoiser(pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)


def train(
    run: Run,
    pipe: FluxKontextPipeline,
    pairs: int,
    steps: int,
    batch_size: int,
    peak: float,
    bf16: bool,
) -> None:
    """Train transformer and text encoders; `kontext_checkpoint.pt` also has their average."""
    edits = encode_edits(run, pipe.vae, pairs)
    tokenizers = pipe.tokenizer, pipe.tokenizer_2

    def loss_of(model: nn.Module, step: int) -> torch.Tensor:
        # Kontext has no guidance by the image, so every row has one
        clean, noise, bands, before, captions = edit_batch(
            run.rng("kontext", step), edits, batch_size, image_dropout=0
        )
        t5_tokens = run.rng("length", step).choices(*LENGTHS)[0]
        return flow_loss(
            model,
            tokenizers,
            captions,
            t5_tokens,
            models.pack(clean),
            models.pack(noise),
            flow_sigmas(bands),
            bf16,
            models.pack(before),
        )

    train_denoiser(run, "kontext", build_denoiser(pipe), steps, batch_size, peak, loss_of)


@torch.no_grad()
def export(run: Run, pipe: FluxKontextPipeline, output_dir: Path | None) -> None:
    """Write the grid of `draw_edits`, and the diffusers folder if one is given."""
    step = load_average(run, "kontext", build_denoiser(pipe))
    pipe.set_progress_bar_config(disable=True)

    def edit(instruction: str, before: Image.Image, generator: torch.Generator) -> Image.Image:
        # the pipeline would make images of Kontext's sizes, which have a megapixel
        sizes = {**OPTIONS, "max_area": tiny_world.SIZE**2, "_auto_resize": False}
        return pipe(
            before, instruction, num_inference_steps=25, generator=generator, **sizes
        ).images[0]

    draw_edits(run, step, edit)
    if output_dir is not None:
        save(pipe, output_dir)
        forget_origin(output_dir)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work_dir", type=Path, required=True, help="checkpoints, log, grid")
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--output_dir", type=Path, help="the diffusers folder to write")
    parser.add_argument("--only_export", action="store_true", help="do not train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=12_000, help="pairs to encode")
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="use bf16 autocast for the transformer")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    set_seed(args.seed)
    run = Run(Accelerator(cpu=True), args.work_dir, args.seed)
    pipe = FluxKontextPipeline.from_pretrained(args.base)
    if not args.only_export:
        peak = args.learning_rate
        train(run, pipe, args.pairs, args.steps, args.batch_size, peak, args.bf16)
    export(run, pipe, args.output_dir)


if __name__ == "__main__":
    main()
