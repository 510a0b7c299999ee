"""Every training option, grouped by topic: its name, type, limits, default and help.

How an option behaves stands at its type, as an annotation; every list of options is derived from
these. What options mean together is checked in ``training/checks``.

Names are those of diffusers' DreamBooth scripts where the feature is theirs. ``None`` means: no
such thing, or the default of the model family, found once the base is known (the help says which).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from gralora_diffusion.options.fields import (
    AlwaysReported,
    ChangesSamples,
    Fixed,
    Limits,
    MayDiffer,
    Needs,
    OnlyFor,
    Place,
    SetByBenchmark,
    Unrecorded,
    option,
)

# optimizer -> (module to import, package to install); None where nothing is to be installed
OPTIMIZERS: dict[str, tuple[str, str] | None] = {
    "adamw": None,
    "adamw8bit": ("bitsandbytes", "bitsandbytes"),
    "prodigy": ("prodigyopt", "prodigyopt"),
    "adafactor": None,
    "schedulefree": ("schedulefree", "schedulefree"),
}


@dataclass(kw_only=True)
class DataOptions:
    """The pictures of the subject and their captions."""

    _argument_group_name: ClassVar[str] = "Pictures and captions"

    instance_data_dir: Annotated[
        str | None, Place(read=True), SetByBenchmark("give --dreambooth_dir or --captioned_dir")
    ] = option(
        None,
        "Folder with the pictures to learn. Captions: .txt, .caption or .json files beside them, "
        "metadata.jsonl, .csv or .parquet, or sub-folders such as '10_sks dog': repeats and prompt",
    )
    dataset_name: Annotated[str | None, Place(read=True, hub_id=True)] = option(
        None, "Dataset to learn instead: a Hub id or a local dataset folder (needs `datasets`)"
    )
    dataset_config_name: Annotated[str | None, Needs("dataset_name")] = option(
        None, "Configuration of that dataset"
    )
    image_column: str = option("image", "Column with the pictures")
    caption_column: str | None = option(
        None,
        "Column with the captions; needed for a dataset with captions. In a folder, of the "
        "metadata file and .json files (default: text, caption or prompt)",
    )
    instance_prompt: Annotated[
        str | None, SetByBenchmark("it is made of --unique_token and the subject's class")
    ] = option(None, "Prompt for pictures that have no caption, such as 'a photo of sks dog'")
    repeats: Annotated[int, Limits(at_least=1)] = option(
        1, "How many times each picture counts in an epoch"
    )
    max_sequence_length: Annotated[int | None, Limits(at_least=1)] = option(
        None, "Tokens of a prompt at most, where the base leaves it open (T5, FLUX.2)"
    )
    clip_skip: Annotated[int | None, Limits(at_least=1), ChangesSamples()] = option(
        None,
        "Layers to skip at the end of CLIP, counted as diffusers does: 1 is what other programs "
        "call clip skip 2 (Stable Diffusion 1.x, 2.x, XL and 3)",
    )
    caption_dropout: Annotated[float, Limits(at_least=0, below=1), ChangesSamples()] = option(
        0.0, "Share of samples that train with an empty caption"
    )
    skip_bad_images: bool = option(
        False, "Train without the pictures that cannot be decoded instead of stopping"
    )


@dataclass(kw_only=True)
class PriorOptions:
    """Keeping what the base knows of the subject's class."""

    _argument_group_name: ClassVar[str] = "Prior preservation"

    with_prior_preservation: Annotated[bool, Fixed()] = option(
        False, "Also train on the subject's class, so that the class does not turn into the subject"
    )
    prior_source: Annotated[
        Literal["images", "teacher"],
        Needs("with_prior_preservation"),
        Fixed("with_prior_preservation"),
    ] = option(
        "images",
        "images: class pictures that the base draws first; teacher: the predictions of the frozen "
        "base on the class prompt, without class pictures",
    )
    class_prompt: Annotated[
        str | None,
        Needs("with_prior_preservation"),
        Fixed("with_prior_preservation"),
        SetByBenchmark("it is made of the subject's class"),
    ] = option(None, "Prompt of the class, such as 'a photo of a dog'")
    class_data_dir: Annotated[
        str | None,
        Place(read=True, written=True),
        Needs("with_prior_preservation"),
        SetByBenchmark("class pictures are drawn into --output_dir"),
    ] = option(None, "Folder of the class pictures; those that lack are drawn into it")
    num_class_images: Annotated[int, Limits(at_least=1), Needs("with_prior_preservation")] = option(
        100, "How many class pictures there shall be"
    )
    prior_loss_weight: Annotated[
        float,
        Limits(at_least=0),
        Needs("with_prior_preservation"),
        Fixed("with_prior_preservation"),
    ] = option(1.0, "Weight of the class's loss")
    prior_generation_precision: Annotated[
        Literal["no", "fp32", "fp16", "bf16"] | None, Needs("with_prior_preservation")
    ] = option(
        None,
        "Precision for drawing class pictures (default: on a GPU fp16, or bf16 for Stable "
        "Diffusion 3 and FLUX, else fp32)",
    )
    sample_batch_size: Annotated[int, Limits(at_least=1), Needs("with_prior_preservation")] = (
        option(4, "Class pictures drawn at once")
    )


