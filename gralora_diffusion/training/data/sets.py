"""Sets of images with settings of their own, and how their images become samples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from gralora_diffusion.training.config.data_file import ImageSet
from gralora_diffusion.training.config.data_options import ImageOptions
from gralora_diffusion.training.config.training_config import TrainingConfig

from .buckets import Buckets, listed_buckets
from .caption_variants import AS_THEY_ARE, CaptionRules
from .image_folder import Example
from .transforms import CropPlan


@dataclass(frozen=True)
class SampledSet:
    """Images, and how they become samples.

    Attributes:
        examples: at least one.
        plans: how they are cropped; an image is trained once in each of these ways.
        repeats: how many times each image is used in an epoch, times its own number.
        share: fraction of all samples that are of this set, in place of ``repeats``.
        caption_dropout: fraction of samples with an empty prompt.
        caption_rules: how captions become prompts.
        loss_weight: of each sample.
    """

    examples: Sequence[Example]
    plans: Sequence[CropPlan]
    repeats: int = 1
    share: float | None = None
    caption_dropout: float = 0.0
    caption_rules: CaptionRules = AS_THEY_ARE
    loss_weight: float = 1.0

    @property
    def shapes(self) -> bool:
        """Whether its samples may differ in size."""
        return len(self.plans) > 1 or any(plan.buckets is not None for plan in self.plans)


def by_set(
    config: TrainingConfig, images: Sequence[Example]
) -> Iterator[tuple[ImageSet, TrainingConfig, Sequence[Example]]]:
    """Yield each set of the images, the options as they are for it, and its images."""
    start = 0
    for _, group in groupby(images, key=lambda image: id(image.image_set)):
        end = start + sum(1 for _ in group)  # those of a set are in a row
        image_set = images[start].image_set
        yield image_set, image_set.options(config), images[start:end]
        start = end


def sampled_sets(
    config: TrainingConfig, images: Sequence[Example], size_divisor: int
) -> list[SampledSet]:
    """Return the sets of the images with their settings; ``size_divisor`` is the family's."""
    return [
        SampledSet(
            group,
            crop_plans(own, size_divisor),
            repeats=own.repeats,
            share=image_set.share,
            caption_dropout=own.caption_dropout,
            caption_rules=CaptionRules.of(own),
            loss_weight=image_set.loss_weight,
        )
        for image_set, own, group in by_set(config, images)
    ]


def crop_plans(options: ImageOptions, size_divisor: int) -> list[CropPlan]:
    """Return how each image is cropped: once for each of its resolutions."""
    return [crop_plan(replace(options, resolution=side), size_divisor) for side in sides(options)]


def largest_size(parts: Iterable[SampledSet]) -> tuple[int, int]:
    """Return height and width of the image that has the most pixels when it is trained."""
    sizes = (p.target_size(e.size) for part in parts for p in part.plans for e in part.examples)
    return max(sizes, key=math.prod)


def sides(options: ImageOptions) -> list[int]:
    """Return the resolutions that images are trained at, once they are known."""
    if options.resolutions:
        return list(options.resolutions)
    return [] if options.resolution is None else [options.resolution]


def crop_plan(options: ImageOptions, size_divisor: int) -> CropPlan:
    """Return how the images of a run are cropped; ``size_divisor`` is the family's."""
    assert options.resolution is not None
    buckets = None
    if options.use_aspect_ratio_buckets:
        listed = listed_buckets(options.aspect_ratio_buckets)
        buckets = Buckets(options.resolution, size_divisor, listed)
    return CropPlan(
        options.resolution,
        options.center_crop,
        options.random_flip,
        options.image_interpolation_mode,
        buckets,
    )


def described_sets(config: TrainingConfig, images: Sequence[Example]) -> list[str]:
    """Return a line for each set of a data file, and for each folder that has its own repeats.

    It says the name, the number of images, and how often they are used.
    """
    if config.data_config is None and not any(image.concept for image in images):
        return []
    lines = []
    for image_set, own, group in by_set(config, images):
        weight = "" if image_set.loss_weight == 1 else f", loss weight {image_set.loss_weight:g}"
        size = f", {' and '.join(map(str, sides(own)))} pixels" if sides(own) else ""
        name = image_set.name(config)
        if image_set.share is not None:
            often = f"{100 * image_set.share:g} % of the samples"
            lines.append(f"{name}: {len(group)} images, {often}{size}{weight}")
            continue
        for part, count in Counter((image.concept, image.repeats) for image in group).items():
            often = f"repeats {own.repeats * part[1]}"
            lines.append(f"{part[0] or name}: {count} images, {often}{size}{weight}")
    return lines
