"""Every training option, grouped by topic: its name, type, limits, default and help.

The options of what a run is trained on are in ``data_options.py``.

Annotations on its type say how an option behaves, and every list of options is derived from them.
``training/checks`` checks how options fit together.

Features of diffusers' DreamBooth scripts have the same names here. ``None`` means either that the
feature is off or that the model family's default applies, which is found once the base is known
(the help says which).
"""

from __future__ import annotations

import re
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

from .data_options import NO_EDITS

# optimizer -> (module to import, package to install); None if it needs no package of its own
OPTIMIZERS: dict[str, tuple[str, str] | None] = {
    "adamw": None,
    "adamw8bit": ("bitsandbytes", "bitsandbytes"),
    "prodigy": ("prodigyopt", "prodigyopt"),
    "adafactor": None,
    "schedulefree": ("schedulefree", "schedulefree"),
}


@dataclass(kw_only=True)
class LossOptions:
    """What is predicted, and how much each timestep counts."""

    _argument_group_name: ClassVar[str] = "Noise and loss"

    loss_type: Annotated[Literal["l2", "huber", "smooth_l1"], Fixed()] = option(
        "l2",
        "What the loss makes of an error. l2: its square; huber and smooth_l1: pseudo-Huber, which "
        "counts large errors less, scaled so that it is the square of small errors or twice the "
        "absolute value of large ones",
    )
    huber_c: Annotated[float, Limits(above=0), Fixed()] = option(
        0.1, "Pseudo-Huber: errors below this count as their square, those above by their size"
    )
    huber_schedule: Annotated[Literal["constant", "exponential", "snr"] | None, Fixed()] = option(
        None,
        "Pseudo-Huber: how --huber_c depends on the timestep. constant: not at all; exponential: "
        "from 1 without noise to --huber_c at full noise; snr: the same by the signal-to-noise "
        "ratio (default: snr, or exponential for flow matching, which has no such ratio)",
    )
    noise_offset: Annotated[float, Limits(at_least=0), OnlyFor("ddpm"), Fixed()] = option(
        0.0, "Strength of the offset noise; 0.05 to 0.1 are usual"
    )
    snr_gamma: Annotated[float | None, Limits(above=0), OnlyFor("ddpm"), Fixed()] = option(
        None, "Gamma of the loss's Min-SNR weighting; 5.0 is usual (default: no weighting)"
    )
    soft_min_snr: Annotated[bool, Needs("snr_gamma"), OnlyFor("ddpm"), Fixed()] = option(
        False, "Use a smooth minimum in the Min-SNR weighting (soft Min-SNR)"
    )
    debiased_estimation_loss: Annotated[bool, OnlyFor("ddpm"), Fixed()] = option(
        False, "Weight the loss by 1 / sqrt(SNR), or by 1 / (SNR + 1) for v_prediction"
    )
    input_perturbation: Annotated[float, Limits(at_least=0), OnlyFor("ddpm"), Fixed()] = option(
        0.0, "Strength of further noise in the denoiser's input, not in its target; 0.1 is usual"
    )
    multires_noise_iterations: Annotated[int, Limits(at_least=0), OnlyFor("ddpm"), Fixed()] = (
        option(0, "Number of coarser noises that are added to the noise; 6 to 10 are usual")
    )
    multires_noise_discount: Annotated[
        float,
        Limits(above=0, below=1),
        Needs("multires_noise_iterations"),
        OnlyFor("ddpm"),
        Fixed("multires_noise_iterations"),
    ] = option(0.3, "Strength of each coarser noise, relative to the one before")
    min_timestep: Annotated[int | None, Limits(at_least=0), Fixed()] = option(
        None, "Train only on timesteps from here on; 0 has the least noise (default: all)"
    )
    max_timestep: Annotated[int | None, Limits(at_least=1), Fixed()] = option(
        None, "Train only on timesteps below this one; all known bases have 1000 (default: all)"
    )
    prediction_type: Annotated[
        Literal["epsilon", "v_prediction", "sample"] | None, OnlyFor("ddpm"), Fixed()
    ] = option(None, "What the base predicts (default: as set in its scheduler)")
    weighting_scheme: Annotated[
        Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"] | None,
        OnlyFor("flow_matching"),
        Fixed(),
    ] = option(
        None,
        "Flow matching: how often noise levels are sampled (logit_normal, mode) or how much they "
        "are weighted (sigma_sqrt, cosmap) (default: the family's)",
    )
    logit_mean: Annotated[float, OnlyFor("flow_matching"), Fixed()] = option(
        0.0, "Mean of logit_normal; a higher mean gives less noise"
    )
    logit_std: Annotated[float, Limits(above=0), OnlyFor("flow_matching"), Fixed()] = option(
        1.0, "Standard deviation of logit_normal"
    )
    mode_scale: Annotated[float, OnlyFor("flow_matching"), Fixed()] = option(1.29, "Scale of mode")
    flow_shift: Annotated[float | None, Limits(above=0), OnlyFor("flow_matching"), Fixed()] = (
        option(
            None,
            "Flow matching: shift of the noise levels; above 1 gives more noise, 1 is no shift "
            "(default: as in the base's pipeline, depending on the resolution if it does)",
        )
    )
    guidance_scale: Annotated[
        float | None, Limits(at_least=0), OnlyFor("flow_matching"), Fixed()
    ] = option(
        None,
        "Guidance scale for training a guidance-distilled base, such as FLUX.1 dev (default: 3.5)",
    )


