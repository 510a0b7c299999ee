"""The samples of training: an image variant and a prompt for each position of the stream."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .cache import ControlCache, ControlEncoder, ImageEncoder, LatentCache
from .control_crops import ControlPlan
from .example_table import ExampleTable
from .image_folder import (
    Example,
    warn_of_long_images,
    warn_of_missed_masks,
    warn_of_small_images,
)
from .random_masks import random_mask
from .sampler import Rotation, SampleStream
from .seeds import generator
from .sets import SampledSet
from .transforms import CropPlan, Variant

logger = logging.getLogger(__name__)


class _Entry(NamedTuple):
    """An image at one of its sizes."""

    example: Example
    part: SampledSet
    plan: CropPlan
    prompts: tuple[tuple[str, ...], ...]  # of each of its captions
    kept: tuple[Variant, ...]


#: Numbers that stand for an entry, because there may be a million: those of its set, of the plan
#: and the example in that, and of its target size; and how many times an epoch has the example.
_VIEW = np.dtype([(name, "i4") for name in ("part", "plan", "example", "target", "repeats")])


class TrainingSet(Dataset[dict[str, Any]]):
    """Maps a position of the endless sample stream to a sample: ``training_set[position]``.

    A sample contains ``position``; ``prompt``; ``content_key`` of the image; ``original_size``
    (height, width) of the image before resizing, ``crop_top_left`` of the crop of the resized image
    and ``target_size`` (height, width) of the crop, all int tensors of shape (2,); and either
    ``mean`` and ``std`` of the latents from the cache, (channels, h, w), or ``pixel_values``,
    (3, height, width), decoded on demand. If any of the examples has a mask, every sample contains
    ``mask``, (1, height, width) of the latents or of the pixels, which is 1 where the loss counts.
    ``controls`` is a list of the latents or pixel values of its control images. If sets differ in
    the weight of their loss, every sample contains ``loss_weight``. For a base that fills, it
    contains ``fill_mask``, (1, height, width), which is 1 where to fill.

    The samples at ``batch_size`` positions from a multiple of ``batch_size`` on have the same
    target size.

    A sample is a function of the arguments and the position, so any worker may make any sample.
    Prior preservation uses a second set with another ``name``, which goes through all class images
    in its own order.

    Args:
        parts: sets of images, with how they become samples; at least one.
        seed: of the run.
        name: of the stream.
        batch_size: of the micro-batches.
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
        parts: Sequence[SampledSet],
        seed: int,
        *,
        name: str = "instance",
        batch_size: int = 1,
        cache: LatentCache | None = None,
        cached_crops: int = 8,
        controls: ControlPlan | None = None,
        control_cache: ControlCache | None = None,
        control_dropout: float = 0.0,
        masked: bool = True,
        fill: Literal["random", "given"] | None = None,
    ) -> None:
        self.parts = list(parts)
        self.examples: Sequence[Example] = self.parts[0].examples
        if len(self.parts) > 1:
            self.examples = ExampleTable(chain.from_iterable(part.examples for part in parts))
        self.seed = seed
        self.cache = cache
        self.controls, self.control_cache = controls, control_cache
        self.control_dropout = control_dropout
        self.has_masks = any(example.mask for example in self.examples)
        self.masked, self.fill = masked and self.has_masks, fill
        self.weighted = any(part.loss_weight != 1 for part in parts)
        self.cached_crops = cached_crops
        self._targets: dict[tuple[int, int], int] = {}  # target size -> its number
        self._views = np.fromiter(self._find_views(), _VIEW)
        # places of an epoch: each is for an entry, or for a member of a rotation
        self._slots, self._turns = array("l"), array("l")  # numbers of these, and of the rotation
        self._rotations: list[Rotation | None] = [None]
        groups = list(self._make_slots(name))
        self.stream = SampleStream(len(groups), seed, name, groups, batch_size)
        for part in parts:
            for plan in part.plans:
                warn_of_small_images(part.examples, plan)
                warn_of_long_images(part.examples, plan)
                warn_of_missed_masks(part.examples, plan)
        if self.shapes:
            self._report_buckets()

    def __len__(self) -> int:
        """Return the number of positions in an epoch, with those that pad buckets."""
        return self.stream.length

    def _find_views(self) -> Iterator[tuple[int, ...]]:
        """Yield the numbers of each image of each set at each of its different sizes."""
        for part_number, part in enumerate(self.parts):
            seen: set[tuple[int, int]] = set()
            for plan_number, plan in enumerate(part.plans):
                for number, example in enumerate(part.examples):
                    size = plan.target_size(example.size)
                    target = self._targets.setdefault(size, len(self._targets))
                    if (number, target) not in seen:  # a small image has one size for several plans
                        seen.add((number, target))
                        yield part_number, plan_number, number, target, example.repeats

    def _entry(self, item: int) -> _Entry:
        part_number, plan_number, number, _, _ = self._views[item].tolist()
        part = self.parts[part_number]
        plan, example, rules = part.plans[plan_number], part.examples[number], part.caption_rules
        kept: tuple[Variant, ...] = ()
        if self.cache is not None:
            kept = plan.kept(example.size, example.content_key, self.cached_crops, self.seed)
        prompts = tuple(rules.variants(caption, self.seed) for caption in example.captions)
        return _Entry(example, part, plan, prompts, kept)

    def _make_slots(self, name: str) -> list[tuple[int, int]]:
        """Make the slots of an epoch, set by set, and return the target size of each.

        A set with a share has as many of them, to the nearest whole number for each size, as make
        that part of all. If all sets have shares, an epoch is so long that each image comes at
        least once.
        """
        sizes = self.targets
        shared: list[tuple[float, list[int]]] = []
        for number, part in enumerate(self.parts):
            (of_part,) = np.nonzero(self._views["part"] == number)
            items = np.repeat(of_part, self._views["repeats"][of_part]).tolist()
            if part.share is None:
                self._slots.extend(items * part.repeats)
            else:
                shared.append((part.share, items))
        self._turns.extend([0] * len(self._slots))
        groups = [sizes[item] for item in self._slots]
        rest = 1 - sum(share for share, _ in shared)
        whole = len(groups) / rest if groups else max((len(n) / s for s, n in shared), default=0)
        for place, (share, items) in enumerate(shared):
            by_target: dict[tuple[int, int], list[int]] = {}
            for item in items:
                by_target.setdefault(sizes[item], []).append(item)
            for target, members in by_target.items():
                count = max(1, round(share * whole * len(members) / len(items)))
                self._turns.extend([len(self._rotations)] * count)
                self._rotations.append(
                    Rotation(members, count, self.seed, f"{name} {place} {target}")
                )
                self._slots.extend(range(count))
                groups += [target] * count
        return groups

    @property
    def shapes(self) -> bool:
        """Whether samples may differ in size."""
        sizes = {(plan.resolution, plan.buckets) for part in self.parts for plan in part.plans}
        return len(sizes) > 1 or any(part.shapes for part in self.parts)

    @property
    def targets(self) -> list[tuple[int, int]]:
        """Height and width of each image, once for each size that it is trained at."""
        sizes = list(self._targets)
        return [sizes[number] for number in self._views["target"].tolist()]

    @property
    def prompts(self) -> list[str]:
        """All prompts that samples can have, once each; with dropout also the empty one."""
        prompts = [
            prompt
            for part in self.parts
            for example in part.examples
            for caption in example.captions
            for prompt in part.caption_rules.variants(caption, self.seed)
        ]
        dropped = any(part.caption_dropout for part in self.parts)
        return list(dict.fromkeys([*prompts, ""] if dropped else prompts))

    @property
    def digest(self) -> str:
        """Hash of the images, their captions, masks, control images, buckets and order, by which a
        resumed run can tell whether its data have changed."""
        images = [[example.content_key, *example.captions] for example in self.examples]
        parts: list[Any] = [len(self), images]
        if any(example.repeats != 1 for example in self.examples):
            parts.append([example.repeats for example in self.examples])
        if self.shapes:
            parts += [self.targets, self.stream.batch_size]
        if self.has_masks:
            parts.append([example.mask and example.mask.cache_key for example in self.examples])
        if any(example.controls for example in self.examples):
            parts.append([[c.content_key for c in example.controls] for example in self.examples])
        if len(self.parts) > 1:
            parts.append([[len(p.examples), p.repeats, p.share] for p in self.parts])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def fill_cache(
        self, encode: ImageEncoder, part: slice = slice(None), progress: bool = True
    ) -> int:
        """Encode those of the examples that the cache is missing; see :meth:`LatentCache.fill`."""
        assert self.cache is not None
        count = len(self._views[part])
        return self.cache.fill(self._wanted(part), encode, progress=progress, count=count)

    def fill_control_cache(
        self, encode: ControlEncoder, part: slice = slice(None), progress: bool = True
    ) -> int:
        """Encode those control images that the cache is missing."""
        assert self.control_cache is not None
        return self.control_cache.fill(self._wanted(part), encode, progress=progress)

    def _wanted(self, part: slice) -> Iterator[tuple[Example, Sequence[Variant]]]:
        entries = map(self._entry, range(len(self._views))[part])
        return ((entry.example, entry.kept) for entry in entries)

    def __getitem__(self, position: int) -> dict[str, Any]:
        slot = self.stream.index(position)
        item, rotation = self._slots[slot], self._rotations[self._turns[slot]]
        if rotation is not None:
            item = rotation.member(position // self.stream.length, item)
        return self.sample(item, position)

    def sample(self, item: int, position: int) -> dict[str, Any]:
        """Return the sample of an image at one of its sizes, as it would be at ``position``.

        Args:
            item: number of the image; the numbers of its other sizes follow those of all images.
        """
        entry = self._entry(item)
        example, plan = entry.example, entry.plan
        random = self._generator("variant", position)
        if self.cache is not None:
            kept = entry.kept
            variant = kept[int(torch.randint(len(kept), (), generator=random))]
            image = dict(self.cache.get(example.cache_key, variant))
        else:
            variant = plan.draw(example.size, random)
            image = {"pixel_values": plan.pixel_values(example.load(), variant)}
            if example.mask is not None:
                image["mask"] = plan.mask_values(example.mask.load(), variant)
            if self.fill is not None:
                image["fill_mask"] = self._fill_mask(image.get("mask"), variant, position)
        if not self.masked:
            image.pop("mask", None)
        elif example.mask is None:
            (some, *_) = image.values()
            image["mask"] = torch.ones(1, *some.shape[1:])
        if self.weighted:
            image["loss_weight"] = torch.tensor(entry.part.loss_weight)
        width, height = example.size
        return {
            "position": position,
            "prompt": self._prompt(entry, position),
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
        buckets = any(plan.buckets is not None for part in self.parts for plan in part.plans)
        logger.info(
            "%s images by %s (height,width): %s",
            self.stream.name,
            "aspect-ratio bucket" if buckets else "size",
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

    def _prompt(self, entry: _Entry, position: int) -> str:
        if self._drops("caption", entry.part.caption_dropout, position):
            return ""
        variants = entry.prompts[0]
        if len(entry.prompts) > 1:
            random = self._generator("caption", position)
            variants = entry.prompts[int(torch.randint(len(entry.prompts), (), generator=random))]
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
        ``pixel_values``, and perhaps ``mask``, ``fill_mask`` and ``loss_weight``, with a batch
        axis.
    """
    batch: dict[str, Any] = {
        f"{name}s": [sample[name] for sample in samples]
        for name in ("position", "prompt", "content_key")
    }
    batch["controls"] = [sample["controls"] for sample in samples]
    for name in ("original_size", "crop_top_left", "target_size"):
        batch[f"{name}s"] = torch.stack([sample[name] for sample in samples])
    for name in ("mean", "std", "pixel_values", "mask", "fill_mask", "loss_weight"):
        if name in samples[0]:
            batch[name] = torch.stack([sample[name] for sample in samples])
    return batch
