"""Train a tiny base in the shape of FLUX.1, which starts from parts of the bundled tiny base.

    python train_scripts/tiny_world/train_tiny_flux_base.py --work_dir runs/tiny-flux-base --bf16

The autoencoder and the CLIP text encoder continue those of the tiny base. The T5 encoder and the
transformer are trained from scratch, by flow matching. Every stage resumes from its last checkpoint
in the work directory. A run that takes too long may be resumed with fewer steps.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import tiny_base_models as base_models
import tiny_flux_models as models
import tiny_world
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, FluxPipeline, StableDiffusionPipeline
from tiny_base_run import Run
from tiny_base_stages import (
    load_average,
    train_denoiser,
    train_vae,
    world_latents,
    world_rng,
)
from torch import nn
from torch.nn import functional
from train_tiny_base import draw_grids, reconstruct
from transformers import CLIPTokenizer, T5Tokenizer

BASE = Path(__file__).resolve().parents[2] / "samples/tiny-base"
#: how the pipeline generates 64x64 pixels; its own defaults are those of FLUX
OPTIONS = {
    "height": tiny_world.SIZE,
    "width": tiny_world.SIZE,
    "max_sequence_length": models.T5_TOKENS,
}
#: lengths of T5 prompts in training and their shares: pipelines pad to whatever they are told
LENGTHS = ((models.T5_TOKENS, 64, 256), (85, 10, 5))
STAGES = ("vae", "latents", "transformer", "export")


def build_denoiser(base: StableDiffusionPipeline) -> tuple[models.Denoiser, Any]:
    """Return the untrained denoiser, but for the base's text encoder, and the T5 tokenizer."""
    tokenizer_2 = models.build_t5_tokenizer(base.tokenizer)
    denoiser = models.Denoiser(
        models.build_transformer(), base.text_encoder, models.build_t5(tokenizer_2)
    )
    return denoiser, tokenizer_2


@torch.no_grad()
def encode(run: Run, count: int) -> None:
    """Encode `count` images once, and write their latents (count, 16, 16, 16) in half precision."""
    if run.load("latents.pt"):
        return
    mean, _ = world_latents(run, load_vae(run), count)
    run.save("latents.pt", {"mean": mean.half()})


def load_vae(run: Run) -> AutoencoderKL:
    """Return the autoencoder that its stage wrote to the work directory."""
    vae = models.build_vae().eval()
    vae.load_state_dict(run.require("vae.pt"))
    return vae