@dataclass(kw_only=True)
class AdapterOptions:
    """Size and placement of the adapter."""

    _argument_group_name: ClassVar[str] = "Adapter"

    rank: Annotated[
        int, Limits(at_least=1), SetByBenchmark("give it in --methods, as in lora-r32")
    ] = option(
        16,
        "Rank: the adapter has as many parameters as a LoRA of this rank, and the rank of its "
        "update is up to gralora_k x rank",
    )
    gralora_k: Annotated[
        int, Limits(at_least=1), SetByBenchmark("give it in --methods, as in gralora-r32-k2")
    ] = option(
        2,
        "Number of blocks per side of a weight. It must divide the rank, and is lowered for layers "
        "whose widths it does not divide. 1 gives a LoRA. With a larger k the update grows more "
        "slowly: to train as fast as a LoRA, multiply the learning rate by about sqrt(gralora_k)",
    )
    hybrid_rank: Annotated[
        int, Limits(at_least=0), SetByBenchmark("give it in --methods, as in gralora-r24-k2-h8")
    ] = option(0, "Rank of an additional LoRA over the whole layer")
    lora_alpha: Annotated[
        int | None, Limits(at_least=1), SetByBenchmark("every method has scaling 1")
    ] = option(
        None,
        "The update is scaled by lora_alpha / (rank + hybrid_rank) (default: scaling 1)",
    )
    lora_dropout: Annotated[float, Limits(at_least=0, below=1)] = option(
        0.0, "Dropout on the adapter's input"
    )
    target_preset: Annotated[str, AlwaysReported()] = option(
        "attention", "Layers to adapt, as one of the family's presets"
    )
    lora_layers: str | None = option(
        None,
        "Layers to adapt instead of a preset: comma-separated endings of module paths, or 're:' "
        "and a regular expression that matches the whole path",
    )
    exclude_modules: str | None = option(
        None, "Layers to exclude, in text encoders too; written like --lora_layers"
    )
    rank_pattern: Annotated[
        list[str] | None, SetByBenchmark("methods are compared at one rank")
    ] = option(
        None,
        "Other ranks for some layers: REGEX=RANK, one or several. The regular expression matches "
        "the end of a layer's path; the first match applies",
    )
    k_pattern: Annotated[list[str] | None, SetByBenchmark("methods are compared at one k")] = (
        option(None, "Other values of k for some layers: REGEX=K, as for --rank_pattern")
    )
    alpha_pattern: Annotated[list[str] | None, SetByBenchmark("every method has scaling 1")] = (
        option(
            None,
            "Other values of alpha for some layers: REGEX=ALPHA, as for --rank_pattern (default: "
            "as given by --lora_alpha)",
        )
    )
    initial_adapter: Annotated[
        str | None,
        Place(read=True, hub_id=True),
        SetByBenchmark("every trial starts from the base"),
    ] = option(
        None,
        "GraLoRA file, folder or Hub id that provides the initial values instead of random ones. "
        "Its rank, k, alpha and layers must match the options. gralora import makes one from a "
        "LoRA. If a checkpoint is resumed, its values are used instead",
    )
    train_text_encoder: bool = option(False, "Adapt the text encoders too")
    text_encoders: Annotated[list[str] | None, Needs("train_text_encoder")] = option(
        None,
        "Text encoders to adapt, such as text_encoder text_encoder_2 (default: all CLIP encoders, "
        "but not T5)",
    )
    text_encoder_target_preset: Annotated[str, Needs("train_text_encoder")] = option(
        "attention", "--target_preset for the text encoders"
    )

    @property
    def alpha(self) -> int:
        """``lora_alpha``, or the alpha that gives scaling 1."""
        return self.rank + self.hybrid_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def target_modules(self) -> list[str] | str | None:
        """``lora_layers`` as PEFT takes it: endings, a regular expression, or None (the preset)."""
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
        None, "Optimizer steps; overrides --num_train_epochs"
    )
    seed: Annotated[
        int, Limits(at_least=0, below=2**32), ChangesSamples(), SetByBenchmark("give --seeds")
    ] = option(0, "Random seed. The same seed gives the same adapter")
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"] | None, AlwaysReported()] = option(
        None,
        "Precision of the frozen base; the adapter stays in fp32 (default: accelerate's setting)",
    )
    gradient_checkpointing: bool = option(
        False, "Use less memory at the cost of a slower backward pass"
    )
    allow_tf32: bool = option(
        False, "Use TF32 for faster fp32 matrix products on NVIDIA GPUs since Ampere"
    )
    enable_xformers_memory_efficient_attention: bool = option(
        False, "Use xformers' attention instead of torch's"
    )
    torch_compile: bool = option(
        False,
        "Compile the denoiser's repeated blocks: the first step is slower, later ones are faster",
    )
    offload_base: Annotated[str, SetByBenchmark("a benchmark keeps its base on the device")] = (
        option(
            "auto",
            "Keep blocks of the frozen denoiser in the CPU's memory, and copy each to the GPU when "
            "it computes. auto: as few as necessary; none; blocks: all of them; or a fraction such "
            "as 0.3, the part that stays on the GPU. Text encoders are streamed likewise",
        )
    )
    dry_run: Annotated[
        bool, SetByBenchmark("run `gralora train --dry_run` to see what one training needs")
    ] = option(
        False,
        "Check everything, print what would be trained and how much memory it would need, and "
        "exit. No weights are loaded and nothing is written",
    )
    device_memory: Annotated[
        str | None, Needs("dry_run"), SetByBenchmark("give it to `gralora train --dry_run`")
    ] = option(
        None,
        "With --dry_run: the memory of a GPU, such as 8GiB. The plan is for that GPU, whatever "
        "this machine has, and says which options make the run fit",
    )
    dataloader_num_workers: Annotated[
        int, Limits(at_least=0), MayDiffer(processes=True, commands=True)
    ] = option(0, "Number of processes that decode images; 0 decodes them in the main process")
    local_rank: Annotated[
        int,
        MayDiffer(processes=True),
        SetByBenchmark("launchers set it through an environment variable"),
    ] = option(-1, "Set by launchers; not meant for users")

    @property
    def device_bytes(self) -> int | None:
        """``device_memory`` in bytes; a number without a unit is in GiB, and so is one in GB.

        Raises:
            ValueError: it is not a size.
        """
        if self.device_memory is None:
            return None
        found = re.fullmatch(r"(\d+(?:\.\d+)?) *([gm]?)i?b?", self.device_memory.strip().lower())
        if not found or not float(found[1]):
            raise ValueError(self.device_memory)
        return int(float(found[1]) * (2**20 if found[2] == "m" else 2**30))

    @property
    def kept_blocks(self) -> float | None:
        """The fraction of the denoiser's blocks that stay on the device.

        None if nothing is offloaded, or if that is decided later (``auto``).
        """
        if self.offload_base in ("auto", "none"):
            return None
        return 0.0 if self.offload_base == "blocks" else float(self.offload_base)


