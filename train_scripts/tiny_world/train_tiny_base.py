"""Train the bundled tiny base from scratch: autoencoder, then UNet and text encoder, then export.

    cd train_scripts/tiny_world
    torchrun --nproc_per_node 2 train_tiny_base.py --work_dir ../../runs/tiny-base
    python train_tiny_base.py --work_dir ../../runs/tiny-base        # one process

Every stage resumes from its last checkpoint in the work directory. `--stages export` writes a
snapshot while another process is still training. A run that takes too long may be resumed with
fewer steps, so that the learning rate decreases sooner. Everything runs in full precision; `--bf16`
is for the UNet on a CPU with AVX-512 BF16 or AMX (others emulate bf16 convolutions, which is some
70 times slower).
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny_base_models as models
import tiny_world
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from tiny_base_run import Run
from tiny_base_stages import (
    build_ema,
    encode_world,
    load_vae,
    psnr,
    to_pixels,
    train_unet,
    train_vae,
)

STAGES = ("vae", "latents", "unet", "export")
GRID = 8  # images per side of the grid


def grid_prompts(seen: bool) -> list[str]:
    """Return prompts that go through objects, colors and backgrounds at different paces.

    They are combinations that training used, or (not `seen`) that it left out.
    """
    names, colours = list(tiny_world.OBJECTS), list(tiny_world.COLOURS)
    phrases, prompts = list(tiny_world.BACKGROUNDS), []
    for i in range(GRID * GRID):
        name, colour = names[i % len(names)], colours[(i + i // GRID) % len(colours)]
        unseen = phrases.index(tiny_world.left_out(name, colour))
        step = 1 + i % (len(phrases) - 1) if seen else 0
        phrase = phrases[(unseen + step) % len(phrases)]
        prompts.append(tiny_world.caption(colour, name, phrase))
    return prompts


def draw_grids(
    run: Run, pipe: DiffusionPipeline, step: int, options: Mapping[str, Any]
) -> dict[str, float]:
    """Write the grids of a base after `step` training steps, and their prompts; return the time.

    `grid_<step>.png` shows generated images, `unseen_<step>.png` those of combinations that
    training left out, in 25 steps and with the `options` of the pipeline.
    """
    start = time.monotonic()
    for name, seen in (("grid", True), ("unseen", False)):
        prompts, images = grid_prompts(seen), []
        for row in range(GRID):
            images += pipe(
                prompts[row * GRID : (row + 1) * GRID],
                num_inference_steps=25,
                generator=torch.Generator().manual_seed(row),
                **options,
            ).images
        make_image_grid(images, GRID, GRID).save(run.work_dir / f"{name}_{step:05d}.png")
        listed = "\n".join(prompts) + "\n"
        (run.work_dir / f"{name}_prompts.txt").write_text(listed, encoding="utf-8")
    return {"picture_seconds": (time.monotonic() - start) / (2 * GRID**2)}


def reconstruct(run: Run, pipe: DiffusionPipeline) -> dict[str, float]:
    """Return the autoencoder's quality in dB for images and subjects that it has not seen.

    `reconstructions.png` shows some of them, its output below the originals, subjects last.
    """
    held_out = [tiny_world.sample(random.Random(f"held out {i}")).image for i in range(256)]
    subjects = [
        tiny_world.compose(drawing, colour, phrase, random.Random("held out"))
        for colour, drawing in tiny_world.SUBJECTS.values()
        for phrase in tiny_world.BACKGROUNDS
    ]
    quality, rows = {}, []
    for name, images in (("psnr", held_out), ("subject_psnr", subjects)):
        pixels = to_pixels(images)
        decoded = torch.cat([pipe.vae(part).sample for part in pixels.split(64)])
        quality[name] = psnr(decoded, pixels)
        show = slice(None, None, len(images) // GRID)
        rows += images[show][:GRID]
        rows += pipe.image_processor.postprocess(decoded[show][:GRID], output_type="pil")
    make_image_grid(rows, 4, GRID).save(run.work_dir / "reconstructions.png")
    return quality


@torch.no_grad()
def export(run: Run, output_dir: Path) -> None:
    """Write the diffusers folder, and sample images into the work directory."""
    if not run.accelerator.is_main_process:
        return
    tokenizer, state = models.build_tokenizer(), run.require("unet_checkpoint.pt")
    denoiser = models.Denoiser(models.build_unet(), models.build_text_encoder(tokenizer)).eval()
    ema = build_ema(denoiser)
    ema.load_state_dict(state["ema"])
    ema.copy_to(denoiser.parameters())
    vae = load_vae(run, "vae_normalised.pt")
    pipe = models.build_pipeline(vae, denoiser, tokenizer)
    pipe.set_progress_bar_config(disable=True)

    quality = reconstruct(run, pipe)
    seconds = draw_grids(run, pipe, state["step"], {"guidance_scale": 4.0})
    run.log(stage="export", step=state["step"], **quality, **seconds)
    # The text encoder stays in full precision: transformers would load it in the dtype of its file,
    # while diffusers loads the others in full precision, so a plain from_pretrained would not run.
    pipe.vae.half()
    pipe.unet.half()
    pipe.tokenizer = (
        models.build_tokenizer()
    )  # a used tokenizer would be saved with its last padding
    pipe.save_pretrained(output_dir)
    for path in output_dir.rglob("*.safetensors"):
        path.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--work_dir", type=Path, required=True, help="folder for checkpoints and log"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("samples/tiny-base"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae_steps", type=int, default=5_000)
    parser.add_argument("--unet_steps", type=int, default=12_000)
    parser.add_argument("--vae_batch_size", type=int, default=8, help="batch size per process")
    parser.add_argument("--unet_batch_size", type=int, default=16, help="batch size per process")
    parser.add_argument(
        "--pictures", type=int, default=24_000, help="number of images to encode for the UNet"
    )
    parser.add_argument("--bf16", action="store_true", help="use bf16 autocast for the UNet")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # two processes with one thread each are faster than two threads
    torch.set_flush_denormal(True)
    set_seed(args.seed)
    run = Run(Accelerator(cpu=True), args.work_dir, args.seed)
    if "vae" in args.stages:
        train_vae(run, models.build_vae(), args.vae_steps, args.vae_batch_size, peak=2e-3)
    if "latents" in args.stages:
        encode_world(run, args.pictures)
    if "unet" in args.stages:
        train_unet(run, args.unet_steps, args.unet_batch_size, peak=1e-3, bf16=args.bf16)
    if "export" in args.stages:
        export(run, args.output_dir)


if __name__ == "__main__":
    main()
