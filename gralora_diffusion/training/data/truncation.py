"""Reports prompts that have more tokens than a text encoder accepts and are cut off."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from gralora_diffusion.families import ModelFamily
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.config.validation_prompts import validation_prompts

from .caption_variants import CaptionRules
from .image_folder import Example
from .sets import by_set

logger = logging.getLogger(__name__)

#: Number of prompts that are counted at once, which is faster than one by one.
_AT_ONCE = 1000
#: Number of prompts that are reported one by one.
_TOLD = 10
#: The logger of transformers' tokenizers.
_OF_TOKENIZERS = "transformers.tokenization_utils_base"


def report_truncation(
    pipe: Any,
    family: ModelFamily,
    config: TrainingConfig,
    images: Sequence[Example],
    class_images: Sequence[Example] = (),
) -> None:
    """Log the origin of each prompt that is too long, and how many tokens are cut off."""
    too_long = truncated_prompts(pipe, family, config, images, class_images)
    for warning in too_long[:_TOLD]:
        logger.warning(warning)
    if len(too_long) > _TOLD:
        logger.warning("and %d more prompts are cut off", len(too_long) - _TOLD)


def truncated_prompts(
    pipe: Any,
    family: ModelFamily,
    config: TrainingConfig,
    images: Sequence[Example],
    class_images: Sequence[Example] = (),
) -> list[str]:
    """Return the origin of each prompt that is too long, and how many tokens are cut off."""
    prompts = _prompts(config, images, class_images)
    texts, found = list(prompts), []
    for start in range(0, len(texts), _AT_ONCE):
        some = texts[start : start + _AT_ONCE]
        cuts_of_some = _cuts(pipe, family, some, config.max_sequence_length)
        for text, cuts in zip(some, cuts_of_some, strict=True):
            if cuts:
                found.append(f"{prompts[text]} is cut off: {'; '.join(cuts)}")
    return found


@contextmanager
def reported_truncation(pipe: Any) -> Iterator[None]:
    """Silence the libraries inside, which would report a prompt each time it is cut off."""
    names = {_OF_TOKENIZERS, *(cls.__module__ for cls in type(pipe).__mro__)}
    loggers = [logging.getLogger(name) for name in names]

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    # filters, because a new level costs a pass over all loggers, and this happens in each step
    for found in loggers:
        found.addFilter(is_error)
    try:
        yield
    finally:
        for found in loggers:
            found.removeFilter(is_error)


def _prompts(
    config: TrainingConfig, images: Sequence[Example], class_images: Sequence[Example]
) -> Mapping[str, str]:
    """Return prompt -> its origin, the first one if there are several."""
    found: dict[str, str] = {}
    if config.with_prior_preservation and config.class_prompt:
        found[config.class_prompt] = "--class_prompt"
    for image_set, options, examples in by_set(config, images):
        rules, prompt = CaptionRules.of(options), "--instance_prompt"
        if image_set.place:
            prompt = f"{image_set.place}: the prompt"
        for example in examples:
            own = example.caption != options.instance_prompt
            where = f"the caption of {example.source}" if own else prompt
            for caption in example.captions:
                found.setdefault(rules.framed(caption), where)
    for example in class_images:
        found.setdefault(example.caption, f"the caption of {example.source}")
    for entry in validation_prompts(config):
        found.setdefault(entry.prompt, f"the validation prompt {entry.prompt[:40]!r}...")
    return found


def _cuts(
    pipe: Any, family: ModelFamily, prompts: Sequence[str], max_sequence_length: int | None
) -> list[list[str]]:
    """Return what each text encoder cuts off, for each prompt."""
    cuts: list[list[str]] = [[] for _ in prompts]
    for name in family.all_text_encoders:
        encoder = getattr(pipe, name, None)
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"), None)
        if encoder is None or tokenizer is None:
            continue
        limit, option = (
            max_sequence_length or family.max_sequence_length,
            " (--max_sequence_length)",
        )
        # CLIP's number of positions is fixed, whatever the other encoders accept
        if limit is None or str(encoder.config.model_type).startswith("clip"):
            limit, option = int(tokenizer.model_max_length), ""
        for own, count in zip(cuts, family.count_tokens(tokenizer, prompts), strict=True):
            if count > limit:
                lost = count - limit
                own.append(
                    f"{name} reads {limit} tokens{option} of its {count}, so {lost} are lost"
                )
    return cuts
