"""Every option of the benchmark; those of the training are the trainer's own."""

from __future__ import annotations

from dataclasses import dataclass, fields, make_dataclass
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from gralora_diffusion.options.fields import (
    Limits,
    MayDiffer,
    Place,
    SetByBenchmark,
    option,
    options_with,
)
from gralora_diffusion.training.config.training_config import OPTION_GROUPS, TrainingConfig


@dataclass(kw_only=True)
class ComparedOptions:
    """What is compared, and on what."""

    _argument_group_name: ClassVar[str] = "What is compared"

    suite: Annotated[Literal["tiny"] | None, MayDiffer(commands=True)] = option(
        None,
        "A file of options that is bundled: tiny is samples/configs/benchmark_tiny.yaml, which "
        "needs no download. Other options win over it",
    )
    methods: Annotated[list[str] | None, MayDiffer(commands=True)] = option(
        None,
        "lora-r<rank>, dora-r<rank>, loha-r<rank>, gralora-r<rank>-k<k>, "
        "gralora-r<rank>-k<k>-h<hybrid rank>, full; with -lr<rate> behind, a learning rate of its "
        "own; base: nothing is trained (default: those of the run in --output_dir; of a new one "
        "lora-r32 lora-r64 gralora-r32-k2)",
    )
    seeds: Annotated[list[int] | None, MayDiffer(commands=True)] = option(
        None, "Seeds of each method (default: those of the run in --output_dir; of a new one 0)"
    )
    protocols: list[str] | None = option(
        None,
        "subject: the DreamBooth benchmark; or captioned: pictures for held-out captions; with "
        "either drift: pictures for other prompts; with subject prior: pictures of the class "
        "(default: subject drift prior, or captioned drift if there are captioned pictures)",
    )
    dreambooth_dir: Annotated[str | None, Place(read=True)] = option(
        None, "A clone of github.com/google/dreambooth, or a folder laid out like its dataset/"
    )
    subjects: Annotated[list[str] | None, MayDiffer(commands=True)] = option(
        None, "Subjects (default: all)"
    )
    unique_token: str = option("sks", "The token that stands for the subject")
    captioned_dir: Annotated[str | None, Place(read=True)] = option(
        None, "Folder of captioned pictures; or give --dataset_name and --caption_column"
    )
    held_out: Annotated[int, Limits(at_least=1)] = option(
        50, "How many of the captioned pictures are not trained on"
    )


@dataclass(kw_only=True)
class GenerationOptions:
    """The pictures that are drawn of each unit."""

    _argument_group_name: ClassVar[str] = "Drawing"

    images_per_prompt: Annotated[int, Limits(at_least=1)] = option(4, "Pictures of each prompt")
    max_prompts: Annotated[int | None, Limits(at_least=1)] = option(
        None, "Only so many prompts of a subject, the first ones"
    )
    drift_prompts: list[str] | None = option(
        None, "Prompts that have nothing to do with what is learned (default: twelve of our own)"
    )
    drift_images: Annotated[int, Limits(at_least=1)] = option(2, "Pictures of each of them")
    prior_images: Annotated[int, Limits(at_least=1)] = option(16, "Pictures of the subject's class")
    inference_steps: Annotated[int, Limits(at_least=1)] = option(50, "Inference steps")
    drawing_guidance_scale: float | None = option(None, "Guidance scale (default: the pipeline's)")
    drawing_batch_size: Annotated[int, Limits(at_least=1)] = option(4, "Pictures drawn at once")


@dataclass(kw_only=True)
class JudgingOptions:
    """What judges them."""

    _argument_group_name: ClassVar[str] = "Judging"

    encoders: list[str] | None = option(
        None,
        "NAME=SOURCE, the source a Hub id or a folder (default: dinov2=facebook/dinov2-base "
        "dino=facebook/dino-vits16 clip=openai/clip-vit-base-patch32)",
    )
    preprocessing: Literal["published", "shipped"] = option(
        "published",
        "How pictures are prepared for them: as in the published evaluations, or always as the "
        "image processor beside the encoder says",
    )
    diversity: bool = option(False, "Also how much the pictures of one prompt differ")
    mechanism_steps: Annotated[int | None, Limits(at_least=1)] = option(
        None, "Log block gradients and input outliers every so many steps, and the updates' ranks"
    )
    mechanism_k: Annotated[int, Limits(at_least=1)] = option(
        4, "Into how many blocks per side gradients are cut for that"
    )


@dataclass(kw_only=True)
class RunOptions:
    """Where it all goes."""

    _argument_group_name: ClassVar[str] = "The run"

    output_dir: Annotated[str, Place(written=True), MayDiffer(commands=True)] = option(
        "gralora-benchmark", "Folder for units and report"
    )
    title: Annotated[str, MayDiffer(commands=True)] = option(
        "GraLoRA benchmark", "Title of the report"
    )
    keep_adapters: Annotated[bool, MayDiffer(commands=True)] = option(
        True, "Keep each unit's adapter"
    )
    retry_failed: Annotated[bool, MayDiffer(commands=True)] = option(
        False, "Do units again that failed"
    )
    report_only: Annotated[bool, MayDiffer(commands=True)] = option(
        False, "Only make the report of what is in --output_dir, with the options kept there"
    )


BENCHMARK_GROUPS: tuple[type, ...] = (
    ComparedOptions,
    GenerationOptions,
    JudgingOptions,
    RunOptions,
)


def set_by_benchmark() -> dict[str, str]:
    """The trainer's options that the benchmark sets itself -> what to give instead."""
    traits = options_with(TrainingConfig, SetByBenchmark)
    return {name: trait.advice for name, trait in traits.items()}


def training_groups() -> tuple[type, ...]:
    """The trainer's groups of options without those that the benchmark sets."""
    ours = {f.name for group in BENCHMARK_GROUPS for f in fields(group)}
    ours |= set_by_benchmark().keys()
    groups = []
    for group in OPTION_GROUPS:
        hints = get_type_hints(group)
        left: list[tuple[str, Any, Any]] = [
            (f.name, hints[f.name], option(f.default, f.metadata["help"], secret=not f.repr))
            for f in fields(group)
            if f.name not in ours
        ]
        if left:
            title = f"Training: {group._argument_group_name.lower()}"  # type: ignore[attr-defined]
            namespace = {"_argument_group_name": title}
            groups.append(make_dataclass(group.__name__, left, namespace=namespace, kw_only=True))
    return tuple(groups)