@dataclass(kw_only=True)
class ImageOptions:
    """From picture to latents."""

    _argument_group_name: ClassVar[str] = "Image size, crops and caches"

    resolution: Annotated[int | None, ChangesSamples(), AlwaysReported()] = option(
        None, "Side of the training pictures in pixels (default: the family's)"
    )
    use_aspect_ratio_buckets: bool = option(
        False,
        "Train each picture at the nearest of eleven shapes from 1:2 to 2:1 with about as many "
        "pixels as the square; a picture with fewer pixels in a shape of its own size",
    )
    aspect_ratio_buckets: str | None = option(
        None,
        "Train each picture at the nearest of these sizes, 'height,width;height,width;...', in "
        "place of those shapes; smaller pictures are enlarged. Implies --use_aspect_ratio_buckets",
    )
    center_crop: Annotated[bool, ChangesSamples()] = option(
        False, "Crop the middle instead of a random part"
    )
    random_flip: Annotated[bool, ChangesSamples()] = option(False, "Mirror at random")
    image_interpolation_mode: Annotated[
        Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"], ChangesSamples()
    ] = option("lanczos", "How pictures are resized")
    cache_latents: Annotated[bool, ChangesSamples()] = option(True, "Encode each picture once")
    cached_crops: Annotated[int, Limits(at_least=1), Needs("cache_latents"), ChangesSamples()] = (
        option(
            8, "Random crops kept per picture by the latent cache; each sample draws one of them"
        )
    )
    latent_cache_dir: Annotated[str | None, Place(written=True), MayDiffer(commands=True)] = option(
        None,
        "Folder that keeps latents and encoded prompts, for this run and the next (default: each "
        "process keeps them in memory)",
    )


