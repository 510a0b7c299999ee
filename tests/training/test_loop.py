"""Whole runs: what they learn, what they leave alone, what they leave behind."""

from __future__ import annotations

import json
import logging
import shutil
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor

from gralora_diffusion.adapters.adapter_file import read_adapter
from gralora_diffusion.base_models.loading import load_base
from gralora_diffusion.families import ModelFamily, mend_clip_skip
from gralora_diffusion.io.errors import CheckpointError, ConfigError
from gralora_diffusion.training import loop
from gralora_diffusion.training.checkpoints.state import TRAINING_WEIGHTS_NAME
from gralora_diffusion.training.config.training_config import parse_config
from gralora_diffusion.training.data import class_images
from gralora_diffusion.training.data.image_folder import find_examples
from gralora_diffusion.training.data.seeds import generator
from gralora_diffusion.training.data.transforms import CropPlan
from gralora_diffusion.training.loop import Trainer
from gralora_diffusion.training.optimization.step import BatchBuilder, TrainingDiverged
from gralora_diffusion.training.run import train
from tests.models import stable_diffusion
from tests.training.cards import draw_by_card
from tests.training.runs import (
    adapter,
    assert_close,
    assert_same_run,
    make_images,
    make_shapes,
    metrics,
    run,
    run_script,
    run_two,
)


@pytest.fixture
def data(base: Path, images: Path) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": base, "instance_data_dir": images}


@pytest.fixture
def saved(data: dict[str, Any]) -> dict[str, Any]:
    """The same with a checkpoint at every second step."""
    return {**data, "checkpointing_steps": 2}


