"""The options of what a run is trained on: images, captions, crops, masks and prior images.

They are declared as those in ``options.py`` are.
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
    PerSet,
    Place,
    SetByBenchmark,
    option,
)

#: Why the benchmark sets the options of edits.
NO_EDITS = "its methods are compared on text-to-image bases"
_NO_HELD_OUT = "its trials all have the same length, and are compared by their images"

#: Roles of the sets of a data file that may have an option.
_PRIOR, _HELD_OUT = ("prior",), ("held_out",)
_ALSO_HELD_OUT = PerSet(roles=("train", *_HELD_OUT))


@dataclass(kw_only=True)
class DataOptions:
    """The images of the subject and their captions."""

    _argument_group_name: ClassVar[str] = "Images and captions"

    instance_data_dir: Annotated[
        str | None,
        Place(read=True),
        SetByBenchmark("give --dreambooth_dir or --captioned_dir"),
        PerSet("folder"),
    ] = option(
        None,
        "Folder with the training images. Captions come from .txt, .caption or .json files beside "
        "them, from metadata.jsonl, .csv or .parquet, or from sub-folders named with repeats and "
        "prompt, such as '10_sks dog'",
    )
    dataset_name: Annotated[str | None, Place(read=True, hub_id=True), PerSet("dataset")] = option(
        None,
        "Dataset to train on instead of a folder: a Hub id or a local dataset (needs `datasets`)",
    )
    data_config: Annotated[
        str | None,
        Place(read=True),
        SetByBenchmark("the benchmark trains on one set. Give --dreambooth_dir or --captioned_dir"),
    ] = option(
        None,
        "YAML file with several sets of images, each with its own folder or dataset, captions, "
        "crops and share of the samples, in place of --instance_data_dir",
    )
    dataset_config_name: Annotated[str | None, Needs("dataset_name"), PerSet()] = option(
        None, "Configuration of that dataset"
    )
    image_column: Annotated[str, PerSet()] = option("image", "Column with the images")
    caption_column: Annotated[str | None, _ALSO_HELD_OUT] = option(
        None,
        "Column with the captions, required for a dataset with captions. For a folder: the column "
        "or key in the metadata file and .json files (default: text, caption or prompt)",
    )
    caption_per_line: Annotated[bool, ChangesSamples(), _ALSO_HELD_OUT] = option(
        False,
        "Each line of a .txt or .caption file is a caption of its own, and each sample uses one of "
        "them. Otherwise, the lines are one caption",
    )
    instance_prompt: Annotated[
        str | None,
        SetByBenchmark("the benchmark makes it from --unique_token and the subject's class"),
        PerSet("prompt", ("train", *_HELD_OUT)),
    ] = option(None, "Prompt for images that have no caption, such as 'a photo of sks dog'")
    repeats: Annotated[int, Limits(at_least=1), PerSet()] = option(
        1, "How many times each image is used in an epoch"
    )
    max_sequence_length: Annotated[int | None, Limits(at_least=1)] = option(
        None, "Maximum number of tokens in a prompt, for bases that allow a choice (T5, FLUX.2)"
    )
    clip_skip: Annotated[int | None, Limits(at_least=1), ChangesSamples()] = option(
        None,
        "Number of layers to skip at the end of CLIP, counted as in diffusers: 1 is called clip "
        "skip 2 in other programs (Stable Diffusion 1.x, 2.x, XL and 3)",
    )
    caption_dropout: Annotated[float, Limits(at_least=0, below=1), ChangesSamples(), PerSet()] = (
        option(0.0, "Fraction of samples that are trained with an empty caption")
    )
    trigger_word: Annotated[str | None, ChangesSamples(), _ALSO_HELD_OUT] = option(
        None,
        "Word for what is learned. It replaces [trigger] in a caption, and goes before a caption "
        "that does not contain it",
    )
    caption_prefix: Annotated[str | None, ChangesSamples(), _ALSO_HELD_OUT] = option(
        None, "Text before every caption, such as a trigger word"
    )
    caption_suffix: Annotated[str | None, ChangesSamples(), _ALSO_HELD_OUT] = option(
        None, "Text after every caption"
    )
    shuffle_tags: Annotated[bool, ChangesSamples(), PerSet()] = option(
        False, "Shuffle the tags of a caption, which are the parts between commas"
    )
    tag_dropout: Annotated[float, Limits(at_least=0, below=1), ChangesSamples(), PerSet()] = option(
        0.0, "Probability of leaving out a tag; one tag of a caption always stays"
    )
    keep_tags: Annotated[int, Limits(at_least=0), ChangesSamples(), PerSet()] = option(
        0, "Number of leading tags that are neither shuffled nor left out"
    )
    caption_variants: Annotated[int, Limits(at_least=1), ChangesSamples(), PerSet()] = option(
        8,
        "Number of variants of a caption whose tags are shuffled or left out. Each sample uses one "
        "of them, and all are encoded before training",
    )
    skip_bad_images: Annotated[bool, _ALSO_HELD_OUT] = option(
        False, "Skip images that cannot be decoded instead of stopping"
    )


@dataclass(kw_only=True)
class SetOptions:
    """What only a set of a data file has, which is no option of a run."""

    _argument_group_name: ClassVar[str] = "Sets of a data file"

    role: Literal["train", "prior", "held_out"] = option(
        "train",
        "train: learn the images; prior: images of the class, for prior preservation; held_out: "
        "only measure the loss on them",
    )
    share: Annotated[float | None, Limits(above=0, below=1)] = option(
        None, "Fraction of a run's samples that are of this set, in place of repeats"
    )
    loss_weight: Annotated[float, Limits(at_least=0)] = option(
        1.0, "Weight of the set's loss relative to other sets'; for a prior, to the subject's"
    )


@dataclass(kw_only=True)
class ControlOptions:
    """The images that an editing base gets beside the prompt."""

    _argument_group_name: ClassVar[str] = "Control images, for training edits"

    control_data_dir: Annotated[
        list[str] | None, Place(read=True), SetByBenchmark(NO_EDITS), PerSet()
    ] = option(
        None,
        "Folder with the images before the edit, under the same names as the training images. "
        "With several folders, each training image has one control image in each, in this "
        "order",
    )
    control_column: Annotated[list[str] | None, SetByBenchmark(NO_EDITS), _ALSO_HELD_OUT] = option(
        None,
        "Columns of the dataset, or of the folder's metadata file, that name or contain the "
        "control images: one or several per row (default for a metadata file: control)",
    )
    control_dropout: Annotated[
        float, Limits(at_least=0, below=1), ChangesSamples(), SetByBenchmark(NO_EDITS)
    ] = option(
        0.0,
        "Fraction of samples that are trained without their control images, so that guidance by "
        "them can be learned; 0.05 to 0.1 are usual for InstructPix2Pix",
    )
    control_resolution: Annotated[
        int | None, Limits(at_least=128), ChangesSamples(), SetByBenchmark(NO_EDITS)
    ] = option(
        None,
        "Pixels per side of control images, as an area: larger ones are reduced, which saves "
        "memory and time. For bases that take them at another size than their image (FLUX.1 "
        "Kontext, FLUX.2; default: as their pipelines do, up to a megapixel)",
    )


@dataclass(kw_only=True)
class HeldOutOptions:
    """Images that are never trained on, whose loss says when to stop."""

    _argument_group_name: ClassVar[str] = "Held-out images"

    held_out_data_dir: Annotated[
        str | None, Place(read=True), SetByBenchmark(_NO_HELD_OUT), PerSet("folder", _HELD_OUT)
    ] = option(
        None,
        "Folder with images of the subject that are never trained on, with captions as in "
        "--instance_data_dir. Their loss is measured during training, as a difference to the "
        "frozen base's",
    )
    held_out_control_data_dir: Annotated[
        list[str] | None,
        Place(read=True),
        Needs("held_out_data_dir"),
        SetByBenchmark(_NO_HELD_OUT),
        PerSet("control_data_dir", _HELD_OUT),
    ] = option(None, "--control_data_dir for the held-out images")
    held_out_mask_data_dir: Annotated[
        str | None,
        Place(read=True),
        Needs("held_out_data_dir"),
        SetByBenchmark(_NO_HELD_OUT),
        PerSet("mask_data_dir", _HELD_OUT),
    ] = option(None, "--mask_data_dir for the held-out images")
    held_out_steps: Annotated[
        int, Limits(at_least=1), Needs("held_out_data_dir"), SetByBenchmark(_NO_HELD_OUT)
    ] = option(50, "Optimizer steps between measurements of their loss")
    held_out_noises: Annotated[
        int, Limits(at_least=1), Needs("held_out_data_dir"), SetByBenchmark(_NO_HELD_OUT)
    ] = option(
        1,
        "Number of noises for each held-out image and noise level. More of them measure more "
        "precisely and take longer",
    )
    stop_when: Annotated[
        Literal["overfit"] | None, Needs("held_out_data_dir"), SetByBenchmark(_NO_HELD_OUT)
    ] = option(
        None,
        "overfit: end the run when the loss of the held-out images has been worse than at its "
        "best, by more than its 95% interval, for --overfit_patience measurements in a row",
    )
    overfit_patience: Annotated[
        int, Limits(at_least=1), Needs("stop_when"), SetByBenchmark(_NO_HELD_OUT)
    ] = option(3, "Number of worse measurements in a row that end the run")


@dataclass(kw_only=True)
class PriorOptions:
    """Preserving what the base knows about the subject's class."""

    _argument_group_name: ClassVar[str] = "Prior preservation"

    with_prior_preservation: Annotated[bool, Fixed()] = option(
        False,
        "Also train on the subject's class, so that other members of it do not turn into the "
        "subject",
    )
    prior_source: Annotated[
        Literal["images", "teacher"],
        Needs("with_prior_preservation"),
        Fixed("with_prior_preservation"),
    ] = option(
        "images",
        "images: the base generates class images before training; teacher: the adapter learns the "
        "frozen base's predictions for the class prompt, without class images",
    )
    class_prompt: Annotated[
        str | None,
        Needs("with_prior_preservation"),
        Fixed("with_prior_preservation"),
        SetByBenchmark("the benchmark makes it from the subject's class"),
        PerSet("prompt", _PRIOR),
    ] = option(None, "Prompt of the class, such as 'a photo of a dog'")
    class_data_dir: Annotated[
        str | None,
        Place(read=True, written=True),
        Needs("with_prior_preservation"),
        SetByBenchmark("class images are generated into --output_dir"),
        PerSet("folder", _PRIOR),
    ] = option(None, "Folder of the class images; missing ones are generated into it")
    num_class_images: Annotated[
        int, Limits(at_least=1), Needs("with_prior_preservation"), PerSet(roles=_PRIOR)
    ] = option(100, "Number of class images")
    prior_loss_weight: Annotated[
        float,
        Limits(at_least=0),
        Needs("with_prior_preservation"),
        Fixed("with_prior_preservation"),
        PerSet("loss_weight", _PRIOR),
    ] = option(1.0, "Weight of the class's loss relative to the subject's")
    prior_generation_precision: Annotated[
        Literal["no", "fp32", "fp16", "bf16"] | None, Needs("with_prior_preservation")
    ] = option(
        None,
        "Precision for generating class images (default: on a GPU fp16, or bf16 for Stable "
        "Diffusion 3 and FLUX; otherwise fp32)",
    )
    sample_batch_size: Annotated[int, Limits(at_least=1), Needs("with_prior_preservation")] = (
        option(4, "Batch size for generating class images")
    )


