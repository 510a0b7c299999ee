"""Prompts that are cut off are reported once, with their origin and the right numbers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gralora_diffusion import get_family
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.image_folder import Example
from gralora_diffusion.training.data.truncation import report_truncation, reported_truncation
from tests.models import PIPELINES
from tests.training.runs import run

LONG = " ".join("abcdefghijklmnopqrstuvwxyz")


def image(caption: str, name: str = "1.png") -> Example:
    return Example(Path(name), caption, "", (8, 8))


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Messages logged by any library."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [
        logging.getLogger(name) for name in ("gralora_diffusion", "diffusers", "transformers")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield messages
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def kept_by(pipe: Any, name: str, prompt: str, length: int) -> tuple[int, int]:
    """Tokens that the text encoder gets in the pipeline, at this length, and all."""
    found = []
    for most in (length, 400):
        calls: list[Any] = []
        hook = getattr(pipe, name).register_forward_pre_hook(
            lambda module, args, kwargs, calls=calls: calls.append((args, kwargs)), with_kwargs=True
        )
        family = get_family(pipe)
        family.encode_prompts(pipe, [prompt], most)
        hook.remove()
        args, kwargs = calls[0]
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
        real = mask.bool() if mask is not None else ids != tokenizer.pad_token_id
        found.append(int(real.sum()))
    return found[0], found[1]


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("flux", "text_encoder_2"),
        ("stable-diffusion-3", "text_encoder_3"),
        ("flux2", "text_encoder"),
        ("flux2-klein", "text_encoder"),
    ],
)
@torch.no_grad()
def test_numbers_of_language_models(name: str, encoder: str, told: list[str]) -> None:
    """Those that the pipeline itself gives the encoder, with and without a cut."""
    pipe, family = PIPELINES[name](), get_family(name)
    length = 60 if name == "flux2" else 20  # its system message alone is 40 tokens
    kept, whole = kept_by(pipe, encoder, LONG, length)
    assert kept == length < whole < 400
    told.clear()  # of what the libraries said of that
    config = TrainingConfig(instance_prompt=LONG, max_sequence_length=length)
    report_truncation(pipe, family, config, [image(LONG)])
    (message,) = told
    lost = whole - kept
    limit = f"{encoder} reads {length} tokens (--max_sequence_length)"
    cut = f"{limit} of its {whole}, so {lost} are lost"
    assert message.startswith("--instance_prompt is cut off: ")
    assert cut in message
    told.clear()
    config = TrainingConfig(instance_prompt=LONG, max_sequence_length=60)
    report_truncation(pipe, family, config, [image("short")])
    assert told == []


@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-xl", "flux"])
def test_numbers_of_clip(name: str, told: list[str]) -> None:
    """26 letters, a beginning and an end, of which the tiny CLIP takes 16; T5 takes them all."""
    pipe = PIPELINES[name]()
    report_truncation(pipe, get_family(name), TrainingConfig(instance_prompt=LONG), [image(LONG)])
    cut = "reads 16 tokens of its 28, so 12 are lost"
    encoders = ["text_encoder", "text_encoder_2"] if "xl" in name else ["text_encoder"]
    cuts = "; ".join(f"{encoder} {cut}" for encoder in encoders)
    assert told == [f"--instance_prompt is cut off: {cuts}"]


def test_places(told: list[str]) -> None:
    pipe, family = PIPELINES["stable-diffusion"](), get_family("stable-diffusion")
    images = [
        image(f"first {LONG}", "dog/1.png"),
        image(f"first {LONG}", "dog/2.png"),
        image("short", "dog/3.png"),
        image(LONG, "dog/4.png"),
    ]
    config = TrainingConfig(
        instance_prompt=LONG,
        class_prompt=f"class {LONG}",
        with_prior_preservation=True,
        validation_prompt=[f"validation {LONG}", "short"],
    )
    report_truncation(pipe, family, config, images)
    assert [message.partition(" is cut off")[0] for message in told] == [
        "--class_prompt",
        "the caption of dog/1.png",
        "--instance_prompt",
        "the validation prompt 'validation a b c d e f g h i j k l m n o'...",
    ]


def test_many(told: list[str]) -> None:
    pipe, family = PIPELINES["stable-diffusion"](), get_family("stable-diffusion")
    images = [image(f"{n} {LONG}") for n in range(25)]
    report_truncation(pipe, family, TrainingConfig(), images)
    assert len(told) == 11
    assert told[-1] == "and 15 more prompts are cut off"


@pytest.mark.parametrize("trained", [False, True])
def test_a_run_says_it_once(
    trained: bool, base: Path, images: Path, tmp_path: Path, told: list[str]
) -> None:
    run(
        pretrained_model_name_or_path=base,
        instance_data_dir=images,
        instance_prompt=LONG,
        output_dir=tmp_path / "out",
        max_train_steps=2,
        train_text_encoder=trained or None,
        validation_prompt=LONG,
        num_validation_images=1,
        validation_inference_steps=1,
    )
    found = [message for message in told if "cut" in message or "trunc" in message]
    found += [message for message in told if "longer than" in message]
    cut = "text_encoder reads 16 tokens of its 28, so 12 are lost"
    assert found == [f"--instance_prompt is cut off: {cut}"]


def test_what_the_libraries_say_afterwards_is_as_before(told: list[str]) -> None:
    pipe, family = PIPELINES["stable-diffusion"](), get_family("stable-diffusion")
    with reported_truncation(pipe):
        family.encode_prompts(pipe, [LONG])
    assert told == []
    family.encode_prompts(pipe, [LONG])
    assert any("was truncated" in message for message in told)