@pytest.fixture(scope="module")
def whole(base: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the options of ``saved``, for tests that only read it or work on a copy."""
    options = {"pretrained_model_name_or_path": base, "instance_data_dir": images}
    return run(
        output_dir=tmp_path_factory.mktemp("whole") / "out", checkpointing_steps=2, **options
    )


def test_accumulation_is_the_larger_batch(data: dict[str, Any], tmp_path: Path) -> None:
    # Adam divides by the root of the squared gradient: a gradient near zero keeps no digits
    options = {"train_text_encoder": True, "random_flip": True, "adam_epsilon": 1e-4, **data}
    one = run(output_dir=tmp_path / "one", train_batch_size=4, **options)
    two = run(
        output_dir=tmp_path / "two", train_batch_size=2, gradient_accumulation_steps=2, **options
    )
    assert_close(one, two, 1e-3)


def test_layers_of_clip_are_skipped_everywhere(base: Path, tmp_path: Path) -> None:
    """In training, class and validation images, and recorded in file and model card."""
    pipe = StableDiffusionPipeline.from_pretrained(base)
    mend_clip_skip(pipe)
    options = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": make_shapes(tmp_path / "pictures", [(20, 27)] * 3),
        "with_prior_preservation": True,
        "class_prompt": "a dog",
        "class_data_dir": tmp_path / "class",
        "num_class_images": 1,
        "sample_batch_size": 1,
        "validation_prompt": "a dog",
        "num_validation_images": 1,
        "validation_steps": 100,
        "validation_inference_steps": 2,
        "clip_skip": 1,
    }
    out = run(output_dir=tmp_path / "out", train_text_encoder=True, **options)
    drawn = Image.open(tmp_path / "class" / "class-00000.png")
    rng = generator(0, "class image", 0)
    assert drawn.tobytes() == pipe(["a dog"], generator=[rng], clip_skip=1).images[0].tobytes()
    drawing = {"num_inference_steps": 2, "height": 16, "width": 16, "clip_skip": 1}
    first = pipe("a dog", generator=torch.Generator().manual_seed(0), **drawing).images[0]
    drawn = Image.open(out / "validation" / "step-000000" / "00-00.png")
    assert drawn.tobytes() == first.tobytes()
    assert read_adapter(out).metadata["ss_clip_skip"] == "2"
    text = (out / "README.md").read_text(encoding="utf-8")
    assert 'pipe("a sks dog", clip_skip=1)' in text
    draw_by_card(text, {"path/to/base": base, "path/to/this/folder": out})
    # the encoder's last layer is not read, so its adapter stays what it was
    trained = adapter(out)
    moved = {key for key, t in trained.items() if "gralora_B" in key and t.any()}
    assert any("text_encoder" in key and "layers.0." in key for key in moved)
    assert not any("text_encoder" in key and "layers.1." in key for key in moved)
    with pytest.raises(ConfigError, match=r"--clip_skip is 3, but at most 2 of the 2 layers"):
        run(output_dir=tmp_path / "much", **{**options, "clip_skip": 3})


SETS = """\
- {folder: dogs, prompt: "sks, old, red dog", repeats: 2, shuffle_tags: true, random_flip: true}
- {folder: cats, prompt: a cat, share: 0.4, loss_weight: 0.5, resolution: 24, caption_dropout: 0.3}
- {folder: others, role: prior, prompt: a dog, loss_weight: 0.7}
"""


def test_a_run_on_several_sets_is_resumed_exactly(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("dogs", "cats", "others")):
        make_images(tmp_path / name, seed=number)
    (tmp_path / "data.yaml").write_text(SETS, encoding="utf-8")
    options = {"pretrained_model_name_or_path": base, "data_config": "data.yaml"}
    options |= {"instance_prompt": None, "checkpointing_steps": 3}
    out = run(output_dir=tmp_path / "whole", **options)
    shutil.copytree(out, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-6")
    again = [str(tmp_path / "again"), "--resume_from_checkpoint", "latest"]
    path = str(tmp_path / "again" / "training_config.yaml")
    train(parse_config(["--config", path, "--output_dir", *again]))
    assert_same_run(out, tmp_path / "again")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "cats: 3 images, 40 % of the samples, 24 pixels, loss weight 0.5" in card
    assert json.loads(read_adapter(out).metadata["ss_dataset_dirs"]) == {
        "dogs": {"n_repeats": 2, "img_count": 3},
        "cats": {"n_repeats": 1, "img_count": 3},
    }
    # settings of one set in a file do what options do
    (tmp_path / "one.yaml").write_text(
        "- {folder: dogs, prompt: a dog, random_flip: true}\n", encoding="utf-8"
    )
    alike = {"pretrained_model_name_or_path": base, "instance_prompt": "a dog"}
    alike |= {"max_train_steps": 2, "random_flip": True}
    run(output_dir=tmp_path / "options", instance_data_dir="dogs", **alike)
    run(output_dir=tmp_path / "file", **{**alike, "data_config": "one.yaml", "random_flip": False})
    assert_same_run(tmp_path / "options", tmp_path / "file")


def test_accelerates_environment_does_not_change_accumulation(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"gradient_accumulation_steps": 2, "max_train_steps": 2, **data}
    run(output_dir=tmp_path / "a", **options)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    run(output_dir=tmp_path / "b", **options)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_the_next_rows_are_made_before_the_loss_is_waited_for(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    make, read = BatchBuilder.build, Trainer._checked

    def rows(self: BatchBuilder, *batch: Any) -> Any:
        events.append("rows")
        return make(self, *batch)

    def checked(self: Trainer, *values: Any) -> tuple[float, float]:
        events.append("loss")
        return read(self, *values)

    monkeypatch.setattr(BatchBuilder, "build", rows)
    monkeypatch.setattr(Trainer, "_checked", checked)
    run(output_dir=tmp_path / "a", max_train_steps=3, **data)
    assert events == ["rows", "rows", "loss", "rows", "loss", "loss"]


@pytest.mark.parametrize(
    "options",
    [
        {"validation_prompt": ["a dog", "a cat"], "num_validation_images": 2},
        {"validation_prompt": "a dog", "optimizer": "schedulefree", "train_text_encoder": True},
        {"validation_prompt": "a dog", "use_ema": True, "lora_dropout": 0.2},
    ],
    ids=["plain", "schedulefree", "ema"],
)
def test_validation_does_not_disturb_training(
    data: dict[str, Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    drawing = {"validation_steps": 1, "validation_inference_steps": 2}
    data["max_train_steps"] = 3
    without = {k: v for k, v in options.items() if not k.endswith(("prompt", "images"))}
    run(output_dir=tmp_path / "without", **without, **data)
    run(output_dir=tmp_path / "with", **options, **drawing, **data)
    assert_same_run(tmp_path / "without", tmp_path / "with")


def test_one_base_at_a_time(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base that generates class images is freed before the trained one is loaded."""
    alive: list[int] = []
    loaded: list[weakref.ref[Any]] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        alive.append(sum(base() is not None for base in loaded))
        pipe = load_base(*arguments, **options)
        loaded.append(weakref.ref(pipe.unet))
        return pipe

    for module in (class_images, loop):
        monkeypatch.setattr(module, "load_base", watched)
    classes = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2}
    run(output_dir=tmp_path / "out", class_data_dir=tmp_path / "class", **classes, **data)
    assert alive == [0, 0]
    assert len(list((tmp_path / "class").iterdir())) == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lora_layers": "to_nothing"}, "do not fit the base"),
        ({"rank_pattern": ["nowhere=8"]}, "--rank_pattern"),
        ({"resolution": 17}, "--resolution is 17"),
    ],
)
def test_class_images_are_drawn_for_nothing_that_fails(
    data: dict[str, Any], tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    classes = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2}
    with pytest.raises(ConfigError, match=said):
        run(
            output_dir=tmp_path / "out",
            class_data_dir=tmp_path / "class",
            **{**classes, **data, **wrong},
        )
    assert not (tmp_path / "class").exists()