@dataclass(kw_only=True)
class ImageOptions:
    """From image to latents."""

    _argument_group_name: ClassVar[str] = "Image size, crops and caches"

    resolution: Annotated[int | None, ChangesSamples(), AlwaysReported(), _ALSO_HELD_OUT] = option(
        None, "Height and width of the training images in pixels (default: the family's)"
    )
    resolutions: Annotated[list[int] | None, ChangesSamples(), PerSet()] = option(
        None,
        "Train each image at each of these sizes instead of --resolution, which then only sets the "
        "size of validation images (default: the largest of these). A batch has one size",
    )
    use_aspect_ratio_buckets: Annotated[bool, _ALSO_HELD_OUT] = option(
        False,
        "Train each image at the nearest of eleven shapes from 1:2 to 2:1, with about as many "
        "pixels as the square. An image with fewer pixels gets a smaller bucket",
    )
    aspect_ratio_buckets: Annotated[str | None, _ALSO_HELD_OUT] = option(
        None,
        "Train each image at the nearest of these sizes instead of the built-in shapes, written as "
        "'height,width;height,width;...'. Smaller images are enlarged. Implies "
        "--use_aspect_ratio_buckets",
    )
    center_crop: Annotated[bool, ChangesSamples(), PerSet()] = option(
        False, "Crop the center instead of a random part"
    )
    random_flip: Annotated[bool, ChangesSamples(), PerSet()] = option(
        False, "Mirror images at random"
    )
    image_interpolation_mode: Annotated[
        Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"], ChangesSamples()
    ] = option("lanczos", "Interpolation for resizing images")
    cache_latents: Annotated[bool, ChangesSamples()] = option(True, "Encode each image only once")
    cached_crops: Annotated[int, Limits(at_least=1), Needs("cache_latents"), ChangesSamples()] = (
        option(8, "Random crops per image in the latent cache; each sample uses one of them")
    )
    latent_cache_dir: Annotated[str | None, Place(written=True), MayDiffer(commands=True)] = option(
        None,
        "Folder where latents, encoded prompts and facts on checked images are kept for this and "
        "later runs (default: each process keeps latents and prompts in memory)",
    )