@dataclass(kw_only=True)
class LossOptions:
    """What is predicted, and how much each timestep counts."""

    _argument_group_name: ClassVar[str] = "Noise and loss"

    noise_offset: Annotated[float, Limits(at_least=0), OnlyFor("ddpm"), Fixed()] = option(
        0.0, "Strength of the offset noise; 0.05 to 0.1 if wanted"
    )
    snr_gamma: Annotated[float | None, Limits(above=0), OnlyFor("ddpm"), Fixed()] = option(
        None, "Min-SNR weighting of the loss; 5.0 if wanted"
    )
    prediction_type: Annotated[
        Literal["epsilon", "v_prediction", "sample"] | None, OnlyFor("ddpm"), Fixed()
    ] = option(None, "What the base predicts (default: as its scheduler says)")
    weighting_scheme: Annotated[
        Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"] | None,
        OnlyFor("flow_matching"),
        Fixed(),
    ] = option(
        None,
        "Flow matching: how often noise levels are drawn (logit_normal, mode) or how much they "
        "count (sigma_sqrt, cosmap) (default: the family's)",
    )
    logit_mean: Annotated[float, OnlyFor("flow_matching"), Fixed()] = option(
        0.0, "Mean of logit_normal; higher: less noise"
    )
    logit_std: Annotated[float, Limits(above=0), OnlyFor("flow_matching"), Fixed()] = option(
        1.0, "Standard deviation of logit_normal"
    )
    mode_scale: Annotated[float, OnlyFor("flow_matching"), Fixed()] = option(1.29, "Scale of mode")
    flow_shift: Annotated[float | None, Limits(above=0), OnlyFor("flow_matching"), Fixed()] = (
        option(
            None,
            "Flow matching: shift of the noise levels; above 1: more noise, 1: none (default: "
            "as the base's pipeline shifts them, by resolution where it does so)",
        )
    )
    guidance_scale: Annotated[
        float | None, Limits(at_least=0), OnlyFor("flow_matching"), Fixed()
    ] = option(
        None,
        "Guidance scale that a guidance-distilled base is trained at, such as FLUX.1 dev's "
        "(default: 3.5)",
    )


@dataclass(kw_only=True)
class AdapterOptions:
    """Shape and place of the adapter."""

    _argument_group_name: ClassVar[str] = "Adapter"

    rank: Annotated[
        int, Limits(at_least=1), SetByBenchmark("give it in --methods, as in lora-r32")
    ] = option(16, "Parameters as a LoRA of this rank; the update's rank is up to gralora_k x rank")
    gralora_k: Annotated[
        int, Limits(at_least=1), SetByBenchmark("give it in --methods, as in gralora-r32-k2")
    ] = option(
        2,
        "Blocks per side of a weight; divides the rank, and is lowered where it does not divide a "
        "width. 1 is a LoRA",
    )
    hybrid_rank: Annotated[
        int, Limits(at_least=0), SetByBenchmark("give it in --methods, as in gralora-r24-k2-h8")
    ] = option(0, "Rank of a LoRA added over the whole layer")
    lora_alpha: Annotated[
        int | None, Limits(at_least=1), SetByBenchmark("every method has scaling 1")
    ] = option(
        None,
        "The update is scaled by lora_alpha / (rank + hybrid_rank) (default: scaling 1)",
    )
    lora_dropout: Annotated[float, Limits(at_least=0, below=1)] = option(
        0.0, "Dropout in front of the adapter"
    )
    target_preset: Annotated[str, AlwaysReported()] = option(
        "attention", "Layers to adapt, by the family's name for them"
    )
    lora_layers: str | None = option(
        None,
        "Layers to adapt instead: endings of module paths with commas between, or 're:' and a "
        "regular expression for the whole path",
    )
    exclude_modules: str | None = option(
        None, "Layers to leave out of those, in text encoders too; written like --lora_layers"
    )
    rank_pattern: Annotated[
        list[str] | None, SetByBenchmark("methods are compared at one rank")
    ] = option(
        None,
        "Another rank for single layers: REGEX=RANK, one or several. The regular expression is for "
        "the end of the layer's path; the first that matches counts",
    )
    k_pattern: Annotated[list[str] | None, SetByBenchmark("methods are compared at one k")] = (
        option(None, "The same for k: REGEX=K")
    )
    alpha_pattern: Annotated[list[str] | None, SetByBenchmark("every method has scaling 1")] = (
        option(None, "The same for alpha: REGEX=ALPHA (default: as --lora_alpha says)")
    )
    initial_adapter: Annotated[
        str | None,
        Place(read=True, hub_id=True),
        SetByBenchmark("every unit is trained from the base"),
    ] = option(
        None,
        "GraLoRA file, folder or Hub id whose values the run starts from, in place of random ones. "
        "Rank, k, alpha and layers must be those of the options. gralora import makes one of a "
        "LoRA. A checkpoint that is resumed wins over it",
    )
    train_text_encoder: bool = option(False, "Adapt the text encoders too")
    text_encoders: Annotated[list[str] | None, Needs("train_text_encoder")] = option(
        None,
        "Which of them, such as text_encoder text_encoder_2 (default: the CLIPs, not T5)",
    )
    text_encoder_target_preset: Annotated[str, Needs("train_text_encoder")] = option(
        "attention", "--target_preset for the text encoders"
    )

    @property
    def alpha(self) -> int:
        """``lora_alpha``, or what gives scaling 1."""
        return self.rank + self.hybrid_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def target_modules(self) -> list[str] | str | None:
        """``lora_layers`` as PEFT takes it: endings or a regular expression; None: the preset."""
        return _layers(self.lora_layers)

    @property
    def excluded_modules(self) -> list[str] | str | None:
        """``exclude_modules`` as PEFT takes it."""
        return _layers(self.exclude_modules)


