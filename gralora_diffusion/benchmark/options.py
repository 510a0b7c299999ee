"""Every option of the benchmark; those of the training are the trainer's own."""

from __future__ import annotations

from dataclasses import dataclass, fields, make_dataclass
from typing import Any, ClassVar, Literal, get_type_hints

from gralora_diffusion.options.fields import option
from gralora_diffusion.training.config.training_config import OPTION_GROUPS

#: The trainer's options that the benchmark sets itself, and by what.
SET_BY_THE_BENCHMARK = {
    "instance_data_dir": "give --dreambooth_dir or --captioned_dir",
    "instance_prompt": "it is made of --unique_token and the subject's class",
    "class_prompt": "it is made of the subject's class",
    "class_data_dir": "class pictures are drawn into --output_dir",
    "rank": "give it in --methods, as in lora-r32",
    "gralora_k": "give it in --methods, as in gralora-r32-k2",
    "hybrid_rank": "give it in --methods, as in gralora-r24-k2-h8",
    "lora_alpha": "every method has scaling 1",
    "rank_pattern": "methods are compared at one rank",
    "k_pattern": "methods are compared at one k",
    "alpha_pattern": "every method has scaling 1",
    "initial_adapter": "every unit is trained from the base",
    "seed": "give --seeds",
    "dry_run": "see what one training takes by `gralora train --dry_run`",
    "local_rank": "launchers say it by an environment variable",
    "overwrite_output_dir": "finished units are kept; for new ones give another --output_dir",
    "checkpointing_steps": "a unit that was under way is done again",
    "checkpoints_total_limit": "a unit that was under way is done again",
    "resume_from_checkpoint": "the same command goes on by itself",
    "logging_dir": "what comes out is the report",
    "report_to": "what comes out is the report",
    "push_to_hub": "what comes out is the report",
    "hub_token": "what comes out is the report",
    "hub_model_id": "what comes out is the report",
    "validation_prompt": "prompts come from --dreambooth_dir, --captioned_dir and --drift_prompts",
    "validation_negative_prompt": "pictures are drawn without",
    "num_validation_images": "give --images_per_prompt",
    "validation_height": "pictures have the size of --resolution",
    "validation_width": "pictures have the size of --resolution",
    "validation_epochs": "pictures are drawn at the end of a unit",
    "validation_steps": "pictures are drawn at the end of a unit",
    "validation_guidance_scale": "give --drawing_guidance_scale",
    "validation_inference_steps": "give --inference_steps",
    "skip_final_inference": "pictures are what is judged",
}


@dataclass(kw_only=True)
class ComparedOptions:
    """What is compared, and on what."""

    _argument_group_name: ClassVar[str] = "What is compared"

    suite: Literal["tiny"] | None = option(
        None,
        "A file of options that is bundled: tiny is samples/configs/benchmark_tiny.yaml, which "
        "needs no download. Other options win over it",
    )
    methods: list[str] | None = option(  # noqa: RUF009
        None,
        "lora-r<rank>, dora-r<rank>, loha-r<rank>, gralora-r<rank>-k<k>, "
        "gralora-r<rank>-k<k>-h<hybrid rank>, full; with -lr<rate> behind, a learning rate of its "
        "own; base: nothing is trained (default: those of the run in --output_dir; of a new one "
        "lora-r32 lora-r64 gralora-r32-k2)",
    )
    seeds: list[int] | None = option(  # noqa: RUF009
        None, "Seeds of each method (default: those of the run in --output_dir; of a new one 0)"
    )
    protocols: list[str] | None = option(  # noqa: RUF009
        None,
        "subject: the DreamBooth benchmark; or captioned: pictures for held-out captions; with "
        "either drift: pictures for other prompts; with subject prior: pictures of the class "
        "(default: subject drift prior, or captioned drift if there are captioned pictures)",
    )
    dreambooth_dir: str | None = option(
        None, "A clone of github.com/google/dreambooth, or a folder laid out like its dataset/"
    )
    subjects: list[str] | None = option(None, "Subjects (default: all)")  # noqa: RUF009
    unique_token: str = option("sks", "The token that stands for the subject")
    captioned_dir: str | None = option(
        None, "Folder of captioned pictures; or give --dataset_name and --caption_column"
    )
    held_out: int = option(50, "How many of the captioned pictures are not trained on")


@dataclass(kw_only=True)
class GenerationOptions:
    """The pictures that are drawn of each unit."""

    _argument_group_name: ClassVar[str] = "Drawing"

    images_per_prompt: int = option(4, "Pictures of each prompt")
    max_prompts: int | None = option(None, "Only so many prompts of a subject, the first ones")
    drift_prompts: list[str] | None = option(  # noqa: RUF009
        None, "Prompts that have nothing to do with what is learned (default: twelve of our own)"
    )
    drift_images: int = option(2, "Pictures of each of them")
    prior_images: int = option(16, "Pictures of the subject's class")
    inference_steps: int = option(50, "Inference steps")
    drawing_guidance_scale: float | None = option(None, "Guidance scale (default: the pipeline's)")
    drawing_batch_size: int = option(4, "Pictures drawn at once")


@dataclass(kw_only=True)
class JudgingOptions:
    """What judges them."""

    _argument_group_name: ClassVar[str] = "Judging"

    encoders: list[str] | None = option(  # noqa: RUF009
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
    mechanism_steps: int | None = option(
        None, "Log block gradients and input outliers every so many steps, and the updates' ranks"
    )
    mechanism_k: int = option(4, "Into how many blocks per side gradients are cut for that")


@dataclass(kw_only=True)
class RunOptions:
    """Where it all goes."""

    _argument_group_name: ClassVar[str] = "The run"

    output_dir: str = option("gralora-benchmark", "Folder for units and report")
    title: str = option("GraLoRA benchmark", "Title of the report")
    keep_adapters: bool = option(True, "Keep each unit's adapter")
    retry_failed: bool = option(False, "Do units again that failed")
    report_only: bool = option(
        False, "Only make the report of what is in --output_dir, with the options kept there"
    )


BENCHMARK_GROUPS: tuple[type, ...] = (
    ComparedOptions,
    GenerationOptions,
    JudgingOptions,
    RunOptions,
)


def training_groups() -> tuple[type, ...]:
    """The trainer's groups of options without those that the benchmark sets."""
    ours = {f.name for group in BENCHMARK_GROUPS for f in fields(group)}
    groups = []
    for group in OPTION_GROUPS:
        hints = get_type_hints(group)
        left: list[tuple[str, Any, Any]] = [
            (f.name, hints[f.name], option(f.default, f.metadata["help"], secret=not f.repr))
            for f in fields(group)
            if f.name not in SET_BY_THE_BENCHMARK and f.name not in ours
        ]
        if left:
            title = f"Training: {group._argument_group_name.lower()}"  # type: ignore[attr-defined]
            namespace = {"_argument_group_name": title}
            groups.append(make_dataclass(group.__name__, left, namespace=namespace, kw_only=True))
    return tuple(groups)
