"""Variants of a caption: its tags in another order, without some of them, with a prefix and suffix.

An image has a fixed number of variants, so that all prompts of a run can be encoded before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gralora_diffusion.training.config.data_options import DataOptions

from .seeds import seed_from

#: What separates tags, as in kohya's sd-scripts.
SEPARATOR = ","
#: What stands for the trigger word in a caption, as in ai-toolkit.
TRIGGER = "[trigger]"


@dataclass(frozen=True)
class CaptionRules:
    """How captions become prompts.

    Attributes:
        prefix, suffix: text before and after each caption, with a space between.
        shuffle: whether tags, the parts of a caption between commas, change their order.
        dropout: probability of leaving out a tag; one tag always stays.
        keep: number of first tags that neither move nor are left out.
        count: number of variants of a caption, if they are random.
        trigger: replaces ``[trigger]``, and comes first in prompts that do not contain it.
    """

    prefix: str = ""
    suffix: str = ""
    shuffle: bool = False
    dropout: float = 0.0
    keep: int = 0
    count: int = 8
    trigger: str = ""

    @classmethod
    def of(cls, options: DataOptions) -> CaptionRules:
        """Return the rules in the options of a run."""
        return cls(
            prefix=(options.caption_prefix or "").strip(),
            suffix=(options.caption_suffix or "").strip(),
            shuffle=options.shuffle_tags,
            dropout=options.tag_dropout,
            keep=options.keep_tags,
            count=options.caption_variants,
            trigger=" ".join((options.trigger_word or "").split()),
        )

    def variants(self, caption: str, seed: int) -> tuple[str, ...]:
        """Return the prompts of a caption, each once, as a function of the arguments."""
        if not (self.shuffle or self.dropout):
            return (self.framed(caption),)
        tags = [tag.strip() for tag in caption.split(SEPARATOR) if tag.strip()]
        found = [", ".join(self._drawn(tags, seed, caption, i)) for i in range(self.count)]
        return tuple(dict.fromkeys(map(self.framed, found)))

    def framed(self, caption: str) -> str:
        """Return a caption with prefix, suffix and trigger, and all of its tags in their order."""
        text = " ".join(part for part in (self.prefix, caption, self.suffix) if part)
        if not self.trigger:
            return text
        text = text.replace(TRIGGER, self.trigger)
        return text if self.trigger.lower() in text.lower() else f"{self.trigger} {text}".rstrip()

    def _drawn(self, tags: list[str], seed: int, caption: str, number: int) -> list[str]:
        random = torch.Generator().manual_seed(seed_from(seed, "caption", caption, number))
        first, others = tags[: self.keep], tags[self.keep :]
        if self.shuffle:
            order = torch.randperm(len(others), generator=random).tolist()
            others = [others[i] for i in order]
        if self.dropout:
            stays = (torch.rand(len(others), generator=random) >= self.dropout).tolist()
            others = [tag for tag, stay in zip(others, stays, strict=True) if stay] or (
                [] if first else others[:1]
            )
        return [*first, *others]


#: Every caption is a prompt.
AS_THEY_ARE = CaptionRules()
