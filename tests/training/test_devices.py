"""Every tensor is on the device of the model that it meets.

The meta device stands in for a GPU: tensors of it and of the CPU do not go together either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import masking_utils

from gralora_diffusion.base_models import streaming
from gralora_diffusion.base_models.loading import existing_models
from gralora_diffusion.training.optimization.step import BatchBuilder, mean_loss
from gralora_diffusion.training.outputs import validation
from gralora_diffusion.training.runtime.acceleration import accelerate_left_as_it_was
from tests.models import PIPELINES
from tests.training.optimization.test_step import make_trainer
from tests.training.runs import make_shapes

CPU, GPU = torch.device("cpu"), torch.device("meta")


@contextmanager
def moved(*models: nn.Module, device: torch.device) -> Iterator[None]:
    """As ``offload_models``; from the meta device comes what is not initialized."""
    for model in models:
        model.to_empty(device=device)
    yield
    for model in models:
        model.to_empty(device=CPU)


@pytest.fixture(autouse=True)
def accelerate() -> Iterator[None]:
    with accelerate_left_as_it_was():
        yield


@pytest.mark.parametrize("kind", ["cached", "teacher", "buckets"])
@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_devices(
    name: str,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saved_base: Callable[[str], Path],
) -> None:
    # the language models' attention looks whether a mask hides anything, which needs values
    monkeypatch.setattr(masking_utils, "fast_all", lambda mask: False)
    base = saved_base(name)
    prior = {"with_prior_preservation": True, "class_prompt": "a dog"}
    options: dict[str, Any] = {
        "cached": {},
        "teacher": prior | {"prior_source": "teacher", "train_text_encoder": "flux2" not in name},
        "buckets": {
            **prior,
            "class_data_dir": make_shapes(tmp_path / "class", [(32, 64)]),
            "num_class_images": 1,
            "cache_latents": False,
            "aspect_ratio_buckets": "32,48;64,32",
        },
    }[kind]
    trainer = make_trainer(
        pretrained_model_name_or_path=base,
        instance_data_dir=make_shapes(tmp_path / "pictures", [(48, 32)]),
        output_dir=tmp_path / "out",
        resolution=32,
        **options,
    )
    family, pipe, data = trainer.family, trainer.pipe, trainer.data
    denoiser, encoders = (
        getattr(pipe, family.denoiser),
        existing_models(pipe, family.all_text_encoders),
    )
    with torch.no_grad(), moved(pipe.vae, *encoders, device=GPU):
        encoded = [
            *family.encode_prompts(pipe, ["a dog", "a cat"]).values(),
            *data.encode_images(torch.zeros(1, 3, 32, 32)),
        ]
    assert {tensor.device for tensor in encoded} == {GPU}

    denoiser.to(GPU)
    needed = [*(encoders if options.get("train_text_encoder") else ())]
    needed += [] if options.get("cache_latents", True) else [pipe.vae]
    step = trainer.accelerator.unwrap_model(trainer.step)
    with moved(*needed, device=GPU):
        rows = BatchBuilder(step, data, trainer.config, GPU, torch.float32).build(
            *next(data.steps(0, 1))
        )
        assert len(rows) == (2 if kind == "buckets" else 1)
        loss = mean_loss(step(rows), rows)
        loss.backward()
    assert loss.device == GPU

    for module in (validation, streaming):
        monkeypatch.setattr(module, "offload_models", moved)
    taken = inspect.signature(pipe.encode_prompt).parameters
    arguments = {"prompt": "a dog", "prompt_2": None, "prompt_3": None, "device": GPU}
    arguments |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    latents = torch.zeros(1, pipe.vae.config.latent_channels, 4, 4)  # some bring them to the VAE
    with torch.no_grad(), validation.encoding_apart(pipe, encoders, GPU):
        prompts = pipe.encode_prompt(**{k: v for k, v in arguments.items() if k in taken})
        assert {tensor.device for tensor in prompts if tensor is not None} == {GPU}
        assert pipe.vae.decode(latents).sample.device == GPU
    assert {next(model.parameters()).device for model in (pipe.vae, *encoders)} == {CPU}