@dataclass(kw_only=True)
class MaskOptions:
    """Which parts of an image the loss counts, and which a base for inpainting fills."""

    _argument_group_name: ClassVar[str] = "Masks"

    masked_loss: Annotated[
        bool, Fixed(), SetByBenchmark("methods are compared on whole images")
    ] = option(
        False,
        "Count the loss only where an image's mask is white. A mask is an image of the same size: "
        "name.mask.png, name_mask.png, name-mask.png or name-masklabel.png beside the image, or as "
        "the options below say. Images without a mask are trained as a whole",
    )
    inpaint_given_masks: Annotated[
        bool, ChangesSamples(), SetByBenchmark("methods are compared on text-to-image bases")
    ] = option(
        False,
        "A base for inpainting learns to fill what the masks of the images show white. By default, "
        "and for images without a mask, each sample has a random mask: the whole image, rectangles "
        "or strokes",
    )
    mask_data_dir: Annotated[
        str | None, Place(read=True), Needs("masked_loss", "inpaint_given_masks"), PerSet()
    ] = option(
        None, "Folder of masks. Each has the name of its image, with any image file extension"
    )
    mask_column: Annotated[
        str | None, Needs("masked_loss", "inpaint_given_masks"), _ALSO_HELD_OUT
    ] = option(
        None,
        "Column with the masks of a dataset, or with their paths in a metadata file (default: "
        "mask or mask_file_name, if it exists)",
    )
    mask_from_alpha: Annotated[
        bool, Needs("masked_loss", "inpaint_given_masks"), _ALSO_HELD_OUT
    ] = option(False, "Use the opacity of an image as its mask, unless it has another mask")
    mask_outside: Annotated[
        Literal["ignore", "weight", "base"], Needs("masked_loss"), Fixed("masked_loss")
    ] = option(
        "ignore",
        "What the loss counts where the mask is black. ignore: nothing; weight: the image, with "
        "another weight; base: the prediction of the frozen base, so that the adapter changes "
        "nothing there",
    )
    mask_outside_weight: Annotated[
        float | None, Limits(at_least=0), Needs("masked_loss"), Fixed("masked_loss")
    ] = option(
        None,
        "Weight where the mask is black, relative to where it is white (default: 0.1 for "
        "--mask_outside weight, 1 for base)",
    )
    normalize_masked_area_loss: Annotated[bool, Needs("masked_loss"), Fixed("masked_loss")] = (
        option(
            False,
            "Divide the loss of a sample by its mean weight, so that an image counts the same "
            "however small the white part of its mask is",
        )
    )
