"""The samples of training: an image variant and a prompt for each position of the stream."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .cache import ControlCache, ControlEncoder, ImageEncoder, LatentCache
from .caption_variants import AS_THEY_ARE, CaptionRules
from .control_crops import ControlPlan
from .image_folder import (
    Example,
    warn_of_long_images,
    warn_of_missed_masks,
    warn_of_small_images,
)
from .random_masks import random_mask
from .sampler import SampleStream
from .seeds import generator
from .transforms import CropPlan, Variant

logger = logging.getLogger(__name__)


class TrainingSet(Dataset[dict[str, Any]]):
    """Maps a position of the endless sample stream to a sample: ``training_set[position]``.

    A sample contains ``position``; ``prompt``; ``content_key`` of the image; ``original_size``
    (height, width) of the image before resizing, ``crop_top_left`` of the crop of the resized image
    and ``target_size`` (height, width) of the crop, all int tensors of shape (2,); and either
    ``mean`` and ``std`` of the latents from the cache, (channels, h, w), or ``pixel_values``,
    (3, height, width), decoded on demand. If any of the examples has a mask, every sample contains
    ``mask``, (1, height, width) of the latents or of the pixels, which is 1 where the loss counts.
    ``controls`` is a list of the latents or pixel values of its control images.
    For a base that fills, it contains ``fill_mask``, (1, height, width), which is 1 where to fill.

    The samples at ``batch_size`` positions from a multiple of ``batch_size`` on have the same
    target size.

    A sample is a function of the arguments and the position, so any worker may make any sample.
    Prior preservation uses a second set with another ``name``, which goes through all class images
    in its own order.

    Args:
        examples: the images; at least one.
        seed: of the run.
        name: of the stream.
        repeats: how many times each image is used in an epoch, times its own number.
        batch_size: of the micro-batches.
        caption_dropout: fraction of samples with an empty prompt.
        caption_rules: how captions become prompts.
        cache: of latents; :meth:`fill_cache` must have been called. Without one, each sample uses
            any possible crop.
        cached_crops: variants per image in the cache; each sample uses one of them.
        controls: how control images become pixel values, if any image has some.
        control_cache: of their latents, if there is a cache of latents.
        control_dropout: fraction of samples without their control images.
        masked: the loss counts where the masks of the images are white.
        fill: what a base for inpainting fills: random masks, or the given ones of images that have
            one. Its samples are not cached. None for other bases.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        plan: CropPlan,
        seed: int,
        *,
        name: str = "instance",
        repeats: int = 1,
        batch_size: int = 1,
        caption_dropout: float = 0.0,
        caption_rules: CaptionRules = AS_THEY_ARE,
        cache: LatentCache | None = None,
        cached_crops: int = 8,
        controls: ControlPlan | None = None,
        control_cache: ControlCache | None = None,
        control_dropout: float = 0.0,
        masked: bool = True,
        fill: Literal["random", "given"] | None = None,
    ) -> None:
        self.examples = list(examples)
        self.plan = plan
        self.seed = seed
        self.caption_dropout = caption_dropout
        self._prompts = [caption_rules.variants(e.caption, seed) for e in self.examples]
        self.cache = cache
        self.controls, self.control_cache = controls, control_cache
        self.control_dropout = control_dropout
        self.has_masks = any(example.mask for example in self.examples)
        self.masked, self.fill = masked and self.has_masks, fill
        self.targets = [plan.target_size(example.size) for example in self.examples]
        once = [number for number, e in enumerate(self.examples) for _ in range(e.repeats)]
        self._items = once * repeats  # of the stream -> number of the example
        groups = [self.targets[number] for number in self._items]
        self.stream = SampleStream(len(self._items), seed, name, groups, batch_size)
        self._kept: list[tuple[Variant, ...]] = []
        if cache is not None:
            self._kept = [
                plan.kept(example.size, example.content_key, cached_crops, seed)
                for example in self.examples
            ]
        warn_of_small_images(self.examples, plan)
        warn_of_long_images(self.examples, plan)
        warn_of_missed_masks(self.examples, plan)
        if plan.buckets is not None:
            self._report_buckets()

    def __len__(self) -> int:
        """Return the number of positions in an epoch, with those that pad buckets."""
        return self.stream.length

    @property
    def prompts(self) -> list[str]:
        """All prompts that samples can have, once each; with dropout also the empty one."""
        prompts = [prompt for variants in self._prompts for prompt in variants]
        return list(dict.fromkeys([*prompts, ""] if self.caption_dropout else prompts))

    @property
    def digest(self) -> str:
        """Hash of the images, their captions, masks, control images, buckets and order, by which a
        resumed run can tell whether its data have changed."""
        images = [[example.content_key, example.caption] for example in self.examples]
        parts: list[Any] = [len(self), images]
        if any(example.repeats != 1 for example in self.examples):
            parts.append([example.repeats for example in self.examples])
        if self.plan.buckets is not None:
            parts += [self.targets, self.stream.batch_size]
        if self.has_masks:
            parts.append([example.mask and example.mask.cache_key for example in self.examples])
        if any(example.controls for example in self.examples):
            parts.append([[c.content_key for c in example.controls] for example in self.examples])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def fill_cache(
        self, encode: ImageEncoder, part: slice = slice(None), progress: bool = True
    ) -> int:
        """Encode those of the examples that the cache is missing; see :meth:`LatentCache.fill`."""
        assert self.cache is not None
        wanted = zip(self.examples[part], self._kept[part], strict=True)
        return self.cache.fill(wanted, encode, progress=progress)

    def fill_control_cache(
        self, encode: ControlEncoder, part: slice = slice(None), progress: bool = True
    ) -> int:
        """Encode those control images that the cache is missing."""
        assert self.control_cache is not None
        wanted = zip(self.examples[part], self._kept[part], strict=True)
        return self.control_cache.fill(wanted, encode, progress=progress)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.sample(self._items[self.stream.index(position)], position)

    def sample(self, item: int, position: int) -> dict[str, Any]:
        """Return the sample of the example with number ``item``, as it would be at ``position``."""
        example = self.examples[item]
        random = self._generator("variant", position)
        if self.cache is not None:
            kept = self._kept[item]
            variant = kept[int(torch.randint(len(kept), (), generator=random))]
            image = dict(self.cache.get(example.cache_key, variant))
        else:
            variant = self.plan.draw(example.size, random)
            image = {"pixel_values": self.plan.pixel_values(example.load(), variant)}
            if example.mask is not None:
                image["mask"] = self.plan.mask_values(example.mask.load(), variant)
            if self.fill is not None:
                image["fill_mask"] = self._fill_mask(image.get("mask"), variant, position)
        if not self.masked:
            image.pop("mask", None)
        elif example.mask is None:
            (some, *_) = image.values()
            image["mask"] = torch.ones(1, *some.shape[1:])
        width, height = example.size
        return {
            "position": position,
            "prompt": self._prompt(item, position),
            "content_key": example.content_key,
            "original_size": torch.tensor([height, width]),
            "crop_top_left": torch.tensor([variant.top, variant.left]),
            "target_size": torch.tensor([variant.height, variant.width]),
            "controls": self._controls(example, variant, position),
            **image,
        }

    def _controls(self, example: Example, variant: Variant, position: int) -> list[Tensor]:
        """Return the latents or pixel values of the control images of a sample."""
        if not example.controls or self._drops("control", self.control_dropout, position):
            return []
        if self.control_cache is not None:
            return [self.control_cache.get(c, example.size, variant) for c in example.controls]
        assert self.controls is not None
        return [
            self.controls.pixel_values(c.load(), example.size, variant) for c in example.controls
        ]

    def _fill_mask(self, mask: Tensor | None, variant: Variant, position: int) -> Tensor:
        """Return the given mask, black or white as in the pipelines, or a random one."""
        if mask is not None and self.fill == "given":
            return (mask >= 0.5).float()
        random = self._generator("fill mask", position)
        return random_mask(variant.height, variant.width, random)

    def _report_buckets(self) -> None:
        """Log how many images each bucket has, and how many are repeated to fill its last batch."""
        counts, padding = Counter(self.targets), self.stream.padding
        logger.info(
            "%s images by aspect-ratio bucket (height,width): %s",
            self.stream.name,
            "; ".join(
                f"{height},{width}: {count}"
                + (f" (+{more} repeated in each epoch)" if (more := padding[height, width]) else "")
                for (height, width), count in sorted(counts.items())
            ),
        )
        if any(padding.values()):
            logger.info(
                "images are repeated to fill a bucket's last batch of %d; a smaller "
                "--train_batch_size repeats fewer",
                self.stream.batch_size,
            )

    def _prompt(self, item: int, position: int) -> str:
        if self._drops("caption", self.caption_dropout, position):
            return ""
        variants = self._prompts[item]
        if len(variants) == 1:
            return variants[0]
        random = self._generator("caption variant", position)
        return variants[int(torch.randint(len(variants), (), generator=random))]

    def _drops(self, what: str, fraction: float, position: int) -> bool:
        draw = torch.rand((), generator=self._generator(f"{what} dropout", position))
        return float(draw) < fraction

    def _generator(self, purpose: str, position: int) -> torch.Generator:
        # without the stream's name, class images would get the instance images' random numbers
        return generator(self.seed, f"{purpose} of {self.stream.name}", position)


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples into a batch.

    Returns:
        ``positions``, ``prompts``, ``content_keys`` and ``controls`` as lists; ``original_sizes``,
        ``crop_top_lefts`` and ``target_sizes`` (batch, 2); ``mean`` and ``std``, or
        ``pixel_values``, and perhaps ``mask`` and ``fill_mask``, with a batch axis.
    """
    batch: dict[str, Any] = {
        f"{name}s": [sample[name] for sample in samples]
        for name in ("position", "prompt", "content_key")
    }
    batch["controls"] = [sample["controls"] for sample in samples]
    for name in ("original_size", "crop_top_left", "target_size"):
        batch[f"{name}s"] = torch.stack([sample[name] for sample in samples])
    for name in ("mean", "std", "pixel_values", "mask", "fill_mask"):
        if name in samples[0]:
            batch[name] = torch.stack([sample[name] for sample in samples])
    return batch