@dataclass(kw_only=True)
class LengthOptions:
    """Batches, steps and memory."""

    _argument_group_name: ClassVar[str] = "Steps, batches and memory"

    train_batch_size: Annotated[int, Limits(at_least=1), AlwaysReported()] = option(
        4, "Samples per process and forward pass"
    )
    gradient_accumulation_steps: Annotated[int, Limits(at_least=1), AlwaysReported()] = option(
        1, "Forward passes per optimizer step"
    )
    num_train_epochs: Annotated[int, Limits(at_least=1)] = option(
        1, "Passes over the data, if --max_train_steps is not given"
    )
    max_train_steps: Annotated[int | None, Limits(at_least=1)] = option(
        None, "Optimizer steps; wins over --num_train_epochs"
    )
    seed: Annotated[
        int, Limits(at_least=0, below=2**32), ChangesSamples(), SetByBenchmark("give --seeds")
    ] = option(0, "Seed of all that is random. Same seed, same adapter")
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"] | None, AlwaysReported()] = option(
        None, "Precision of the frozen base; the adapter stays fp32 (default: as accelerate is set)"
    )
    gradient_checkpointing: bool = option(False, "Less memory, slower backward pass")
    allow_tf32: bool = option(False, "Faster fp32 products on NVIDIA GPUs since Ampere")
    enable_xformers_memory_efficient_attention: bool = option(
        False, "Attention of xformers in place of torch's own"
    )
    torch_compile: bool = option(
        False, "Compile the denoiser's repeated blocks: a slower first step, faster ones after it"
    )
    dry_run: Annotated[
        bool, SetByBenchmark("see what one training takes by `gralora train --dry_run`")
    ] = option(
        False,
        "Check everything, print what would be trained and the memory that it would take, and end; "
        "no weights are loaded and nothing is written",
    )
    dataloader_num_workers: Annotated[
        int, Limits(at_least=0), MayDiffer(processes=True, commands=True)
    ] = option(0, "Processes that decode pictures; 0: in the main one")
    local_rank: Annotated[
        int,
        MayDiffer(processes=True),
        SetByBenchmark("launchers say it by an environment variable"),
    ] = option(-1, "Set by launchers; not for people")


