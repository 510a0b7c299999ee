"""The benchmark's own options; its options for training are the trainer's."""

from __future__ import annotations

from dataclasses import dataclass, fields, make_dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.options.fields import (
    Limits,
    MayDiffer,
    Place,
    SetByBenchmark,
    option,
    options_with,
    types_of,
)
from gralora_diffusion.training.config.training_config import OPTION_GROUPS, TrainingConfig

from .methods import TITLED_FORMS
from .rates import COUNTED, UNCOUNTED


@dataclass(kw_only=True)
class ComparedOptions:
    """Which methods are compared, and on which data."""

    _argument_group_name: ClassVar[str] = "Methods and data"

    suite: Annotated[Literal["tiny", "peft-image-gen"] | None, MayDiffer(commands=True)] = option(
        None,
        "A bundled file of options: tiny is benchmark_tiny.yaml, which needs no download; "
        "peft-image-gen is PEFT's comparison. Other options override it",
    )
    methods: Annotated[list[str] | None, MayDiffer(commands=True)] = option(
        None,
        f"{TITLED_FORMS}. Append -lr<rate> for another learning rate. "
        "base trains nothing (default: those of the run in --output_dir; for a new run base "
        "lora-r32 lora-r64 gralora-r32-k2)",
    )
    rates: Annotated[list[str] | None, MayDiffer(commands=True)] = option(
        None,
        "Train each method at several learning rates, so that methods are compared along their "
        "curves: numbers, or auto for --learning_rate times 0.5, 0.71, 1 and 1.41. They are the "
        "rates of a LoRA of the first method's rank, multiplied by sqrt(k) for GraLoRA and by "
        f"sqrt(first rank / rank) for other ranks. Those of {first_few(COUNTED, 20)} follow from "
        f"the size of their first step; {first_few(UNCOUNTED, 20)} has those of the LoRA. base, "
        "full and methods with their own -lr<rate> are left alone",
    )
    endpoint: str | None = option(
        None,
        "The score that decides, as SCORE, or as SCORE@COST for the mean gap of two curves at "
        "equal cost, where the cost is a drift or update_norm. It is saved before the first trial "
        "(default: the first encoder's similarity; with several rates, at equal drift)",
    )
    comparisons: list[str] | None = option(
        None,
        "The comparisons that the endpoint decides, as METHOD:REFERENCE, corrected for their "
        "number; all others are exploratory. They are saved before the first trial (default: each "
        "GraLoRA against each LoRA)",
    )
    seeds: Annotated[list[int] | None, MayDiffer(commands=True)] = option(
        None, "Seeds of each method (default: those of the run in --output_dir; for a new run 0)"
    )
    seeding: Literal["subject", "shared"] | None = option(
        None,
        "subject: the random numbers of a trial depend on seed and subject, so that subjects are "
        "independent of each other; shared: on the seed alone, as in version 0.1 (default: that "
        "of the run in --output_dir; for a new run subject)",
    )
    protocols: list[str] | None = option(
        None,
        "subject: the DreamBooth benchmark; captioned: images for held-out captions instead; "
        "drift, with either: images for unrelated prompts; prior, with subject: images of the "
        "class (default: subject drift prior, or captioned drift if captioned images are given)",
    )
    dreambooth_dir: Annotated[str | None, Place(read=True)] = option(
        None,
        "A clone of github.com/google/dreambooth, or a folder with the layout of its dataset/",
    )
    subjects: Annotated[list[str] | None, MayDiffer(commands=True)] = option(
        None, "Subjects to train on (default: all)"
    )
    unique_token: str = option("sks", "Token that names the subject in prompts")
    captioned_dir: Annotated[str | None, Place(read=True)] = option(
        None, "Folder of captioned images; or give --dataset_name and --caption_column"
    )
    held_out: Annotated[int, Limits(at_least=1)] = option(
        50, "Number of captioned images that are held out from training"
    )
    validation: Annotated[int, Limits(at_least=0)] = option(
        0, "Number of captioned images that are neither trained on nor compared with"
    )
    split: Literal["contents", "peft"] = option(
        "contents",
        "Which captioned images are held out: contents, by their contents alone; peft, by the "
        "rows of --dataset_name, as in PEFT's comparison",
    )
    captions: list[str] | None = option(
        None, "A caption for each row of --dataset_name, in place of --caption_column"
    )


