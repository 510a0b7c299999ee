"""What fits into which card, as the plans count it: ``python -m tests.performance.recipes``.

Nothing is measured and no weights are needed. The bases have their published configurations, and
tokenizers that know single characters, as every prompt is padded to one length anyway.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from gralora_diffusion.base_models.loading import find_base_family
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.data_module import find_images
from gralora_diffusion.training.dry_run.formatting import BANDWIDTH
from gralora_diffusion.training.dry_run.memory_check import WARN, fitted
from gralora_diffusion.training.dry_run.plan import Plan, plan_run
from gralora_diffusion.training.runtime.sharding import Sharding
from tests.performance.real_step import BASES
from tests.tiny import PIPELINES
from tests.training.runs import make_images

_GIB = 2**30
_CLIP = {"vocab_size": 49408, "max_position_embeddings": 77}
_CLIP_L = _CLIP | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
_CLIP_G = _CLIP | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
_T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
}
_MISTRAL = {
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "head_dim": 64,
    },
}
_QWEN_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "layer_types": ["full_attention"] * 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
}
_SD35_LARGE = BASES["sd35-medium"].config | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
}
_FLUX2 = {
    "num_layers": 8,
    "num_single_layers": 48,
    "num_attention_heads": 48,
    "attention_head_dim": 128,
    "joint_attention_dim": 15360,
    "in_channels": 128,
    "axes_dims_rope": [32, 32, 32, 32],
}
_FLUX_SIZES = {
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
}


@dataclass(frozen=True)
class Recipe:
    """A published base and the cards that are asked for.

    Attributes:
        configs: component -> what its configuration has in place of the tiny one's.
        cards: GiB of memory.
        processes: number of GPUs; with more than one, the base is sharded.
    """

    family: str
    configs: dict[str, dict[str, Any]]
    cards: tuple[int, ...]
    processes: int = 1


_LATENT_16 = _VAE | {"latent_channels": 16}
_FLUX2_CONFIGS = {
    "transformer": _FLUX2,
    "text_encoder": _MISTRAL,
    "vae": _VAE | {"latent_channels": 32},
}
RECIPES = {
    "SDXL": Recipe(
        "stable-diffusion-xl",
        {
            "unet": BASES["sdxl"].config | {"layers_per_block": 2, "norm_num_groups": 32},
            "text_encoder": _CLIP_L,
            "text_encoder_2": _CLIP_G,
            "vae": _VAE | {"latent_channels": 4},
        },
        (6, 8, 12),
    ),
    "SD 3.5 large": Recipe(
        "stable-diffusion-3",
        {
            "transformer": _SD35_LARGE,
            "text_encoder": _CLIP_L,
            "text_encoder_2": _CLIP_G,
            "text_encoder_3": _T5_XXL,
            "vae": _LATENT_16,
        },
        (8, 12, 16, 24),
    ),
    "FLUX.1 dev": Recipe(
        "flux",
        {
            "transformer": BASES["flux"].config | _FLUX_SIZES,
            "text_encoder": _CLIP_L,
            "text_encoder_2": _T5_XXL,
            "vae": _LATENT_16,
        },
        (8, 12, 16, 24),
    ),
    "FLUX.2 klein 4B": Recipe(
        "flux2-klein",
        {
            "transformer": BASES["flux2-klein"].config
            | {"in_channels": 128, "axes_dims_rope": [32, 32, 32, 32]},
            "text_encoder": _QWEN_4B,
            "vae": _VAE | {"latent_channels": 32},
        },
        (8, 12),
    ),
    "FLUX.2 dev": Recipe("flux2", _FLUX2_CONFIGS, (16, 24)),
    "FLUX.2 dev, 2 GPUs": Recipe("flux2", _FLUX2_CONFIGS, (24, 48), processes=2),
    "FLUX.2 dev, 8 GPUs": Recipe("flux2", _FLUX2_CONFIGS, (80,), processes=8),
}


class Processes(Accelerator):
    """An accelerator of one process that says it is one of several."""

    count = 1

    @property
    def num_processes(self) -> int:
        return self.count


def make_base(recipe: Recipe, folder: Path) -> Path:
    """Write a pipeline without weights."""
    pipe = PIPELINES[recipe.family]()
    for name in ("tokenizer", "tokenizer_2"):
        if recipe.configs and "CLIP" in type(getattr(pipe, name, None)).__name__:
            getattr(pipe, name).model_max_length = 77
    pipe.save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    for name, changes in recipe.configs.items():
        path = folder / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def plan(recipe: Recipe, resolution: int, folder: Path, quick: bool) -> Plan:
    """Return the plan of a run of one sample with gradient checkpointing, nothing streamed."""
    base = folder / "base"
    if not base.exists():
        make_base(Recipe(recipe.family, {}, recipe.cards) if quick else recipe, base)
        make_images(folder / "images", 1, 1100)
    config = TrainingConfig(
        pretrained_model_name_or_path=str(base),
        instance_data_dir=str(folder / "images"),
        instance_prompt="a photo of sks dog",
        resolution=resolution,
        train_batch_size=1,
        gradient_checkpointing=True,
        mixed_precision="bf16",
        rank=4 if quick else 16,
    )
    family, images = find_base_family(config), find_images(config)
    accelerator = Processes(cpu=True, mixed_precision="bf16")
    accelerator.count = recipe.processes
    sharding = Sharding() if recipe.processes > 1 else None
    return plan_run(config, family, images, [], accelerator, sharding, apart=True)


def row(name: str, resolution: int, card: int, found: Plan) -> str:
    """Return a row of a Markdown table."""
    peaks = [found.peak(phase) / _GIB for phase in ("pictures", "prompts", "steps")]
    fits = max(peaks) <= WARN * card
    streaming, option = found.offloading.denoiser, ""
    if streaming is not None:
        option = f"`{streaming.kept:.2f}`" if streaming.kept else "`blocks`"
    elif found.offloading.encoders:
        option = "text encoders"
    copied = found.copied
    traffic = f"{copied / _GIB:.1f} GiB, {copied / BANDWIDTH:.1f} s" if copied else ""
    shown = [f"{peak:.1f}" for peak in peaks]
    cells = [name, str(resolution), str(card), "yes" if fits else "no", option, *shown, traffic]
    return f"| {' | '.join(cells)} |"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bases", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--resolutions", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the command")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    heads = [
        "base",
        "resolution",
        "card",
        "fits",
        "streamed",
        "images",
        "prompts",
        "steps",
        "copied",
    ]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name in args.bases:
        with tempfile.TemporaryDirectory() as folder:
            for resolution in args.resolutions:
                recipe = RECIPES[name]
                whole = plan(recipe, resolution, Path(folder), args.quick)
                for card in recipe.cards:
                    alone = recipe.processes == 1
                    found = fitted(whole, int(WARN * card * _GIB), denoiser=alone)
                    print(row(name, resolution, card, found), flush=True)


if __name__ == "__main__":
    main()