@dataclass(kw_only=True)
class OptimizerOptions:
    """How the adapter is optimized."""

    _argument_group_name: ClassVar[str] = "Optimizer and learning rate"

    learning_rate: Annotated[float | None, Limits(above=0), AlwaysReported()] = option(
        None, "Learning rate (default: the family's; 1.0 with Prodigy)"
    )
    text_encoder_lr: Annotated[float | None, Limits(above=0), Needs("train_text_encoder")] = option(
        None, "Learning rate of the text encoder (default: 5e-6; --learning_rate with Prodigy)"
    )
    loraplus_lr_ratio: Annotated[
        float | None,
        Limits(above=0),
        Fixed(),
        SetByBenchmark("both factors of a method have one rate"),
    ] = option(
        None,
        "LoRA+: learning rate of the second factor, B, divided by that of the first; 16 is usual "
        "(default: one rate for both)",
    )
    scale_lr: bool = option(
        False,
        "Multiply the learning rates by batch size, accumulation steps and number of processes",
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
    lr_warmup_steps: Annotated[int, Limits(at_least=0)] = option(
        0, "Warm-up length in optimizer steps"
    )
    lr_num_cycles: Annotated[int, Limits(at_least=1)] = option(
        1, "Number of cycles of cosine_with_restarts"
    )
    lr_power: Annotated[float, Limits(above=0)] = option(1.0, "Exponent of polynomial")
    lr_step_rules: str | None = option(
        None,
        "Rules of piecewise_constant: '1:100,0.1:200,0.01' means the learning rate times 1 before "
        "step 100, times 0.1 before step 200, and times 0.01 from there on",
    )
    optimizer: Annotated[str, Fixed(), AlwaysReported()] = option(
        "adamw",
        "adamw, adamw8bit, prodigy, adafactor or schedulefree, in upper or lower case; or the "
        "import path of any other subclass of torch.optim.Optimizer, such as torch.optim.RAdam",
    )
    optimizer_args: Annotated[list[str] | None, Fixed()] = option(
        None,
        "Arguments of an optimizer that is given by its import path: key=value, one or several. "
        "Values are written as in YAML, such as betas=[0.9,0.99] or foreach=false",
    )
    use_8bit_adam: bool = option(False, "The same as --optimizer adamw8bit")
    adam_beta1: Annotated[float, Limits(at_least=0, below=1)] = option(
        0.9, "Decay rate of the first moment (AdamW, Prodigy, schedule-free)"
    )
    adam_beta2: Annotated[float, Limits(at_least=0, below=1)] = option(
        0.999, "Decay rate of the second moment (AdamW, Prodigy, schedule-free)"
    )
    adam_weight_decay: Annotated[float | None, Limits(at_least=0)] = option(
        None, "Weight decay of the denoiser's adapter, for any optimizer (default: the family's)"
    )
    adam_weight_decay_text_encoder: Annotated[
        float, Limits(at_least=0), Needs("train_text_encoder")
    ] = option(1e-3, "Weight decay of the text encoders' adapters")
    adam_epsilon: Annotated[float, Limits(above=0)] = option(
        1e-8, "Epsilon (AdamW, Prodigy, schedule-free)"
    )
    prodigy_beta3: Annotated[float | None, Limits(at_least=0, below=1)] = option(
        None,
        "Decay rate of Prodigy's step-size estimate (default: the square root of --adam_beta2)",
    )
    prodigy_decouple: bool = option(True, "Decouple Prodigy's weight decay, as in AdamW")
    prodigy_use_bias_correction: bool = option(True, "Use Adam's bias correction in Prodigy")
    prodigy_safeguard_warmup: bool = option(
        True, "Exclude the warm-up from Prodigy's step-size estimate"
    )
    max_grad_norm: Annotated[float, Limits(above=0, infinite=True)] = option(
        1.0, "Clip gradients to this norm; inf turns clipping off"
    )
    use_ema: Annotated[bool, Fixed()] = option(
        False, "Save a moving average of the adapter over the steps"
    )
    ema_decay: Annotated[float, Limits(at_least=0, below=1), Needs("use_ema")] = option(
        0.999, "Decay rate of that average, reached after a warm-up (0.99 takes 890 steps)"
    )


@dataclass(kw_only=True)
class OutputOptions:
    """Which files are written, and where."""

    _argument_group_name: ClassVar[str] = "Output and checkpoints"

    output_dir: Annotated[str, Place(written=True), MayDiffer(commands=True)] = option(
        "gralora-dreambooth-model", "Folder for the adapter and all other output"
    )
    overwrite_output_dir: Annotated[
        bool, SetByBenchmark("finished trials are kept; for new ones give another --output_dir")
    ] = option(
        False,
        "Start over in a folder that contains an earlier run: its adapter is replaced and its "
        "checkpoints are deleted",
    )
    checkpointing_steps: Annotated[
        int, Limits(at_least=1), SetByBenchmark("an interrupted trial is repeated")
    ] = option(500, "Optimizer steps between checkpoints")
    checkpoints_total_limit: Annotated[
        int | None, Limits(at_least=1), SetByBenchmark("an interrupted trial is repeated")
    ] = option(None, "How many checkpoints to keep; older ones are deleted (default: keep all)")
    resume_from_checkpoint: Annotated[
        str | None, Place(read=True), SetByBenchmark("run the same command again to resume")
    ] = option(
        None,
        "Checkpoint to resume from: latest, or a checkpoint folder (its name in --output_dir is "
        "enough)",
    )
    logging_dir: Annotated[str, Place(), SetByBenchmark("the benchmark's output is its report")] = (
        option("logs", "Folder for the tracker's files, in --output_dir")
    )
    report_to: Annotated[
        Literal["tensorboard", "wandb", "all", "none"],
        MayDiffer(processes=True),
        SetByBenchmark("the benchmark's output is its report"),
    ] = option("tensorboard", "Where loss, learning rates and validation images are logged")
    push_to_hub: Annotated[bool, SetByBenchmark("the benchmark's output is its report")] = option(
        False, "Upload the result to the Hugging Face Hub"
    )
    hub_token: Annotated[
        str | None,
        Needs("push_to_hub"),
        Unrecorded(),
        SetByBenchmark("the benchmark's output is its report"),
    ] = option(
        None,
        "Token for the upload (default: that of `hf auth login`). It is never written to a file",
        secret=True,
    )
    hub_model_id: Annotated[
        str | None, Needs("push_to_hub"), SetByBenchmark("the benchmark's output is its report")
    ] = option(None, "Repository for the upload, owner/name (default: the name of --output_dir)")


@dataclass(kw_only=True)
class ValidationOptions:
    """Images generated during training and at the end."""

    _argument_group_name: ClassVar[str] = "Validation images"

    validation_prompt: Annotated[
        list[str] | None,
        SetByBenchmark("prompts come from --dreambooth_dir, --captioned_dir and --drift_prompts"),
    ] = option(None, "One or more prompts for the validation images")
    validation_image: Annotated[
        list[str] | None,
        Place(read=True),
        Needs("validation_prompt", "validation_prompts_file"),
        SetByBenchmark(NO_EDITS),
    ] = option(
        None,
        "Control images of the validation images, for an editing base: one file for all prompts or "
        "one for each; several for one prompt are separated by commas. For a base for inpainting: "
        "the images in which --validation_mask is filled (default: whole images are generated)",
    )
    validation_mask: Annotated[
        list[str] | None,
        Place(read=True),
        Needs("validation_image"),
        SetByBenchmark(NO_EDITS),
    ] = option(
        None,
        "Masks of these images for a base for inpainting, white where to fill: one file for all "
        "prompts or one for each",
    )
    validation_prompts_file: Annotated[
        str | None,
        Place(read=True),
        SetByBenchmark("prompts come from --dreambooth_dir, --captioned_dir and --drift_prompts"),
    ] = option(
        None,
        "File with further prompts: a .txt file with one on each line, or a YAML list in which "
        "each may have its own seed, size, negative prompt, guidance, steps and strength",
    )
    validation_negative_prompt: Annotated[
        str | None,
        Needs("validation_prompt", "validation_prompts_file"),
        SetByBenchmark("images are generated without a negative prompt"),
    ] = option(
        None,
        "Negative prompt for all validation images: what to steer away from, if the base takes one",
    )
    num_validation_images: Annotated[
        int,
        Limits(at_least=1),
        Needs("validation_prompt", "validation_prompts_file"),
        SetByBenchmark("give --images_per_prompt"),
    ] = option(4, "Number of images per prompt")
    validation_batch_size: Annotated[
        int | None,
        Limits(at_least=1),
        Needs("validation_prompt", "validation_prompts_file"),
        SetByBenchmark("give --drawing_batch_size"),
    ] = option(
        None,
        "Number of images to generate at once (default: half of --train_batch_size, because "
        "guidance doubles them). Images of control images are generated one by one",
    )
    validation_height: Annotated[
        int | None,
        Needs("validation_prompt", "validation_prompts_file"),
        SetByBenchmark("images have the size of --resolution"),
    ] = option(None, "Height in pixels (default: --resolution)")
    validation_width: Annotated[
        int | None,
        Needs("validation_prompt", "validation_prompts_file"),
        SetByBenchmark("images have the size of --resolution"),
    ] = option(None, "Width in pixels (default: --resolution)")
    validation_epochs: Annotated[
        int,
        Limits(at_least=1),
        Needs("validation_prompt", "validation_prompts_file"),
        SetByBenchmark("images are generated at the end of a trial"),
    ] = option(50, "Epochs between validations")
    validation_steps: Annotated[
        int | None,
        Limits(at_least=1),
        Needs("validation_prompt", "validation_prompts_file"),
        SetByBenchmark("images are generated at the end of a trial"),
    ] = option(None, "Optimizer steps between validations; overrides --validation_epochs")
    validation_guidance_scale: Annotated[
        float | None,
        Limits(at_least=0),
        Needs("validation_prompt", "validation_prompts_file"),
        SetByBenchmark("give --drawing_guidance_scale"),
    ] = option(None, "Guidance scale (default: the pipeline's)")
    validation_inference_steps: Annotated[
        int,
        Limits(at_least=1),
        Needs("validation_prompt", "validation_prompts_file"),
        SetByBenchmark("give --inference_steps"),
    ] = option(30, "Inference steps")
    skip_final_inference: Annotated[bool, SetByBenchmark("the benchmark evaluates images")] = (
        option(False, "Do not generate validation images at the end of training")
    )


def _layers(text: str | None) -> list[str] | str | None:
    """Return endings of paths, or a regular expression."""
    if text is None:
        return None
    if text.startswith("re:"):
        return text[len("re:") :]
    return [ending.strip() for ending in text.split(",") if ending.strip()]