@pytest.mark.parametrize("text_encoder", [False, True])
def test_gradient_checkpointing_changes_nothing(
    data: dict[str, Any], tmp_path: Path, text_encoder: bool
) -> None:
    options = {"train_text_encoder": text_encoder, "lora_dropout": 0.2, **data}
    run(output_dir=tmp_path / "plain", **options)
    run(output_dir=tmp_path / "checkpointed", gradient_checkpointing=True, **options)
    assert_close(tmp_path / "plain", tmp_path / "checkpointed", 1e-5)


def test_bf16_keeps_adapter_and_vae_in_fp32_and_the_base_as_it_was(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    original = Trainer.train

    def watched(self: Trainer) -> None:
        seen["pipe"], seen["before"] = self.pipe, frozen(self.pipe)
        original(self)

    monkeypatch.setattr(Trainer, "train", watched)
    run(
        output_dir=tmp_path / "out",
        mixed_precision="bf16",
        train_text_encoder=True,
        validation_prompt="a dog",
        validation_inference_steps=2,
        **data,
    )
    pipe, before = seen["pipe"], seen["before"]
    after = frozen(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    modules = {"vae": pipe.vae, "unet": pipe.unet, "text_encoder": pipe.text_encoder}
    dtypes = {
        (name, parameter.requires_grad): parameter.dtype
        for name, module in modules.items()
        for parameter in module.parameters()
    }
    assert dtypes == {
        ("vae", False): torch.float32,
        ("unet", False): torch.bfloat16,
        ("unet", True): torch.float32,
        ("text_encoder", False): torch.bfloat16,
        ("text_encoder", True): torch.float32,
    }
    trained = [n for m in modules.values() for n, p in m.named_parameters() if p.requires_grad]
    assert trained
    assert all("gralora_" in name for name in trained)
    assert {tensor.dtype for tensor in adapter(tmp_path / "out").values()} == {torch.float32}


def frozen(pipe: Any) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor.clone()
        for part in ("unet", "vae", "text_encoder")
        for name, tensor in getattr(pipe, part).state_dict().items()
        if "gralora_" not in name
    }


def held_out_loss(pipe: Any, latents: torch.Tensor, prompt: str) -> float:
    """Error of the predicted noise at fixed noise and timesteps, by diffusers alone."""
    rng = torch.Generator().manual_seed(1)
    timesteps = torch.arange(50, 1000, 100).repeat_interleave(len(latents))
    latents = latents.repeat(len(timesteps) // len(latents), 1, 1, 1)
    noise = torch.randn(latents.shape, generator=rng)
    embeds, _ = pipe.encode_prompt([prompt] * len(latents), "cpu", 1, False)
    with torch.no_grad():
        noisy = pipe.scheduler.add_noise(latents, noise, timesteps)
        prediction = pipe.unet(noisy, timesteps, embeds).sample
    return float((prediction - noise).square().mean())


def held_out_losses(base: Path, folder: Path, prompt: str | None, resolution: int) -> Any:
    """Return the function of an adapter (None: without) that gives its loss on these images."""
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    plan = CropPlan(resolution, center_crop=True)
    examples = find_examples(folder, prompt)
    pixels = [plan.pixel_values(e.load(), plan.draw(e.size, torch.Generator())) for e in examples]
    with torch.no_grad():
        latents = pipe.vae.encode(torch.stack(pixels)).latent_dist.mean
    latents = latents * pipe.vae.config.scaling_factor

    def loss(trained: Path | None) -> float:
        if trained is not None:
            pipe.load_gralora_weights(trained)
        return sum(
            held_out_loss(pipe, latents[i : i + 1], example.caption)
            for i, example in enumerate(examples)
        ) / len(examples)

    return loss


def test_it_learns(data: dict[str, Any], base: Path, tmp_path: Path) -> None:
    run(output_dir=tmp_path / "out", max_train_steps=60, checkpointing_steps=1000, **data)
    loss = held_out_losses(base, data["instance_data_dir"], "a sks dog", 16)
    before, after = loss(None), loss(tmp_path / "out")
    assert after < 0.95 * before


# -- images of several shapes ----------------------------------------------------------------------


@pytest.fixture
def shapes(base: Path, tmp_path: Path) -> dict[str, Any]:
    """Wide, square and tall images of the subject; of the class taller ones and one wide one."""
    instance = [(30, 20), (30, 20), (31, 20), (20, 20), (21, 30)]
    classes = [(20, 40), (20, 40), (20, 41), (40, 20)]
    return {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": make_shapes(tmp_path / "instance", instance),
        "class_data_dir": make_shapes(tmp_path / "class", classes, seed=1),
        "with_prior_preservation": True,
        "class_prompt": "a dog",
        "num_class_images": 4,
        "use_aspect_ratio_buckets": True,
    }


def test_an_epoch_trains_on_every_image_in_its_own_shape(
    shapes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[tuple[Any, Any, list[Any]]] = []
    original = BatchBuilder.build

    def watched(self: BatchBuilder, instance: Any, classes: Any = None) -> Any:
        groups = original(self, instance, classes)
        if not isinstance(instance["original_sizes"], FakeTensor):  # of the plan
            seen.append((instance, classes, groups))
        return groups

    monkeypatch.setattr(BatchBuilder, "build", watched)
    options = {**shapes, "max_train_steps": None, "num_train_epochs": 2}
    with caplog.at_level(logging.INFO, logger="gralora_diffusion"):
        out = run(output_dir=tmp_path / "out", **options)
    # 16 x 16 pixels as 3:2, 1:1 and 2:3, batches of two: 2 + 1 + 1; of the class as 1:2: 2, 2:1: 1
    wide, tall, taller, wider = (14, 20), (20, 14), (22, 12), (12, 22)
    assert len(metrics(out)) == len(seen) == 2 * 4
    for epoch in (seen[:4], seen[4:]):
        instance = Counter(key for batch, _, _ in epoch for key in batch["content_keys"])
        assert len(instance) == 5
        assert sorted(instance.values()) == [1, 1, 2, 2, 2]
        sizes = Counter(tuple(batch["target_sizes"][0].tolist()) for batch, _, _ in epoch)
        assert sizes == {wide: 2, (16, 16): 1, tall: 1}
    classes = [batch for _, batch, _ in seen[:3]]  # an epoch of them
    assert len({key for batch in classes for key in batch["content_keys"]}) == 4
    sizes = Counter(tuple(batch["target_sizes"][0].tolist()) for batch in classes)
    assert sizes == {taller: 2, wider: 1}
    assert {len(groups) for _, _, groups in seen} == {2}
    assert "14,20: 3 (+1 repeated in each epoch); 16,16: 1 (+1 repeated" in caplog.text
    assert "class images by aspect-ratio bucket (height,width): 12,22: 1 (+1" in caplog.text


def test_accumulation_and_processes_share_out_the_same_buckets(
    shapes: dict[str, Any], tmp_path: Path
) -> None:
    one = run(output_dir=tmp_path / "one", gradient_accumulation_steps=2, **shapes)
    two = tmp_path / "two"
    run_two(output_dir=two, **shapes)
    assert_close(one, two, 1e-3)
    losses = [[row["loss"] for row in metrics(folder)] for folder in (one, two)]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]))


