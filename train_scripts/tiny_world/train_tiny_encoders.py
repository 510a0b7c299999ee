"""Train the encoders that evaluate images of the tiny world, measure their power, write them.

    python train_scripts/tiny_world/train_tiny_encoders.py --work_dir runs/tiny-encoders

Images are drawn on the fly. Training resumes from the last checkpoint in the work directory;
`--encoders dino` trains one of the two. Their power is measured on the subjects, which neither
encoder has seen.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_encoders as encoders
import tiny_world
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from tiny_base_models import build_tokenizer, tokenize
from tiny_base_run import Clock, Run, learning_rate
from tiny_base_stages import to_pixels
from torch import nn
from torch.nn import functional
from transformers import BitImageProcessor, CLIPImageProcessor, CLIPModel

RETRIEVAL = 64  # prompts to choose from


def train(
    run: Run,
    name: str,
    steps: int,
    model: nn.Module,
    loss_of: Callable[[random.Random], torch.Tensor],
) -> None:
    """Train to the given step, with checkpoints in `<name>_checkpoint.pt`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)
    step, spent, losses = 0, 0.0, []
    if state := run.load(f"{name}_checkpoint.pt"):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    clock = Clock(spent)
    model.train()
    while step < steps:
        rate = optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak=1e-3)
        loss = loss_of(run.rng(name, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
        if step % 50 == 0 or step == steps:
            mean = sum(losses) / len(losses)
            run.log(stage=name, step=step, loss=mean, lr=rate, sec=clock.spent)
            losses = []
        if clock.is_time_to_save() or step == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            run.save(f"{name}_checkpoint.pt", {**state, "step": step, "spent": clock.spent})
    model.eval()


def auc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Return the fraction of pairs in which the positive scores higher; ties count half."""
    above = positive[:, None] - negative[None, :]
    return ((above > 0).double() + 0.5 * (above == 0).double()).mean().item()


def read_subjects(folder: Path, split: str) -> dict[str, torch.Tensor]:
    """Read the pixels (n, 3, 64, 64) of every subject's images in the split."""

    def read(name: str) -> torch.Tensor:
        paths = sorted((folder / name / split).glob("*.png"))
        return to_pixels([Image.open(path).convert("RGB") for path in paths])

    return {name: read(name) for name in sorted(tiny_world.SUBJECTS)}


@torch.no_grad()
def subject_power(embed: Callable[[torch.Tensor], torch.Tensor], folder: Path) -> dict[str, float]:
    """Measure how well similarity to a subject's training images finds it on other backgrounds.

    The score of an image is its mean cosine similarity to the training images. Each subject has an
    AUC of its held-out images against those of all other subjects, and one against images of the
    world's objects. The result contains the means and the worst.
    """
    references = {k: embed(v) for k, v in read_subjects(folder, "train").items()}
    held_out = {k: embed(v) for k, v in read_subjects(folder, "held_out").items()}
    world = [tiny_world.sample(random.Random(f"power {i}")).image for i in range(256)]
    world_embeds = embed(to_pixels(world))
    against_subjects, against_world, same, other = [], [], [], []
    for name, reference in references.items():
        own = (held_out[name] @ reference.T).mean(dim=1)
        others = torch.cat([e for k, e in held_out.items() if k != name])
        strangers = (others @ reference.T).mean(dim=1)
        against_subjects.append(auc(own, strangers))
        against_world.append(auc(own, (world_embeds @ reference.T).mean(dim=1)))
        same.append(own.mean().item())
        other.append(strangers.mean().item())
    count = len(references)
    return {
        "auc_subjects": sum(against_subjects) / count,
        "auc_subjects_worst": min(against_subjects),
        "auc_world": sum(against_world) / count,
        "auc_world_worst": min(against_world),
        "similarity_same": sum(same) / count,
        "similarity_other": sum(other) / count,
    }


@torch.no_grad()
def retrieval_power(model: CLIPModel, seen: bool, rounds: int = 16) -> dict[str, float]:
    """Return the fraction of images whose own prompt is the closest of 64, and the reverse.

    Images show combinations that training used, or (not `seen`) that it left out.
    """
    tokenizer, hits = build_tokenizer(), torch.zeros(2)
    for index in range(rounds):
        rng = random.Random(f"retrieval {index}")
        shown: dict[str, Image.Image] = {}
        while len(shown) < RETRIEVAL:
            name, colour, background = tiny_world.combination(rng)
            if not seen:
                background = tiny_world.left_out(name, colour)
            prompt = tiny_world.caption(colour, name, background)
            drawing, paint = tiny_world.OBJECTS[name], tiny_world.COLOURS[colour]
            shown[prompt] = tiny_world.compose(drawing, paint, background, rng)
        ids, pixels = tokenize(tokenizer, list(shown)), to_pixels(list(shown.values()))
        logits = model(input_ids=ids, pixel_values=pixels).logits_per_image
        right = torch.arange(RETRIEVAL)
        hits += torch.stack([(logits.argmax(d) == right).float().mean() for d in (1, 0)])
    to_text, to_image = (hits / rounds).tolist()
    return {"picture_to_prompt": to_text, "prompt_to_picture": to_image}


def make_dino(run: Run, steps: int, subjects: Path) -> tuple[list[Any], dict[str, float]]:
    """Train `dino`; return the parts to save and its power."""
    model = encoders.build_dino()
    train(run, "dino", steps, model, lambda rng: encoders.dino_loss(model, rng))

    def embed(pixels: torch.Tensor) -> torch.Tensor:
        return functional.normalize(model(pixels).pooler_output, dim=-1)

    parts = [model, encoders.build_image_processor(BitImageProcessor)]
    return parts, subject_power(embed, subjects)


def make_clip(run: Run, steps: int, subjects: Path) -> tuple[list[Any], dict[str, float]]:
    """Train `clip`; return the parts to save and its power."""
    tokenizer = build_tokenizer()
    model = encoders.build_clip(tokenizer)
    train(run, "clip", steps, model, lambda rng: encoders.clip_loss(model, tokenizer, rng))

    def embed(pixels: torch.Tensor) -> torch.Tensor:
        pooled = model.vision_model(pixel_values=pixels).pooler_output
        return functional.normalize(model.visual_projection(pooled), dim=-1)

    power = subject_power(embed, subjects) | retrieval_power(model, seen=True)
    power |= {f"unseen_{k}": value for k, value in retrieval_power(model, seen=False).items()}
    processor = encoders.build_image_processor(CLIPImageProcessor)
    return [model, processor, build_tokenizer()], power


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--work_dir", type=Path, required=True, help="folder for checkpoints and log"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("samples/tiny-encoders"))
    parser.add_argument("--subjects", type=Path, default=Path("samples/subjects"))
    parser.add_argument("--encoders", nargs="+", choices=("dino", "clip"), default=["dino", "clip"])
    parser.add_argument(
        "--steps", type=int, default=1_000, help="steps of each, with 128 images per step"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    run = Run(Accelerator(cpu=True), args.work_dir, args.seed)
    for name in args.encoders:
        set_seed(args.seed)
        make = {"dino": make_dino, "clip": make_clip}[name]
        parts, power = make(run, args.steps, args.subjects)
        run.log(stage="power", encoder=name, **power)
        for part in parts:
            part.save_pretrained(args.output_dir / name)
    for path in args.output_dir.rglob("*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