@dataclass(kw_only=True)
class OptimizerOptions:
    """How the adapter moves."""

    _argument_group_name: ClassVar[str] = "Optimizer and learning rate"

    learning_rate: Annotated[float | None, Limits(above=0), AlwaysReported()] = option(
        None, "Learning rate (default: the family's; 1.0 with Prodigy)"
    )
    text_encoder_lr: Annotated[float | None, Limits(above=0), Needs("train_text_encoder")] = option(
        None, "Learning rate of the text encoder (default: 5e-6; with Prodigy --learning_rate)"
    )
    scale_lr: bool = option(
        False, "Multiply the learning rates by batch size, accumulation and processes"
    )
    lr_scheduler: Annotated[
        Literal[
            "linear",
            "cosine",
            "cosine_with_restarts",
            "polynomial",
            "constant",
            "constant_with_warmup",
            "piecewise_constant",
        ],
        AlwaysReported(),
    ] = option("constant", "Schedule of the learning rate")
    lr_warmup_steps: Annotated[int, Limits(at_least=0)] = option(0, "Optimizer steps of warm-up")
    lr_num_cycles: Annotated[int, Limits(at_least=1)] = option(1, "Cycles of cosine_with_restarts")
    lr_power: Annotated[float, Limits(above=0)] = option(1.0, "Power of polynomial")
    lr_step_rules: str | None = option(
        None,
        "Rules of piecewise_constant: '1:100,0.1:200,0.01' is 1 x the learning rate before step "
        "100, 0.1 x before step 200, then 0.01 x",
    )
    optimizer: Annotated[str, Fixed(), AlwaysReported()] = option(
        "adamw", "adamw, adamw8bit, prodigy, adafactor or schedulefree; capitals do not matter"
    )
    use_8bit_adam: bool = option(False, "The same as --optimizer adamw8bit")
    adam_beta1: Annotated[float, Limits(at_least=0, below=1)] = option(
        0.9, "First decay rate (AdamW, Prodigy, schedule-free)"
    )
    adam_beta2: Annotated[float, Limits(at_least=0, below=1)] = option(
        0.999, "Second decay rate (the same)"
    )
    adam_weight_decay: Annotated[float | None, Limits(at_least=0)] = option(
        None, "Weight decay of the denoiser's adapter, any optimizer (default: the family's)"
    )
    adam_weight_decay_text_encoder: Annotated[
        float, Limits(at_least=0), Needs("train_text_encoder")
    ] = option(1e-3, "The same for the text encoder's")
    adam_epsilon: Annotated[float, Limits(above=0)] = option(
        1e-8, "Epsilon (AdamW, Prodigy, schedule-free)"
    )
    prodigy_beta3: Annotated[float | None, Limits(at_least=0, below=1)] = option(
        None, "Decay rate of Prodigy's step-size estimate (default: the root of --adam_beta2)"
    )
    prodigy_decouple: bool = option(True, "Weight decay as in AdamW")
    prodigy_use_bias_correction: bool = option(True, "Adam's bias correction in Prodigy")
    prodigy_safeguard_warmup: bool = option(
        True, "Keep a warm-up out of Prodigy's step-size estimate"
    )
    max_grad_norm: Annotated[float, Limits(above=0, infinite=True)] = option(
        1.0, "Gradients are clipped to this norm; inf: never"
    )
    use_ema: Annotated[bool, Fixed()] = option(
        False, "Average the adapter over the steps; the average is saved"
    )
    ema_decay: Annotated[float, Limits(at_least=0, below=1), Needs("use_ema")] = option(
        0.999, "Decay rate of that average, reached after a warm-up (0.99: 890 steps)"
    )