def test_buckets_with_and_without_a_cache(shapes: dict[str, Any], tmp_path: Path) -> None:
    options = {"center_crop": True, **shapes}
    run(output_dir=tmp_path / "cached", **options)
    run(output_dir=tmp_path / "fresh", cache_latents=False, dataloader_num_workers=1, **options)
    run(output_dir=tmp_path / "on_disk", latent_cache_dir=tmp_path / "latents", **options)
    assert_same_run(tmp_path / "cached", tmp_path / "on_disk")
    assert_close(tmp_path / "cached", tmp_path / "fresh", 1e-3)


def test_one_bucket_is_no_bucket(data: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    run(output_dir=tmp_path / "bucket", aspect_ratio_buckets="16,16", **data)
    assert_same_run(whole, tmp_path / "bucket")


def test_sizes_that_the_base_does_not_take_are_refused(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelFamily, "size_divisor", lambda self, pipe: 16)
    with pytest.raises(
        ConfigError, match=r"contains 24,16; .*16 for this base. The nearest is 32,16"
    ):
        run(output_dir=tmp_path / "out", aspect_ratio_buckets="16,16;24,16", **data)
    assert not (tmp_path / "out").exists()


def test_excluded_layers_are_left_as_they_are(saved: dict[str, Any], tmp_path: Path) -> None:
    """In the file, when it is loaded, and when the run is resumed."""
    options = {"exclude_modules": "attn2.to_k", "output_dir": tmp_path / "out", **saved}
    out = run(max_train_steps=2, **options)
    trained = {key.rpartition(".gralora_")[0] for key in adapter(out)}
    assert any(path.endswith("attn1.to_k") for path in trained)
    assert not any(path.endswith("attn2.to_k") for path in trained)
    pipe = StableDiffusionPipeline.from_pretrained(saved["pretrained_model_name_or_path"])
    assert pipe.load_gralora_weights(out).layers == {"unet": len(trained)}
    again = {**options, "max_train_steps": 4, "resume_from_checkpoint": "latest"}
    with pytest.raises(ConfigError, match=r"--exclude_modules \['attn2.to_k'\] there"):
        run(**{**again, "exclude_modules": "attn2.to_k,attn2.to_v"})
    run(**again)


# -- a run that is to go on, or goes wrong ---------------------------------------------------------


def test_more_steps_on_resume(saved: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    run(output_dir=tmp_path / "out", max_train_steps=4, **saved)
    options = {"resume_from_checkpoint": "latest", **saved}
    run(output_dir=tmp_path / "out", max_train_steps=6, **options)
    assert_same_run(whole, tmp_path / "out")


def test_another_learning_rate_on_resume(saved: dict[str, Any], tmp_path: Path) -> None:
    run(output_dir=tmp_path / "out", max_train_steps=2, **saved)
    options = {"resume_from_checkpoint": "latest", "learning_rate": 1e-4, **saved}
    run(output_dir=tmp_path / "out", max_train_steps=4, **options)
    assert [row["lr"] for row in metrics(tmp_path / "out")] == [1e-2, 1e-2, 1e-4, 1e-4]


def test_another_decay_of_the_average_on_resume(saved: dict[str, Any], tmp_path: Path) -> None:
    out = run(output_dir=tmp_path / "out", max_train_steps=4, use_ema=True, **saved)
    options = {"resume_from_checkpoint": "latest", "use_ema": True, **saved}
    run(output_dir=out, max_train_steps=6, ema_decay=0.0, **options)
    trained = load_file(out / "checkpoint-6" / TRAINING_WEIGHTS_NAME)
    averaged = adapter(out)
    for key, tensor in trained.items():
        torch.testing.assert_close(averaged[key], tensor, msg=key)


def test_what_cannot_be_resumed(saved: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    again: dict[str, Any] = {"output_dir": out, "resume_from_checkpoint": "latest", **saved}
    teacher = {"with_prior_preservation": True, "prior_source": "teacher", "class_prompt": "x"}
    sizes = {"rank": 8, "gralora_k": 4, "lora_dropout": 0.1, "k_pattern": ["to_q=2"]}
    with pytest.raises(ConfigError) as caught:
        run(**again, snr_gamma=5, use_ema=True, optimizer="adafactor", **teacher, **sizes)
    (problem,) = caught.value.problems
    assert problem == (
        f"--resume_from_checkpoint: {out}/checkpoint-6 belongs to another run "
        "(--with_prior_preservation False there, True here; --snr_gamma None there, 5.0 here; "
        "--optimizer adamw there, adafactor here; --use_ema False there, True here; "
        "--rank 4 there, 8 here; --gralora_k 2 there, 4 here; --lora_alpha 4 there, 8 here; "
        "--lora_dropout 0.0 there, 0.1 here; --k_pattern None there, {'to_q': 2} here). Resume "
        f"with the options and the base of that run, or start a new run from its values with "
        f"--initial_adapter {out}/checkpoint-6 and another --output_dir."
    )
    with pytest.raises(ConfigError, match="--quantization None there, torchao-fp8 here"):
        run(**again, quantization="torchao-fp8")
    with pytest.raises(ConfigError, match="it adapts unet, not unet, text_encoder"):
        run(**again, train_text_encoder=True)
    with pytest.raises(ConfigError, match="past the end of this run, step 4"):
        run(**again, max_train_steps=4)
    with pytest.raises(ConfigError, match=r"past the end of this run, step \d"):
        run(**again, max_train_steps=None, num_train_epochs=1)
    with pytest.raises(ConfigError, match="also contains checkpoint-4, checkpoint-6"):
        run(**{**again, "resume_from_checkpoint": "checkpoint-2"})
    (out / "checkpoint-6" / "optimizer.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="checkpoint-6 cannot be resumed from"):
        run(**again)


def test_a_finished_run_resumed_ends_the_same(
    saved: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy" / "pytorch_gralora_weights.safetensors").unlink()
    run(output_dir=tmp_path / "copy", resume_from_checkpoint="latest", **saved)
    assert_same_run(whole, tmp_path / "copy")


def test_changed_images_are_noticed_on_resume(
    saved: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(output_dir=tmp_path / "out", max_train_steps=2, **saved)
    options = {**saved, "instance_prompt": "another", "resume_from_checkpoint": "latest"}
    with caplog.at_level(logging.WARNING, logger="gralora_diffusion"):
        run(output_dir=tmp_path / "out", max_train_steps=4, **options)
    assert "its result will differ from an uninterrupted" in caplog.text


def test_nan_stops_the_run_and_keeps_the_checkpoint(data: dict[str, Any], tmp_path: Path) -> None:
    options = {"learning_rate": 1e30, "checkpointing_steps": 1, **data}
    with pytest.raises(TrainingDiverged, match=r"step \d.*Last checkpoint.*--learning_rate"):
        run(output_dir=tmp_path / "out", **options)
    kept = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert kept
    assert all(tensor.isfinite().all() for tensor in adapter(kept[-1]).values())
    assert not (tmp_path / "out" / "pytorch_gralora_weights.safetensors").exists()


def test_overwriting_starts_anew(saved: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    with pytest.raises(ConfigError, match="--overwrite_output_dir"):
        run(output_dir=tmp_path / "out", **saved)
    options = {"overwrite_output_dir": True, "max_train_steps": 2, "rank": 8, **saved}
    run(output_dir=tmp_path / "out", **options)
    assert [row["step"] for row in metrics(tmp_path / "out")] == [1, 2]
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_finished_run_without_checkpoints_is_kept(data: dict[str, Any], tmp_path: Path) -> None:
    options = {"output_dir": tmp_path / "out", "checkpointing_steps": 100, **data}
    out = run(max_train_steps=1, **options)
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for again in ({}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(ConfigError, match=r"but no checkpoint to resume\. Give another folder"):
            run(max_train_steps=1, learning_rate=1.0, **again, **options)
        assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    run(max_train_steps=2, overwrite_output_dir=True, **options)
    assert [row["step"] for row in metrics(out)] == [1, 2]


# -- masks -----------------------------------------------------------------------------------------


@pytest.fixture
def masked(base: Path, tmp_path: Path) -> dict[str, Any]:
    """Five images in two shapes, of which four have masks."""
    images = make_shapes(tmp_path / "images", [(20, 27), (27, 20), (20, 27), (27, 20), (20, 27)])
    for number in range(4):
        mask = Image.new("L", Image.open(images / f"{number}.png").size, 0)
        mask.paste(255, (2 + number, 3, 14, 16))
        mask.save(images / f"{number}.mask.png")
    held_out = make_shapes(tmp_path / "held out", [(20, 27), (27, 20)], seed=1)
    shutil.copyfile(images / "0.mask.png", held_out / "0.mask.png")
    return {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        "held_out_data_dir": held_out,
        "held_out_steps": 3,
        "aspect_ratio_buckets": "16,24;24,16",
        "random_flip": True,
        "masked_loss": True,
        "mask_outside": "base",
        "normalize_masked_area_loss": True,
        "with_prior_preservation": True,
        "prior_source": "teacher",
        "class_prompt": "a dog",
        "snr_gamma": 5,
        "use_ema": True,
        "checkpointing_steps": 3,
        "adam_epsilon": 1e-4,
    }


def test_masks_in_a_run_that_is_resumed(
    masked: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(output_dir=tmp_path / "whole", **masked)
    parts = tmp_path / "parts"
    run(output_dir=parts, **masked, max_train_steps=3)
    run(output_dir=parts, resume_from_checkpoint="latest", **masked)
    assert_same_run(whole, parts)
    assert read_adapter(whole).metadata["ss_masked_loss"] == "True"
    assert "held-out images without a mask, which are measured as a whole (1): 1.png" in caplog.text
    text = (whole / "README.md").read_text(encoding="utf-8")
    assert (
        "| masks | for 4 of 5 images; outside the mask, the target is the base's prediction" in text
    )
    changed = {**masked, "mask_outside": "weight", "max_train_steps": 9}
    with pytest.raises(ConfigError, match="--mask_outside base there, weight here"):
        run(output_dir=parts, resume_from_checkpoint="latest", **changed)
    (tmp_path / "images" / "0.mask.png").unlink()
    with caplog.at_level(logging.WARNING, logger="gralora_diffusion"):
        options = {**masked, "max_train_steps": 7}
        run(output_dir=parts, resume_from_checkpoint="latest", **options)
    assert "its result will differ from an uninterrupted" in caplog.text


def test_masks_in_two_processes_and_accumulated(masked: dict[str, Any], tmp_path: Path) -> None:
    one = run(output_dir=tmp_path / "one", gradient_accumulation_steps=2, **masked)
    folder = tmp_path / "cache"
    two = run_two(output_dir=tmp_path / "two", latent_cache_dir=folder, **masked)
    assert_close(one, two, 1e-3)


# -- two processes ---------------------------------------------------------------------------------


def test_two_processes_are_one_with_the_larger_batch(saved: dict[str, Any], tmp_path: Path) -> None:
    options = {
        "train_text_encoder": True,
        "use_ema": True,
        "with_prior_preservation": True,
        "class_prompt": "a dog",
        "num_class_images": 5,
        "sample_batch_size": 2,
        "lr_scheduler": "cosine",
        "validation_prompt": "a dog",
        "validation_inference_steps": 2,
        **saved,
    }
    one = run(
        output_dir=tmp_path / "one",
        train_batch_size=4,
        class_data_dir=tmp_path / "class-one",
        **options,
    )
    two = tmp_path / "two"
    options |= {"output_dir": two, "class_data_dir": tmp_path / "class-two"}
    result = run_script(processes=2, train_batch_size=2, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    drawn = [sorted((tmp_path / name).iterdir()) for name in ("class-one", "class-two")]
    assert [f.name for f in drawn[0]] == [f.name for f in drawn[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*drawn, strict=True))
    # Adam divides by the root of the squared gradient: a gradient near zero keeps no digits
    assert_close(one, two, 1e-3)
    losses = [[row["loss"] for row in metrics(folder)] for folder in (one, two)]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]))

    shutil.rmtree(two / "checkpoint-6")
    before = adapter(two)
    run_two(train_batch_size=2, resume_from_checkpoint="latest", **options)
    after = adapter(two)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_two_processes_share_a_cache_folder(data: dict[str, Any], tmp_path: Path) -> None:
    images = make_shapes(tmp_path / "captioned", [(20, 27)] * 5, seed=8)
    for number in range(5):
        (images / f"{number}.txt").write_text(f"a dog {number}")
    options = {**data, "instance_data_dir": images, "caption_dropout": 0.3}
    one = run(output_dir=tmp_path / "one", train_batch_size=4, **options)
    folder, two = tmp_path / "cache", tmp_path / "two"
    options |= {"latent_cache_dir": folder, "output_dir": two, "train_batch_size": 2}
    run_two(**options)
    assert_close(one, two, 1e-3)
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    kinds = Counter("mean" in load_file(path) for path in files)
    assert kinds == {True: 5 * 7, False: 5 + 1}  # the crops there are; the captions and none
    run(overwrite_output_dir=True, **options)
    assert files == {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def test_torch_compile_through_accelerate(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {  # a block of each kind: the compiler reads a UNet operation by operation
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }
    stable_diffusion(**small).save_pretrained(tmp_path / "base")
    data["pretrained_model_name_or_path"] = tmp_path / "base"
    options = {"max_train_steps": 2, "train_text_encoder": True, **data}
    run(output_dir=tmp_path / "plain", **options)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    run(output_dir=tmp_path / "compiled", **options)
    assert_close(tmp_path / "plain", tmp_path / "compiled", 1e-3)
