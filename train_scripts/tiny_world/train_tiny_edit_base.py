"""Continue the bundled tiny base as one that edits images, in the shape of InstructPix2Pix.

    python train_scripts/tiny_world/train_tiny_edit_base.py --work_dir runs/tiny-edit-base

The UNet gets the latents of the image to edit as further channels (arXiv 2211.09800), with weights
that are zero at first. To keep the base small, its UNet has no middle block and its text encoder
one layer. Training resumes from its last checkpoint in the work directory.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_base_models as models
import tiny_edits
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import (
    AutoencoderKL,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import make_image_grid
from PIL import Image
from tiny_base_run import Run
from tiny_base_stages import load_average, to_pixels, train_denoiser
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel

BASE = Path(__file__).resolve().parents[2] / "samples/tiny-base"
GRID = 8  # edits in the grid


def edit_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return a UNet for noisy latents and those of the image to edit, with this one's weights."""
    channels = unet.config.in_channels
    larger = UNet2DConditionModel.from_config(
        unet.config, in_channels=2 * channels, mid_block_type=None
    )
    state = {k: v for k, v in unet.state_dict().items() if not k.startswith("mid_block.")}
    added = torch.zeros_like(state["conv_in.weight"])
    state["conv_in.weight"] = torch.cat([state["conv_in.weight"], added], dim=1)
    larger.load_state_dict(state)
    return larger


def edit_text_encoder(encoder: CLIPTextModel) -> CLIPTextModel:
    """Return a text encoder with the first of this one's layers."""
    config = type(encoder.config).from_dict({**encoder.config.to_dict(), "num_hidden_layers": 1})
    smaller = CLIPTextModel(config)
    known = smaller.state_dict().keys()
    smaller.load_state_dict({k: v for k, v in encoder.state_dict().items() if k in known})
    return smaller


@torch.no_grad()
def encode_edits(run: Run, vae: AutoencoderKL, count: int) -> dict[str, Any]:
    """Return latents (count, 8, 16, 16) before and after each edit, and the instructions."""
    if saved := run.load("edits.pt"):
        return saved
    edits = [tiny_edits.sample(random.Random(f"{run.seed}/edit/{i}")) for i in range(count)]
    before, mean, std = [], [], []
    for start in range(0, count, 32):
        part = edits[start : start + 32]
        before.append(vae.encode(to_pixels([e.before.draw() for e in part])).latent_dist.mode())
        after = vae.encode(to_pixels([e.after.draw() for e in part])).latent_dist
        mean.append(after.mean)
        std.append(after.std)
    encoded = {
        "before": torch.cat(before).half(),
        "mean": torch.cat(mean).half(),
        "std": torch.cat(std).half(),
        "instructions": [e.instruction for e in edits],
    }
    run.save("edits.pt", encoded)
    return encoded


