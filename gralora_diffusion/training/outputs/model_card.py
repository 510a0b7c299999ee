"""What a run leaves to read: the metrics, their curve, and the model card."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from gralora_diffusion.base_models.quantization import QUANTIZED_BASE
from gralora_diffusion.io.safe_text import for_code_block, for_code_span, for_markdown
from gralora_diffusion.training.config.layer_patterns import given_patterns
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.optimization.adapters import LOWERED_K
from gralora_diffusion.training.runtime.acceleration import DTYPES

CARD_NAME = "README.md"
CARD_IMAGE_NAME = "validation.png"


def write_card(
    folder: Path,
    config: TrainingConfig,
    family: str,
    metrics: Mapping[str, Any],
    grid: Path | None,
    prompts: Sequence[str],
) -> Path:
    """Write the model card: what it is, how to use it, pictures, and how it was made."""
    base = config.pretrained_model_name_or_path
    on_hub = not Path(base).exists()
    shown = base if on_hub else Path(base).name
    trigger = config.instance_prompt
    parts = [f"GraLoRA adapter (rank {config.rank}, k = {config.gralora_k}"]
    parts[0] += f", hybrid rank {config.hybrid_rank}" if config.hybrid_rank else ""
    others = LOWERED_K in metrics or any(given_patterns(config).values())
    parts[0] += "; other values on some layers)" if others else ")"
    parts[0] += f" for {for_code_span(shown)}, trained with DreamBooth."
    if QUANTIZED_BASE in metrics:
        parts[0] += f" The base was quantized meanwhile ({for_markdown(metrics[QUANTIZED_BASE])})."
    if trigger:
        parts.append(f"Use the prompt {for_code_span(trigger)} to call the subject.")
    if grid is not None:
        Image.open(grid).save(folder / CARD_IMAGE_NAME)
        rows = "\n".join(
            f"- row {i + 1}: {for_markdown(prompt)}" for i, prompt in enumerate(prompts)
        )
        parts.append(f"![pictures drawn with the adapter](validation.png)\n\n{rows}")
    source = config.hub_model_id or "path/to/this/folder"
    arguments = _literal(trigger or "your prompt")
    arguments += f", clip_skip={config.clip_skip}" if config.clip_skip else ""
    mending = "from gralora_diffusion import mend_clip_skip\n\nmend_clip_skip(pipe)\n"
    mending = mending if config.clip_skip else ""
    parts.append(
        "## Use\n\n"
        + for_code_block(
            f"import torch\n{_loading_code(config)}"
            f"pipe.load_gralora_weights({_literal(source)})\n{mending}"
            f"image = pipe({arguments}).images[0]",
            "python",
        )
    )
    versions = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
    }
    facts = {**metrics, **versions}
    table = "\n".join(
        f"| {for_markdown(key)} | {for_markdown(value)} |" for key, value in facts.items()
    )
    settings = for_code_block(config.to_yaml(public=True), "yaml")
    parts.append(f"## Training\n\n| | |\n|---|---|\n{table}\n\n{settings}")
    data = ModelCardData(
        library_name="diffusers",
        base_model=base if on_hub else None,
        tags=["text-to-image", "diffusers", "gralora", "dreambooth", family],
        instance_prompt=trigger,
    )
    front = yaml.safe_dump(data.to_dict(), sort_keys=False, allow_unicode=True).rstrip()
    title = f"# {for_markdown(folder.resolve().name)}"
    path = folder / CARD_NAME
    ModelCard("\n\n".join([f"---\n{front}\n---", title, *parts]) + "\n").save(path)
    return path


def _literal(text: str) -> str:
    """A Python literal in double quotes; what cannot be shown is escaped as Python does."""
    double = repr("'" + text)  # with an apostrophe, and no other quote, Python takes double ones
    return '"' + double[2:] if double.startswith('"') else repr(text)


def _loading_code(config: TrainingConfig) -> str:
    """Python that makes ``pipe`` of the base, in the precision of the training."""
    base = config.pretrained_model_name_or_path
    dtype = DTYPES[config.mixed_precision or "no"]
    device = 'pipe.to("cuda" if torch.cuda.is_available() else "cpu")\n'
    given = {"revision": config.revision, "variant": config.variant}
    if not Path(base).is_file():
        told = [f"{key}={_literal(value)}" for key, value in given.items() if value]
        shown = "path/to/base" if Path(base).exists() else base
        arguments = ", ".join([_literal(shown), *told, f"dtype={dtype}"])
        return (
            "from diffusers import DiffusionPipeline\nimport gralora_diffusion\n\n"
            f"pipe = DiffusionPipeline.from_pretrained({arguments})\n{device}"
        )
    told = ['    pretrained_model_name_or_path="path/to/base.safetensors",']
    if rest := config.base_config:
        shown = "path/to/base_config" if Path(rest).exists() else rest
        told.append(f"    base_config={_literal(shown)},")
    arguments = "\n".join(told)
    return (
        "from gralora_diffusion import BaseModelOptions, find_base_family, load_base\n\n"
        f"base = BaseModelOptions(\n{arguments}\n)\n"
        f"pipe = load_base(base, find_base_family(base), {dtype}, {dtype})\n{device}"
    )
