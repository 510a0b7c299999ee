"""The bundled base in the shape of Kontext: small, whole, edits as it is told, and can be taught.

Its script continues the bundled base in the shape of FLUX.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import tiny_base_models as base_models
import tiny_edits
import tiny_flux_models as models
import torch
import train_tiny_kontext_base as script
from accelerate import Accelerator
from diffusers import FluxKontextPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny_base_run import Run
from tiny_base_stages import to_pixels

from gralora_diffusion.training.outputs.metrics import held_out_points
from tests.samples.test_tiny_edit_base import difference
from tests.training.runs import ROOT, metrics, run

SAMPLES = ROOT / "samples"
BASE = SAMPLES / "tiny-kontext-base"
#: how the pipeline edits images of 64x64 pixels
SMALL: dict[str, Any] = {**script.OPTIONS, "max_area": 64 * 64, "_auto_resize": False}


def test_it_is_small_and_shares_what_it_can_with_its_parent() -> None:
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert not {path.suffix for path in files} & {".bin", ".pt", ".pth", ".pkl"}
    assert not any("_name_or_path" in path.read_text() for path in BASE.rglob("*config.json"))
    transformer = load_file(BASE / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in transformer.values()} == {torch.float16}
    for part in ("vae", "tokenizer", "tokenizer_2", "scheduler"):
        for path in (script.BASE / part).iterdir():
            assert (BASE / part / path.name).read_bytes() == path.read_bytes()


def test_it_edits_as_it_is_told() -> None:
    """Pairs that it was not trained on: its image is far nearer to the edited one."""
    pipe = FluxKontextPipeline.from_pretrained(BASE)
    pipe.set_progress_bar_config(disable=True)
    for number, kind in enumerate(tiny_edits.KINDS * 2):
        edit = tiny_edits.sample(random.Random(f"judged {number}"), kind)
        before, after = edit.before.draw(), edit.after.draw()
        generator = torch.Generator().manual_seed(number)
        (image,) = pipe(
            before, edit.instruction, num_inference_steps=12, generator=generator, **SMALL
        ).images
        assert difference(image, after) < difference(before, after) / 2, edit.instruction


def test_it_learns_another_edit(tmp_path: Path) -> None:
    """The loss of pairs with other objects falls by much of what the base's is."""
    pairs = SAMPLES / "pairs" / "space"
    out = run(
        output_dir=tmp_path,
        pretrained_model_name_or_path=BASE,
        instance_data_dir=pairs / "train" / "images",
        control_data_dir=pairs / "train" / "control",
        held_out_data_dir=pairs / "held_out" / "images",
        held_out_control_data_dir=pairs / "held_out" / "control",
        held_out_steps=40,
        resolution=64,
        control_resolution=128,
        max_sequence_length=models.T5_TOKENS,
        rank=16,
        target_preset="attention+ff",
        learning_rate=4e-3,
        train_batch_size=4,
        max_train_steps=40,
        checkpointing_steps=1000,
    )
    rows = metrics(out)
    *_, (step, _, _, high) = held_out_points(rows)
    base = next(row["held_out"]["base"] for row in rows if row["step"] == step)
    assert step == 40
    assert high < -base / 3


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