@dataclass(kw_only=True)
class GenerationOptions:
    """The images that are generated for each trial."""

    _argument_group_name: ClassVar[str] = "Generation"

    images_per_prompt: Annotated[int, Limits(at_least=1)] = option(4, "Number of images per prompt")
    max_prompts: Annotated[int | None, Limits(at_least=1)] = option(
        None, "Maximum number of prompts per subject; the first ones are used (default: all)"
    )
    drift_prompts: list[str] | None = option(
        None, "Prompts unrelated to the training (default: twelve built-in prompts)"
    )
    drift_images: Annotated[int, Limits(at_least=1)] = option(
        2, "Number of images per unrelated prompt"
    )
    prior_images: Annotated[int, Limits(at_least=1)] = option(
        16, "Number of images of the subject's class"
    )
    inference_steps: Annotated[int, Limits(at_least=1)] = option(50, "Inference steps")
    drawing_guidance_scale: float | None = option(None, "Guidance scale (default: the pipeline's)")
    drawing_batch_size: Annotated[int, Limits(at_least=1)] = option(
        4, "Number of images generated at once"
    )


@dataclass(kw_only=True)
class EvaluationOptions:
    """How images are evaluated."""

    _argument_group_name: ClassVar[str] = "Evaluation"

    encoders: list[str] | None = option(
        None,
        "Encoders that evaluate images: NAME=SOURCE, where the source is a Hub id or a folder "
        "(default: dinov2=facebook/dinov2-base dino=facebook/dino-vits16 "
        "clip=openai/clip-vit-base-patch32)",
    )
    preprocessing: Literal["published", "shipped"] = option(
        "published",
        "How images are preprocessed for the encoders: published, as in the published "
        "evaluations, or shipped, always as set in the image processor beside the encoder",
    )
    diversity: bool = option(False, "Also score how much the images of one prompt differ")
    peft_drift: bool = option(
        False, "Also score the drift as PEFT's comparison does: (1 - similarity) / 2"
    )
    mechanism_steps: Annotated[int | None, Limits(at_least=1)] = option(
        None,
        "Log block gradients and input outliers every this many steps, and at the end the ranks of "
        "the updates (default: never)",
    )
    mechanism_k: Annotated[int, Limits(at_least=1)] = option(
        4, "Number of blocks per side that the logged gradients are split into"
    )
    blind: Annotated[bool, MayDiffer(commands=True)] = option(
        False,
        "Only write report/blind.html on the results in --output_dir: pairs of images without "
        "names, for people to choose from",
    )
    blind_answers: Annotated[list[str] | None, MayDiffer(commands=True)] = option(
        None,
        "Only write the report, with these answers to report/blind.html: a file for each person",
    )


@dataclass(kw_only=True)
class RunOptions:
    """Output, and what a command does."""

    _argument_group_name: ClassVar[str] = "The run"

    output_dir: Annotated[str, Place(written=True), MayDiffer(commands=True)] = option(
        "gralora-benchmark", "Folder for trials and report"
    )
    title: Annotated[str, MayDiffer(commands=True)] = option(
        "GraLoRA benchmark", "Title of the report"
    )
    keep_adapters: Annotated[bool, MayDiffer(commands=True)] = option(
        True, "Keep each trial's adapter"
    )
    retry_failed: Annotated[bool, MayDiffer(commands=True)] = option(
        False, "Repeat trials that failed"
    )
    report_only: Annotated[bool, MayDiffer(commands=True)] = option(
        False, "Only write the report on the results in --output_dir, with the options saved there"
    )
    ray: Annotated[str | None, MayDiffer(commands=True)] = option(
        None,
        "Run the trials on a Ray cluster, which needs the package ray: its address, as HOST:PORT "
        "or ray://HOST:PORT; auto finds the one that this machine belongs to, or starts one on "
        "this machine alone, which uses all of its GPUs (default: one trial after the other in "
        "this process)",
    )
    ray_gpus_per_trial: Annotated[float | None, Limits(at_least=0), MayDiffer(commands=True)] = (
        option(
            None,
            "GPUs of a trial on a Ray cluster, at most 1; with 0.5, two trials share a GPU "
            "(default: 1, or 0 if the cluster has none)",
        )
    )


BENCHMARK_GROUPS: tuple[type, ...] = (
    ComparedOptions,
    GenerationOptions,
    EvaluationOptions,
    RunOptions,
)


def set_by_benchmark() -> dict[str, str]:
    """Return the trainer's options that the benchmark sets itself -> what to do instead."""
    traits = options_with(TrainingConfig, SetByBenchmark)
    return {name: trait.advice for name, trait in traits.items()}


@cache
def training_groups() -> tuple[type, ...]:
    """Return the trainer's groups of options without those that the benchmark sets."""
    ours = {f.name for group in BENCHMARK_GROUPS for f in fields(group)}
    ours |= set_by_benchmark().keys()
    groups = []
    for group in OPTION_GROUPS:
        types = types_of(group)
        left: list[tuple[str, Any, Any]] = [
            (f.name, types[f.name], option(f.default, f.metadata["help"], secret=not f.repr))
            for f in fields(group)
            if f.name not in ours
        ]
        if left:
            title = f"Training: {group._argument_group_name.lower()}"  # type: ignore[attr-defined]
            namespace = {"_argument_group_name": title}
            groups.append(make_dataclass(group.__name__, left, namespace=namespace, kw_only=True))
    return tuple(groups)