def edit_batch(
    rng: random.Random, edits: dict[str, Any], size: int, image_dropout: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """Return clean latents, noise, levels, latents before the edit, and instructions.

    The levels are from 0 to 1, one from each of `size` equal bands, which steadies the loss. A
    tenth of the rows have no instruction, and a share of `image_dropout` no image to edit. As
    published for InstructPix2Pix, half of the rows without one do not have the other either.
    """
    chosen = [rng.randrange(len(edits["instructions"])) for _ in range(size)]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    mean, std = edits["mean"][chosen].float(), edits["std"][chosen].float()
    clean = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    bands = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    before, captions = edits["before"][chosen].float(), []
    for row, index in enumerate(chosen):
        share = rng.random()
        captions.append("" if share < 0.1 else edits["instructions"][index])
        if 0.05 <= share < 0.05 + image_dropout:
            before[row] = 0
    return clean, noise, bands, before, captions


def train(
    run: Run,
    pipe: StableDiffusionPipeline,
    pairs: int,
    steps: int,
    batch_size: int,
    peak: float,
    bf16: bool,
) -> None:
    """Train UNet and text encoder; `edit_checkpoint.pt` also has their average."""
    edits = encode_edits(run, pipe.vae, pairs)
    denoiser = models.Denoiser(edit_unet(pipe.unet), edit_text_encoder(pipe.text_encoder))

    def loss_of(model: nn.Module, step: int) -> torch.Tensor:
        clean, noise, bands, before, captions = edit_batch(run.rng("edit", step), edits, batch_size)
        timesteps = (bands * 1000).long().clamp(max=999)
        noisy = pipe.scheduler.add_noise(clean, noise, timesteps)
        ids = models.tokenize(pipe.tokenizer, captions)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            prediction = model(torch.cat([noisy, before], dim=1), timesteps, ids)
        target = pipe.scheduler.get_velocity(clean, noise, timesteps)
        return functional.mse_loss(prediction.float(), target)

    train_denoiser(run, "edit", denoiser, steps, batch_size, peak, loss_of)


def edit_pipeline(run: Run, pipe: StableDiffusionPipeline) -> tuple[Any, int]:
    """Return the pipeline with the averaged weights of the last checkpoint, and its step."""
    denoiser = models.Denoiser(edit_unet(pipe.unet), edit_text_encoder(pipe.text_encoder))
    step = load_average(run, "edit", denoiser)
    edit = StableDiffusionInstructPix2PixPipeline(
        vae=pipe.vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=pipe.tokenizer,
        unet=denoiser.unet,
        scheduler=pipe.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    edit.set_progress_bar_config(disable=True)
    return edit, step


def draw_edits(
    run: Run, step: int, edit: Callable[[str, Image.Image, torch.Generator], Image.Image]
) -> None:
    """Write `edits_<step>.png`, and log how far the images are from the drawn ones.

    Each column is an edit that training has not seen: the image before it, the one that `edit`
    returns for an instruction, the image and a generator, and the drawn one.
    """
    rows: list[list[Image.Image]] = [[], [], []]
    for index in range(GRID):
        wanted = tiny_edits.sample(
            random.Random(f"held out {index}"), tiny_edits.KINDS[index % len(tiny_edits.KINDS)]
        )
        before, after = wanted.before.draw(), wanted.after.draw()
        image = edit(wanted.instruction, before, torch.Generator().manual_seed(index))
        for row, shown in zip(rows, (before, image, after), strict=True):
            row.append(shown)
        error = functional.mse_loss(to_pixels([image]), to_pixels([after])).item()
        run.log(stage="export", step=step, instruction=wanted.instruction, error=error)
    make_image_grid([image for row in rows for image in row], 3, GRID).save(
        run.work_dir / f"edits_{step:05d}.png"
    )


def forget_origin(folder: Path) -> None:
    """Remove where the base was that a diffusers folder was made from."""
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def export(run: Run, pipe: StableDiffusionPipeline, output_dir: Path | None) -> None:
    """Write the grid of `draw_edits`, and the diffusers folder if one is given."""
    edit, step = edit_pipeline(run, pipe)
    options = {"num_inference_steps": 25, "guidance_scale": 4.0, "image_guidance_scale": 1.5}
    draw_edits(
        run,
        step,
        lambda instruction, before, generator: edit(
            instruction, before, generator=generator, **options
        ).images[0],
    )
    if output_dir is not None:
        edit.vae.half()
        edit.unet.half()  # the text encoder stays in full precision, as in the tiny base
        edit.tokenizer = models.build_tokenizer()
        edit.save_pretrained(output_dir)
        forget_origin(output_dir)
        for path in output_dir.rglob("*.safetensors"):
            path.chmod(0o644)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work_dir", type=Path, required=True, help="checkpoints, log, grid")
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--output_dir", type=Path, help="the diffusers folder to write")
    parser.add_argument("--only_export", action="store_true", help="do not train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=8_000, help="pairs to encode")
    parser.add_argument("--steps", type=int, default=1_400)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="use bf16 autocast for the UNet")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    set_seed(args.seed)
    run = Run(Accelerator(cpu=True), args.work_dir, args.seed)
    pipe = StableDiffusionPipeline.from_pretrained(args.base)
    if not args.only_export:
        peak = args.learning_rate
        train(run, pipe, args.pairs, args.steps, args.batch_size, peak, args.bf16)
    export(run, pipe, args.output_dir)


if __name__ == "__main__":
    main()
