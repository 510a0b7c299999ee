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
from tiny_base_run import Clock, Run, learning_rate
from tiny_base_stages import build_ema, to_pixels
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
    rng: random.Random, edits: dict[str, Any], size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """Return clean latents, noise, timesteps, latents before the edit, and instructions.

    As published for InstructPix2Pix, 5% of the rows have no instruction, 5% no image to edit, and
    5% neither.
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
        if 0.05 <= share < 0.15:
            before[row] = 0
    return clean, noise, (bands * 1000).long().clamp(max=999), before, captions


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
    denoiser = models.Denoiser(edit_unet(pipe.unet), edit_text_encoder(pipe.text_encoder)).train()
    parameters = list(denoiser.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=1e-2)
    ema = build_ema(denoiser)
    step, spent, losses = 0, 0.0, []
    if state := run.load("edit_checkpoint.pt"):
        denoiser.load_state_dict(state["denoiser"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        step, spent = state["step"], state["spent"]
    clock = Clock(spent)
    while step < steps:
        rate = optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
        clean, noise, timesteps, before, captions = edit_batch(
            run.rng("edit", step), edits, batch_size
        )
        noisy = pipe.scheduler.add_noise(clean, noise, timesteps)
        ids = models.tokenize(pipe.tokenizer, captions)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            prediction = denoiser(torch.cat([noisy, before], dim=1), timesteps, ids)
        target = pipe.scheduler.get_velocity(clean, noise, timesteps)
        loss = functional.mse_loss(prediction.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
        losses.append(loss.item())
        step += 1
        if step % 100 == 0 or step == steps:
            record = {"step": step, "samples": step * batch_size, "loss": sum(losses) / len(losses)}
            run.log(stage="edit", **record, lr=rate, sec=clock.spent)
            losses = []
        if clock.is_time_to_save() or step == steps:
            state = {"denoiser": denoiser.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"ema": ema.state_dict(), "step": step, "spent": clock.spent}
            run.save("edit_checkpoint.pt", state)


def edit_pipeline(run: Run, pipe: StableDiffusionPipeline) -> tuple[Any, int]:
    """Return the pipeline with the averaged weights of the last checkpoint, and its step."""
    state = run.require("edit_checkpoint.pt")
    denoiser = models.Denoiser(edit_unet(pipe.unet), edit_text_encoder(pipe.text_encoder)).eval()
    ema = build_ema(denoiser)
    ema.load_state_dict(state["ema"])
    ema.copy_to(denoiser.parameters())
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
    return edit, state["step"]


def export(run: Run, pipe: StableDiffusionPipeline, output_dir: Path | None) -> None:
    """Write `edits_<step>.png`, and the diffusers folder if one is given.

    Each column is an edit that training has not seen: the image before it, the base's, the drawn
    one.
    """
    edit, step = edit_pipeline(run, pipe)
    rows: list[list[Any]] = [[], [], []]
    for index in range(GRID):
        wanted = tiny_edits.sample(
            random.Random(f"held out {index}"), tiny_edits.KINDS[index % len(tiny_edits.KINDS)]
        )
        before, after = wanted.before.draw(), wanted.after.draw()
        image = edit(
            wanted.instruction,
            before,
            num_inference_steps=25,
            guidance_scale=4.0,
            image_guidance_scale=1.5,
            generator=torch.Generator().manual_seed(index),
        ).images[0]
        for row, shown in zip(rows, (before, image, after), strict=True):
            row.append(shown)
        error = functional.mse_loss(to_pixels([image]), to_pixels([after])).item()
        run.log(stage="export", step=step, instruction=wanted.instruction, error=error)
    make_image_grid([image for row in rows for image in row], 3, GRID).save(
        run.work_dir / f"edits_{step:05d}.png"
    )
    if output_dir is not None:
        edit.vae.half()
        edit.unet.half()  # the text encoder stays in full precision, as in the tiny base
        edit.tokenizer = models.build_tokenizer()
        edit.save_pretrained(output_dir)
        for part in ("vae", "unet"):  # where the tiny base was
            path = output_dir / part / "config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            config.pop("_name_or_path", None)
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
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
