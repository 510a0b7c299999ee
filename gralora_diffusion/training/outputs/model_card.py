"""The model card: what an adapter is, how to use it, images, and how it was made."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from huggingface_hub import ModelCardData
from markupsafe import Markup
from PIL import Image

from gralora_diffusion.base_models.quantization import QUANTIZED_BASE
from gralora_diffusion.families import get_family
from gralora_diffusion.io.file_names import real_path
from gralora_diffusion.io.templates import render
from gralora_diffusion.training.config.layer_patterns import given_patterns
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.config.validation_prompts import ValidationPrompt
from gralora_diffusion.training.optimization.adapters import LOWERED_K
from gralora_diffusion.training.runtime.acceleration import DTYPES

from .base_license import base_license
from .metadata import CONTROL_IMAGES, FILLS
from .published import CARD_IMAGE_NAME, CARD_NAME
from .validation import image_name, negative_prompt_of


def write_card(
    folder: Path,
    config: TrainingConfig,
    family: str,
    metrics: Mapping[str, Any],
    grid: Path | None,
    prompts: Sequence[ValidationPrompt | str],
) -> Path:
    """Write the model card, and the grid of images that it shows.

    Args:
        prompts: of the rows of the grid; a text is a prompt without settings of its own.
    """
    given = [p if isinstance(p, ValidationPrompt) else ValidationPrompt(prompt=p) for p in prompts]
    base = config.pretrained_model_name_or_path
    on_hub, edits, fills = not Path(base).exists(), CONTROL_IMAGES in metrics, FILLS in metrics
    task = "image-to-image" if edits or fills else "text-to-image"
    pipeline = None
    if fills:
        pipeline = get_family(family).inpainting_pipeline
    elif edits:
        pipeline = next(iter(get_family(family).edit_pipelines))
    if grid is not None:
        Image.open(grid).save(folder / CARD_IMAGE_NAME)
    versions = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
    }
    license_fields: dict[str, Any] = {**base_license(config)}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        tags=[
            *(task, "diffusers", "gralora"),
            *([] if edits else ["dreambooth"]),
            *(["inpainting"] if fills else []),
            family,
        ],
        instance_prompt=config.instance_prompt or config.trigger_word,
        widget=_widget(folder, config, family, pipeline, grid, given) or None,
        **license_fields,
    )
    text = render(
        __package__,
        "model_card.md.jinja",
        data=data.to_dict(),
        title=real_path(folder).name,
        config=config,
        other_values=LOWERED_K in metrics or any(given_patterns(config).values()),
        base=base if on_hub else Path(base).name,
        quantization=metrics.get(QUANTIZED_BASE),
        image=CARD_IMAGE_NAME if grid is not None else None,
        prompts=[entry.prompt for entry in given],
        edits=edits,
        usage=_usage(config, pipeline, fills),
        facts={name: _shown(value) for name, value in {**metrics, **versions}.items()},
        options=config.to_yaml(public=True, effective=True),
    )
    path = folder / CARD_NAME
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def _widget(
    folder: Path,
    config: TrainingConfig,
    family: str,
    pipeline: str | None,
    grid: Path | None,
    prompts: Sequence[ValidationPrompt],
) -> list[dict[str, Any]]:
    """Return an image of each prompt as the Hub shows it, by its path in the output folder.

    Args:
        pipeline: the class that edits or fills images; None for the family's usual one.
    """
    shown = []
    for row, entry in enumerate(prompts):
        image = grid and grid.parent / image_name(row, 0)
        if not image or not image.is_relative_to(folder) or not image.is_file():
            continue
        example: dict[str, Any] = {"text": entry.prompt}
        used = getattr(diffusers, pipeline or get_family(family).pipeline_classes[0])
        if negative := negative_prompt_of(entry, config, used):
            example["parameters"] = {"negative_prompt": negative}
        example["output"] = {"url": image.relative_to(folder).as_posix()}
        shown.append(example)
    return shown


def _shown(value: Any) -> Any:
    """Return a whole number with separators, and anything else as it is."""
    return f"{value:,}" if type(value) is int else value


def _usage(config: TrainingConfig, pipeline: str | None, fills: bool) -> str:
    """Python that loads base and adapter, in the precision of the training, and generates.

    Args:
        pipeline: the class that edits or fills images, if the adapter learned that.
        fills: whether it fills them.
    """
    base, rest = config.pretrained_model_name_or_path, config.base_config
    return render(
        __package__,
        "usage.py.jinja",
        config=config,
        single_file=Path(base).is_file(),
        edits=pipeline is not None,
        fills=fills,
        # a class's name, not a text to be quoted
        pipeline=Markup(pipeline or "DiffusionPipeline"),
        base="path/to/base" if Path(base).exists() else base,
        base_config="path/to/base_config" if rest and Path(rest).exists() else rest,
        dtype=DTYPES[config.mixed_precision or "no"],
    )