def flow_batch(
    rng: random.Random,
    latents: torch.Tensor,
    shown: list[tuple[str, str, str]],
    size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """Return clean tokens, noise, sigmas and captions; `shown` describes the latents' images.

    The sigmas are logit-normal, one from each of `size` equally likely bands, which steadies the
    loss. A tenth of the captions are empty, for guidance.
    """
    chosen = [rng.randrange(len(shown)) for _ in range(size)]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    clean = models.pack(latents[chosen].float())
    noise = torch.randn(clean.shape, generator=generator)
    bands = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    captions = [
        "" if rng.random() < 0.1 else tiny_world.describe(*shown[index], rng) for index in chosen
    ]
    return clean, noise, flow_sigmas(bands), captions


def flow_sigmas(bands: torch.Tensor) -> torch.Tensor:
    """Return logit-normal sigmas, from positions in their distribution from 0 to 1."""
    return torch.special.ndtri(bands.clamp(1e-4, 1 - 1e-4)).mul(1.2).sigmoid()


def flow_loss(
    model: nn.Module,
    tokenizers: tuple[CLIPTokenizer, T5Tokenizer],
    captions: list[str],
    t5_tokens: int,
    clean: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    bf16: bool,
    before: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the mean squared error of a `Denoiser`'s velocity.

    `clean`, `noise` and `before` are packed latents (b, 64, 64); T5 prompts are padded to
    `t5_tokens`.
    """
    level = sigmas[:, None, None]
    ids = base_models.tokenize(tokenizers[0], captions)
    t5_ids = tokenizers[1](
        captions, padding="max_length", max_length=t5_tokens, return_tensors="pt"
    ).input_ids
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        prediction = model((1 - level) * clean + level * noise, sigmas, ids, t5_ids, before)
    return functional.mse_loss(prediction.float(), noise - clean)


def train_transformer(
    run: Run,
    base: StableDiffusionPipeline,
    steps: int,
    batch_size: int,
    peak: float,
    bf16: bool,
) -> None:
    """Train transformer and text encoders; `flux_checkpoint.pt` also has their average."""
    latents = run.require("latents.pt")["mean"]
    shown = [tiny_world.combination(world_rng(run, index)) for index in range(len(latents))]
    denoiser, tokenizer_2 = build_denoiser(base)
    tokenizers = base.tokenizer, tokenizer_2

    def loss_of(model: nn.Module, step: int) -> torch.Tensor:
        rng = run.rng("flux", step)
        clean, noise, sigmas, captions = flow_batch(rng, latents, shown, batch_size)
        t5_tokens = run.rng("length", step).choices(*LENGTHS)[0]
        return flow_loss(model, tokenizers, captions, t5_tokens, clean, noise, sigmas, bf16)

    train_denoiser(run, "flux", denoiser, steps, batch_size, peak, loss_of)


def trained_pipeline(run: Run, base: StableDiffusionPipeline) -> tuple[FluxPipeline, int]:
    """Return the pipeline with the averaged weights of the last checkpoint, and its step."""
    denoiser, tokenizer_2 = build_denoiser(base)
    step = load_average(run, "flux", denoiser)
    pipe = models.build_pipeline(load_vae(run), denoiser, base.tokenizer, tokenizer_2)
    pipe.set_progress_bar_config(disable=True)
    return pipe, step


@torch.no_grad()
def export(run: Run, base: StableDiffusionPipeline, output_dir: Path) -> None:
    """Write the diffusers folder, and the tiny base's sample images into the work directory."""
    pipe, step = trained_pipeline(run, base)
    quality, seconds = reconstruct(run, pipe), draw_grids(run, pipe, step, OPTIONS)
    run.log(stage="export", step=step, **quality, **seconds)
    save(pipe, output_dir)


def save(pipe: FluxPipeline, output_dir: Path) -> None:
    """Write the diffusers folder of a pipeline, which is in half precision then."""
    pipe.vae.half()
    pipe.transformer.half()  # the text encoders stay in full precision, as in the tiny base
    pipe.tokenizer = base_models.build_tokenizer()  # used ones would be saved with their padding
    pipe.tokenizer_2 = models.build_t5_tokenizer(pipe.tokenizer)
    pipe.save_pretrained(output_dir)
    for path in output_dir.rglob("*.safetensors"):
        path.chmod(0o644)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work_dir", type=Path, required=True, help="checkpoints, log, grids")
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--output_dir", type=Path, default=Path("samples/tiny-flux-base"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae_steps", type=int, default=450)
    parser.add_argument("--vae_batch_size", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=12_000, help="images to encode")
    parser.add_argument("--steps", type=int, default=6_400)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--bf16", action="store_true", help="use bf16 autocast for the transformer")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    set_seed(args.seed)
    run = Run(Accelerator(cpu=True), args.work_dir, args.seed)
    base = StableDiffusionPipeline.from_pretrained(args.base)
    if "vae" in args.stages:
        vae, regularize = models.continue_vae(base.vae), models.distance_from_normal
        train_vae(run, vae, args.vae_steps, args.vae_batch_size, 3e-4, regularize)
    if "latents" in args.stages:
        encode(run, args.pictures)
    if "transformer" in args.stages:
        train_transformer(run, base, args.steps, args.batch_size, 1e-3, args.bf16)
    if "export" in args.stages:
        export(run, base, args.output_dir)


if __name__ == "__main__":
    main()
