"""The encoders that evaluate the tiny world: their untrained networks, batches and losses.

`dino` is a `Dinov2Model` that tells things apart: its pooled outputs are close for two images of
the same thing on any backgrounds. `clip` is a `CLIPModel` that scores how well an image fits a
prompt. Neither sees a subject. A loss takes a `random.Random`, draws its batch with it, and depends
on nothing else.
"""

from __future__ import annotations

import math
import random

import tiny_world
import torch
from PIL import Image
from tiny_base_models import MAX_TOKENS, tokenize
from tiny_base_stages import to_pixels
from tiny_instances import instance
from torch.nn import functional
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

WIDTH, LAYERS, HEADS, PATCH = 96, 4, 4, 8
INSTANCES = 64  # per batch of `dino`, with two images each
PAIRS = 128  # of image and caption per batch of `clip`
TEMPERATURE = 0.1


def build_dino() -> Dinov2Model:
    """Build `dino`: 64x64x3 pixels to a pooled output of width 96, 0.47 million parameters."""
    return Dinov2Model(
        Dinov2Config(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            image_size=tiny_world.SIZE,
            patch_size=PATCH,
        )
    )


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Build `clip`: the same vision tower and a text tower of two layers, 0.8 M parameters."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": HEADS}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "num_hidden_layers": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": tiny_world.SIZE, "patch_size": PATCH, "num_hidden_layers": LAYERS}
    return CLIPModel(
        CLIPConfig(text_config=shape | text, vision_config=shape | vision, projection_dim=WIDTH)
    )


def build_image_processor(kind: type[BitImageProcessor] | type[CLIPImageProcessor]) -> object:
    """Build a processor: shorter side to 64 pixels, central square, values in -1..1."""
    return kind(
        size={"shortest_edge": tiny_world.SIZE},
        crop_size={"height": tiny_world.SIZE, "width": tiny_world.SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def disturb(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotate, move, scale, blur, tint and grain images (b, 3, 64, 64) slightly, each differently.

    A generated image is never as clean as a drawn one, which must not affect its score.
    """
    count = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    angle, scale, shift = uniform(-0.12, 0.12), uniform(0.9, 1.12), uniform(-0.1, 0.1, 2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(count, 2, 3)
    grid = functional.affine_grid(rows, list(pixels.shape), align_corners=False)
    pixels = functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    padded = functional.pad(pixels, (1, 1, 1, 1), mode="replicate")
    blur = uniform(0, 0.9, 1, 1, 1)
    pixels = torch.lerp(pixels, functional.avg_pool2d(padded, 3, stride=1), blur)
    pixels = pixels * uniform(0.9, 1.1, 1, 1, 1) + uniform(-0.08, 0.08, 3, 1, 1)
    grain = torch.randn(pixels.shape, generator=generator)
    return (pixels + uniform(0, 0.08, 1, 1, 1) * grain).clamp(-1, 1)


def draw_instances(rng: random.Random, count: int) -> list[list[Image.Image]]:
    """Draw two images of each of `count` things, on two backgrounds.

    Every second thing has the shape or the colors of the one before, since such pairs are hard.
    """
    pictures = []
    shape_seed = paint_seed = 0
    for index in range(count):
        renew = rng.choice(("shape", "paint")) if index % 2 else "both"
        shape_seed = shape_seed if renew == "paint" else rng.getrandbits(48)
        paint_seed = paint_seed if renew == "shape" else rng.getrandbits(48)
        drawing, colour = instance(random.Random(shape_seed), random.Random(paint_seed))
        phrases = rng.sample(sorted(tiny_world.BACKGROUNDS), 2)
        pictures.append([tiny_world.compose(drawing, colour, p, rng) for p in phrases])
    return pictures


def dino_loss(model: Dinov2Model, rng: random.Random) -> torch.Tensor:
    """Return NT-Xent over pairs of images of one thing (Chen et al. 2020, equation 1)."""
    views = [image for pair in draw_instances(rng, INSTANCES) for image in pair]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    pooled = model(disturb(to_pixels(views), generator)).pooler_output
    embeds = functional.normalize(pooled, dim=-1)
    similarity = embeds @ embeds.T / TEMPERATURE
    similarity = similarity.masked_fill(torch.eye(len(views), dtype=torch.bool), -math.inf)
    other = torch.arange(len(views)) ^ 1
    return functional.cross_entropy(similarity, other)


def draw_pairs(rng: random.Random, count: int) -> tuple[list[Image.Image], list[str]]:
    """Draw images with captions: three of four from the training world, the others random things.

    The latter are called "a toy on grass", and sometimes "a sks toy on grass", as in prompts for a
    subject.
    """
    images, captions = [], []
    for _ in range(count):
        if rng.random() < 0.75:
            name, colour, background = tiny_world.combination(rng)
            drawing, paint = tiny_world.OBJECTS[name], tiny_world.COLOURS[colour]
            words = [colour, name, background]
        else:
            background = rng.choice(sorted(tiny_world.BACKGROUNDS))
            drawing, paint = instance(rng, rng)
            words = [tiny_world.CLASS_NOUN, background]
        if rng.random() < 0.1:
            words.insert(0, tiny_world.RARE_TOKEN)
        images.append(tiny_world.compose(drawing, paint, background, rng))
        captions.append(tiny_world.caption(*words))
    return images, captions


def clip_loss(model: CLIPModel, tokenizer: CLIPTokenizer, rng: random.Random) -> torch.Tensor:
    """Return cross-entropies of images against captions and back; equal captions share targets."""
    images, captions = draw_pairs(rng, PAIRS)
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    pixels, ids = disturb(to_pixels(images), generator), tokenize(tokenizer, captions)
    logits = model(input_ids=ids, pixel_values=pixels).logits_per_image
    plain = [caption.replace(f" {tiny_world.RARE_TOKEN}", "") for caption in captions]
    equal = torch.tensor([[float(a == b) for b in plain] for a in plain])
    answer = equal / equal.sum(dim=1, keepdim=True)
    return (
        functional.cross_entropy(logits, answer) + functional.cross_entropy(logits.T, answer)
    ) / 2
