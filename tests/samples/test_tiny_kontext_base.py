"""The script that continues the bundled base in the shape of FLUX as one that edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_base_models as base_models
import tiny_flux_models as models
import torch
import train_tiny_kontext_base as script
from accelerate import Accelerator
from diffusers import FluxKontextPipeline
from PIL import Image
from tiny_base_run import Run
from tiny_base_stages import to_pixels

#: how the pipeline edits images of 64x64 pixels
SMALL: dict[str, Any] = {**script.OPTIONS, "max_area": 64 * 64, "_auto_resize": False}


def test_the_transformer_gets_what_the_pipeline_sends_it() -> None:
    pipe = FluxKontextPipeline.from_pretrained(script.BASE)
    pipe.set_progress_bar_config(disable=True)
    calls: list[dict[str, Any]] = []

    def note(_: object, __: object, inputs: dict[str, Any]) -> None:
        calls.append(inputs)

    pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    image = Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 50).convert("RGB")
    noise = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    pipe(image, "add a hat", num_inference_steps=1, latents=noise, **SMALL)
    with torch.no_grad():
        before = models.pack(pipe.vae.encode(to_pixels([image])).latent_dist.mode())
        script.build_denoiser(pipe)(
            noise,
            torch.ones(1),
            base_models.tokenize(pipe.tokenizer, ["add a hat"]),
            pipe.tokenizer_2(
                ["add a hat"],
                padding="max_length",
                max_length=models.T5_TOKENS,
                return_tensors="pt",
            ).input_ids,
            before,
        )
    theirs, ours = calls
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-5, msg=name)
    assert theirs["guidance"] is None
    assert ours["img_ids"][:, 0].tolist() == [0] * 64 + [1] * 64


def test_a_few_steps_from_the_base_to_a_folder(tmp_path: Path) -> None:
    """With a resume in the middle."""
    work = Run(Accelerator(cpu=True), tmp_path, 0)
    for steps in (1, 2):
        pipe = FluxKontextPipeline.from_pretrained(script.BASE)
        script.train(work, pipe, 4, steps, 2, 1e-3, bf16=False)
    start = FluxKontextPipeline.from_pretrained(script.BASE)
    script.export(work, pipe, tmp_path / "base")
    assert Image.open(tmp_path / "edits_00002.png").size == (8 * 64, 3 * 64)
    loaded = FluxKontextPipeline.from_pretrained(tmp_path / "base")
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        trained, before = (getattr(each, part).state_dict() for each in (loaded, start))
        assert any(not torch.equal(trained[name], before[name]) for name in before), part
    for name, tensor in start.vae.state_dict().items():
        assert torch.equal(tensor, loaded.vae.state_dict()[name])
    image = Image.new("RGB", (64, 64), "red")
    assert loaded(image, "add a hat", num_inference_steps=1, **SMALL).images[0].size == (64, 64)
