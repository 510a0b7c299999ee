"""The training options of the pictures: where they are, what becomes of them, and of the class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .config_options import option


@dataclass(kw_only=True)
class DataOptions:
    """The pictures of the subject and their captions."""

    _argument_group_name: ClassVar[str] = "Pictures and captions"

    instance_data_dir: str | None = option(
        None,
        "Folder with the pictures to learn. Captions: .txt, .caption or .json files beside them, "
        "metadata.jsonl, .csv or .parquet, or sub-folders such as '10_sks dog': repeats and prompt",
    )
    dataset_name: str | None = option(
        None, "Dataset to learn instead: a Hub id or a local dataset folder (needs `datasets`)"
    )
    dataset_config_name: str | None = option(None, "Configuration of that dataset")
    image_column: str = option("image", "Column with the pictures")
    caption_column: str | None = option(
        None,
        "Column with the captions; needed for a dataset with captions. In a folder, of the "
        "metadata file and .json files (default: text, caption or prompt)",
    )
    instance_prompt: str | None = option(
        None, "Prompt for pictures that have no caption, such as 'a photo of sks dog'"
    )
    repeats: int = option(1, "How many times each picture counts in an epoch")
    max_sequence_length: int | None = option(
        None, "Tokens of a prompt at most, where the base leaves it open (T5, FLUX.2)"
    )
    clip_skip: int | None = option(
        None,
        "Layers to skip at the end of CLIP, counted as diffusers does: 1 is what other programs "
        "call clip skip 2 (Stable Diffusion 1.x, 2.x, XL and 3)",
    )
    caption_dropout: float = option(0.0, "Share of samples that train with an empty caption")
    skip_bad_images: bool = option(
        False, "Train without the pictures that cannot be decoded instead of stopping"
    )


@dataclass(kw_only=True)
class PriorOptions:
    """Keeping what the base knows of the subject's class."""

    _argument_group_name: ClassVar[str] = "Prior preservation"

    with_prior_preservation: bool = option(
        False, "Also train on the subject's class, so that the class does not turn into the subject"
    )
    prior_source: Literal["images", "teacher"] = option(
        "images",
        "images: class pictures that the base draws first; teacher: the predictions of the frozen "
        "base on the class prompt, without class pictures",
    )
    class_prompt: str | None = option(None, "Prompt of the class, such as 'a photo of a dog'")
    class_data_dir: str | None = option(
        None, "Folder of the class pictures; those that lack are drawn into it"
    )
    num_class_images: int = option(100, "How many class pictures there shall be")
    prior_loss_weight: float = option(1.0, "Weight of the class's loss")
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = option(
        None,
        "Precision for drawing class pictures (default: on a GPU fp16, or bf16 for Stable "
        "Diffusion 3 and FLUX, else fp32)",
    )
    sample_batch_size: int = option(4, "Class pictures drawn at once")


@dataclass(kw_only=True)
class ImageOptions:
    """From picture to latents."""

    _argument_group_name: ClassVar[str] = "Image size, crops and caches"

    resolution: int | None = option(
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
    center_crop: bool = option(False, "Crop the middle instead of a random part")
    random_flip: bool = option(False, "Mirror at random")
    image_interpolation_mode: Literal[
        "nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"
    ] = option("lanczos", "How pictures are resized")
    cache_latents: bool = option(True, "Encode each picture once")
    cached_crops: int = option(
        8, "Random crops kept per picture by the latent cache; each sample draws one of them"
    )
    latent_cache_dir: str | None = option(
        None,
        "Folder that keeps latents and encoded prompts, for this run and the next (default: each "
        "process keeps them in memory)",
    )