@dataclass(kw_only=True)
class OutputOptions:
    """What is kept, and where."""

    _argument_group_name: ClassVar[str] = "Output and checkpoints"

    output_dir: Annotated[str, Place(written=True), MayDiffer(commands=True)] = option(
        "gralora-dreambooth-model", "Folder for everything that comes out"
    )
    overwrite_output_dir: Annotated[
        bool, SetByBenchmark("finished units are kept; for new ones give another --output_dir")
    ] = option(
        False,
        "Start anew in a folder that holds an earlier run: its adapter is replaced, its "
        "checkpoints are deleted",
    )
    checkpointing_steps: Annotated[
        int, Limits(at_least=1), SetByBenchmark("a unit that was under way is done again")
    ] = option(500, "Optimizer steps between checkpoints")
    checkpoints_total_limit: Annotated[
        int | None, Limits(at_least=1), SetByBenchmark("a unit that was under way is done again")
    ] = option(None, "Checkpoints kept, the newest ones (default: all)")
    resume_from_checkpoint: Annotated[
        str | None, Place(read=True), SetByBenchmark("the same command goes on by itself")
    ] = option(None, "latest, or a checkpoint folder (its name in --output_dir is enough)")
    logging_dir: Annotated[str, Place(), SetByBenchmark("what comes out is the report")] = option(
        "logs", "Folder of the tracker's files, in --output_dir"
    )
    report_to: Annotated[
        Literal["tensorboard", "wandb", "all", "none"],
        MayDiffer(processes=True),
        SetByBenchmark("what comes out is the report"),
    ] = option("tensorboard", "Where loss, learning rates and validation pictures are logged")
    push_to_hub: Annotated[bool, SetByBenchmark("what comes out is the report")] = option(
        False, "Upload the result to the Hugging Face Hub"
    )
    hub_token: Annotated[
        str | None,
        Needs("push_to_hub"),
        Unrecorded(),
        SetByBenchmark("what comes out is the report"),
    ] = option(
        None,
        "Token for the upload (default: that of `hf auth login`). Never written to any file",
        secret=True,
    )
    hub_model_id: Annotated[
        str | None, Needs("push_to_hub"), SetByBenchmark("what comes out is the report")
    ] = option(None, "Repository for the upload, owner/name (default: the name of --output_dir)")


@dataclass(kw_only=True)
class ValidationOptions:
    """Pictures made on the way and at the end."""

    _argument_group_name: ClassVar[str] = "Validation pictures"

    validation_prompt: Annotated[
        list[str] | None,
        SetByBenchmark("prompts come from --dreambooth_dir, --captioned_dir and --drift_prompts"),
    ] = option(None, "One prompt or several")
    validation_negative_prompt: Annotated[
        str | None, Needs("validation_prompt"), SetByBenchmark("pictures are drawn without")
    ] = option(
        None, "What guidance leads away from in all of these pictures, where the base takes it"
    )
    num_validation_images: Annotated[
        int,
        Limits(at_least=1),
        Needs("validation_prompt"),
        SetByBenchmark("give --images_per_prompt"),
    ] = option(4, "Pictures per prompt")
    validation_height: Annotated[
        int | None,
        Needs("validation_prompt"),
        SetByBenchmark("pictures have the size of --resolution"),
    ] = option(None, "Height in pixels (default: --resolution)")
    validation_width: Annotated[
        int | None,
        Needs("validation_prompt"),
        SetByBenchmark("pictures have the size of --resolution"),
    ] = option(None, "Width in pixels (default: --resolution)")
    validation_epochs: Annotated[
        int,
        Limits(at_least=1),
        Needs("validation_prompt"),
        SetByBenchmark("pictures are drawn at the end of a unit"),
    ] = option(50, "Epochs between validations")
    validation_steps: Annotated[
        int | None,
        Limits(at_least=1),
        Needs("validation_prompt"),
        SetByBenchmark("pictures are drawn at the end of a unit"),
    ] = option(None, "Optimizer steps between validations; wins over --validation_epochs")
    validation_guidance_scale: Annotated[
        float | None,
        Limits(at_least=0),
        Needs("validation_prompt"),
        SetByBenchmark("give --drawing_guidance_scale"),
    ] = option(None, "Guidance scale (default: the pipeline's)")
    validation_inference_steps: Annotated[
        int,
        Limits(at_least=1),
        Needs("validation_prompt"),
        SetByBenchmark("give --inference_steps"),
    ] = option(30, "Inference steps")
    skip_final_inference: Annotated[bool, SetByBenchmark("pictures are what is judged")] = option(
        False, "Draw nothing at the end"
    )


def _layers(text: str | None) -> list[str] | str | None:
    """Endings of paths, or a regular expression."""
    if text is None:
        return None
    if text.startswith("re:"):
        return text[len("re:") :]
    return [ending.strip() for ending in text.split(",") if ending.strip()]
