"""The plan of a run against the run: torch's profiler sees every allocation of a real step."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPTextConfig, CLIPTextModel

from gralora_diffusion.adapters.adapter_file import WEIGHTS_NAME
from gralora_diffusion.adapters.layers import GraloraLayer
from gralora_diffusion.base_models.loading import find_base_family, load_base
from gralora_diffusion.base_models.meta_base import empty_base
from gralora_diffusion.families import ModelFamily, get_family
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.checkpoints.store import CheckpointStore
from gralora_diffusion.training.checks.options import validate
from gralora_diffusion.training.data.data_module import Batches, find_class_images, find_images
from gralora_diffusion.training.data.held_out import find_held_out_images
from gralora_diffusion.training.dry_run.formatting import _adapter_lines, format_plan
from gralora_diffusion.training.dry_run.memory_check import fitted
from gralora_diffusion.training.dry_run.plan import Plan, _adapter_plan, _models_there, plan_run
from gralora_diffusion.training.loop import Trainer
from gralora_diffusion.training.main import main
from gralora_diffusion.training.runtime.acceleration import (
    accelerate_left_as_it_was,
    make_accelerator,
)
from gralora_diffusion.training.runtime.offloading import NOTHING
from gralora_diffusion.training.runtime.sharding import Sharding
from tests.models import PIPELINES, adapt, stable_diffusion, vae
from tests.originals import ORIGINALS, write
from tests.performance.recipes import Processes
from tests.training.runs import arguments, config, make_images, make_shapes, metrics, run

#: What is promised of the plan.
WITHIN = 0.15


def save_base(folder: Path, *widths: int) -> Path:
    """A base whose activations are hundreds of times what a step makes besides."""
    attentive = len(widths) - 1
    pipe = stable_diffusion(
        block_out_channels=widths,
        down_block_types=(*["CrossAttnDownBlock2D"] * attentive, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * attentive),
        layers_per_block=1,
        cross_attention_dim=64,
        norm_num_groups=32,
    )
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of few layers: each operation of a planned step takes a millisecond."""
    return save_base(tmp_path_factory.mktemp("middling"), 64, 128)


@pytest.fixture
def options(middling: Path, images: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": middling,
        "instance_data_dir": images,
        "output_dir": tmp_path / "out",
        "resolution": 32,
    }


def without_weights(folder: Path, to: Path) -> Path:
    copy: Path = shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))
    assert any(folder.rglob("*.safetensors"))
    return copy


def plan_of(**options: Any) -> Plan:
    chosen = config(**options)
    validate(chosen)
    family = find_base_family(chosen)
    images, classes = find_images(chosen), find_class_images(chosen)
    held_out = find_held_out_images(chosen, {})
    with accelerate_left_as_it_was():
        accelerator = make_accelerator(chosen)
        return plan_run(chosen, family, images, classes, accelerator, held_out=held_out)


def trainer_of(**options: Any) -> Trainer:
    chosen = config(**options)
    family = find_base_family(chosen)
    images, classes = find_images(chosen), find_class_images(chosen)
    store, held_out = CheckpointStore(chosen.output_dir), find_held_out_images(chosen, {})
    accelerator = make_accelerator(chosen)
    trainer = Trainer(chosen, family, images, classes, accelerator, store, held_out=held_out)
    trainer.set_up()
    return trainer


def most_made(work: Callable[[], Any]) -> int:
    """Bytes above those at the start that were allocated at once, as the allocator saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def bytes_in(tensors: Iterator[Tensor] | list[Tensor]) -> int:
    """Bytes of the distinct storages."""
    return sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values())


def stored_in(tensor: Any) -> list[Tensor]:
    """The tensor, or those that torchao makes of it."""
    parts = [getattr(tensor, name, None) for name in ("qdata", "scale", "zero_point")]
    return [part for part in parts if part is not None] or [tensor]


def models_of(pipe: Any) -> dict[str, nn.Module]:
    return {name: m for name, m in pipe.components.items() if isinstance(m, nn.Module)}


def cached_tensors(cache: Any) -> list[Tensor]:
    return [t for row in cache.store._memory.values() for t in row.values()] if cache else []


def optimizer_tensors(trainer: Trainer) -> list[Tensor]:
    states = trainer.optimizer.state.values()
    return [t for state in states for t in state.values() if isinstance(t, Tensor)]


def in_steps(plan: Plan, name: str) -> int:
    return sum(row.bytes["steps"] for row in plan.memory if row.name == name)


def with_masks(folder: Path) -> Path:
    make_images(folder, 3)
    for path in sorted(folder.iterdir()):
        Image.new("L", Image.open(path).size, 255).save(path.with_suffix(".mask.png"))
    return folder


TEACHER = {"with_prior_preservation": True, "class_prompt": "a dog", "prior_source": "teacher"}


@pytest.mark.parametrize(
    "changes",
    [
        {"train_batch_size": 1},
        {"train_batch_size": 4},
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "train_batch_size": 4},
        {"mixed_precision": "bf16", "target_preset": "all", "optimizer": "adafactor"},
        {"gradient_checkpointing": True, "train_text_encoder": True},
        {**TEACHER, "train_text_encoder": True},
        {"prior": "images", "optimizer": "prodigy", "use_ema": True},
        {"masked_loss": True, "mask_outside": "base", "prior": "images"},
        {"masked_loss": True, "cache_latents": False},
        {"gradient_accumulation_steps": 2, "target_preset": "all", "rank": 64},
        {"cache_latents": False, "optimizer": "schedulefree", "hybrid_rank": 2},
        {"quantization": "torchao-fp8"},
        {"quantization": "torchao-int8", "mixed_precision": "bf16", "gradient_checkpointing": True},
        {"quantization": "torchao-int8", "quantize_text_encoders": True, **TEACHER},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_step_takes_what_was_planned(
    options: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    options |= changes
    if options.get("masked_loss"):
        options["instance_data_dir"] = with_masks(tmp_path / "masked")
    if options.pop("prior", None):
        classes = make_images(tmp_path / "class", 3, seed=4)
        options |= {"with_prior_preservation": True, "class_prompt": "a dog"}
        options |= {"class_data_dir": classes, "num_class_images": 3}
    plan = plan_of(**options)
    with accelerate_left_as_it_was():
        trainer = trainer_of(**options)
        steps = trainer.steps()
        next(steps)  # from the second step on there is an optimizer's state
        made = most_made(lambda: next(steps))
        base = [
            part
            for model in models_of(trainer.pipe).values()
            for tensor in (*model.parameters(), *model.buffers())
            for part in stored_in(tensor)
        ]
        state = bytes_in(optimizer_tensors(trainer))
        average = trainer.ema.shadow_params if trainer.ema else []
        cached_bytes = bytes_in(cached_tensors(trainer.data.cache))
    assert plan.trained_parameters == sum(p.numel() for p in trainer.parameters)
    models = (*models_of(trainer.pipe), "adapter")
    assert sum(in_steps(plan, name) for name in models) == bytes_in(base)
    assert (in_steps(plan, "optimizer"), in_steps(plan, "ema")) == (state, bytes_in(average))
    planned = in_steps(plan, "activations") + in_steps(plan, "gradients")
    assert planned == pytest.approx(made, rel=WITHIN)
    measured = made + bytes_in(base) + state + bytes_in(average) + cached_bytes
    assert plan.peak("steps") == pytest.approx(measured, rel=WITHIN)


@pytest.mark.parametrize("name", sorted(PIPELINES))
@pytest.mark.parametrize("changes", [{}, TEACHER], ids=["plain", "teacher"])
def test_a_step_of_every_family(
    images: Path,
    tmp_path: Path,
    name: str,
    changes: dict[str, Any],
    saved_base: Callable[[str], Path],
) -> None:
    """In fp32 and with all activations kept, for beside these tiny models' a kernel's own scratch
    memory, which is not planned, is not little."""
    base = saved_base(name)
    options = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        "output_dir": tmp_path / "out",
        "resolution": 64,
        **changes,
    }
    plan = plan_of(**options)
    with accelerate_left_as_it_was():
        trainer = trainer_of(**options)
        steps = trainer.steps()
        next(steps)
        made = most_made(lambda: next(steps))
    planned = in_steps(plan, "activations") + in_steps(plan, "gradients")
    assert planned == pytest.approx(made, rel=WITHIN)


def test_encoding_takes_what_was_planned(options: dict[str, Any]) -> None:
    options["train_batch_size"] = 1
    plan = plan_of(**options)
    with accelerate_left_as_it_was():
        trainer = trainer_of(**options)
        chosen, pipe = trainer.config, trainer.pipe
        images, accelerator = find_images(chosen), trainer.accelerator
        made = most_made(lambda: Batches(chosen, trainer.family, pipe, images, [], accelerator))
        cached = [*cached_tensors(trainer.data.cache), *cached_tensors(trainer.data.prompts)]
        base = [t for m in models_of(pipe).values() for t in (*m.parameters(), *m.buffers())]
    assert plan.cached == bytes_in(cached)
    assert plan_of(**options, latent_cache_dir=chosen.output_dir).cached == 0
    assert max(plan.peak(phase) for phase in ("pictures", "prompts")) == pytest.approx(
        bytes_in(base) + made, rel=WITHIN
    )
    activations = next(row.bytes for row in plan.memory if row.name == "activations")

    prompt, size = [chosen.instance_prompt], (1, 3, *plan.image_size)
    with torch.no_grad():
        made = most_made(lambda: trainer.data.encode_images(torch.zeros(size)))
        # beside a workspace of the convolutions, 512 KiB here, that fake tensors do not have
        assert 0.9 * activations["pictures"] <= made <= activations["pictures"] + 2**19 + 2**14
        made = most_made(lambda: trainer.family.encode_prompts(pipe, prompt))
    assert activations["prompts"] == pytest.approx(made, rel=WITHIN)


@pytest.mark.parametrize("name", sorted(PIPELINES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_empty_base_has_the_shapes_and_dtypes_of_the_base(
    tmp_path: Path,
    name: str,
    dtype: torch.dtype,
    saved_base: Callable[[str], Path],
) -> None:
    base = saved_base(name)
    chosen = config(pretrained_model_name_or_path=base)
    full = load_base(chosen, get_family(name), dtype)
    bare = without_weights(base, tmp_path / "bare")
    chosen = config(pretrained_model_name_or_path=bare)
    empty = empty_base(chosen, get_family(name), dtype)

    def described(pipe: Any) -> dict[str, Any]:
        return {
            f"{part}.{key}": (tensor.shape, tensor.dtype)
            for part, model in models_of(pipe).items()
            for key, tensor in (*model.named_parameters(), *model.named_buffers())
        }

    assert described(empty) == described(full)
    assert empty.components.keys() == full.components.keys()
    weights = [p for model in models_of(empty).values() for p in model.parameters()]
    assert all(p.is_meta and not p.requires_grad for p in weights)


def test_configurations_are_enough_and_nothing_is_written(
    base: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = without_weights(base, tmp_path / "bare")
    before = sorted(tmp_path.rglob("*"))
    options = {"instance_data_dir": images, "output_dir": tmp_path / "out", "dry_run": True}
    options |= {"train_text_encoder": True, "rank": 8, "hybrid_rank": 2, "push_to_hub": True}
    main(arguments(pretrained_model_name_or_path=bare, **options))
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out

    options |= {"dry_run": None, "max_train_steps": 1, "push_to_hub": None}
    folder = run(pretrained_model_name_or_path=base, **options)
    card = (folder / "README.md").read_text(encoding="utf-8")
    trained = re.search(r"trained parameters \| ([\d,]+)", card)[1]
    assert f"trained parameters: {trained};" in printed
    megabytes = float(re.search(r"adapter file: ([\d.]+) MB", printed)[1])
    size = sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS_NAME).values())
    assert megabytes == pytest.approx(size / 1e6, abs=5e-4)
    assert "unet: 32 layers" in printed
    assert "text_encoder: 8 layers" in printed
    assert "rank 8 + 2, k 2, scaling 1" in printed


def test_hub_id_needs_no_weights(base: Path, images: Path, tmp_path: Path) -> None:
    """What the Hub's cache holds here is all that could be read: the tests are offline."""
    repository = tmp_path / "cache" / "models--nobody--tiny"
    without_weights(base, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    shared = {"instance_data_dir": images, "output_dir": tmp_path / "out"}
    named = plan_of(
        pretrained_model_name_or_path="nobody/tiny", cache_dir=tmp_path / "cache", **shared
    )
    folder = plan_of(pretrained_model_name_or_path=base, **shared)
    assert format_plan(named) == format_plan(folder).replace(str(base), "nobody/tiny")


def test_single_file_is_planned_by_its_configuration(
    base: Path, images: Path, tmp_path: Path
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(base)
    file = write(ORIGINALS["stable-diffusion"](pipe), tmp_path / "sd.safetensors")
    shared = {"instance_data_dir": images, "output_dir": tmp_path / "out"}
    bare = without_weights(base, tmp_path / "bare")
    single = plan_of(pretrained_model_name_or_path=file, base_config=bare, **shared)
    folder = plan_of(pretrained_model_name_or_path=base, **shared)
    assert format_plan(single) == format_plan(folder).replace(str(base), str(file))
    with pytest.raises(ConfigError, match="--base_config"):
        plan_of(pretrained_model_name_or_path=file, **shared)


def test_another_vae_is_planned(base: Path, images: Path, tmp_path: Path) -> None:
    larger = AutoencoderKL(**{**vae().config, "block_out_channels": [32, 32]})
    larger.save_pretrained(tmp_path / "vae")
    plan = plan_of(
        pretrained_model_name_or_path=base,
        instance_data_dir=images,
        output_dir=tmp_path / "out",
        pretrained_vae_model_name_or_path=without_weights(tmp_path / "vae", tmp_path / "bare"),
        mixed_precision="bf16",
    )
    row = next(row for row in plan.memory if row.name == "vae")
    parameters = sum(p.numel() for p in larger.parameters())
    assert row.label == f"vae, {parameters / 1e6:.1f} M parameters, float32"
    assert row.bytes["pictures"] == 4 * parameters


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 6, "gralora_k": 4, "resolution": 17},
        {"lora_layers": "to_z"},
        {"target_preset": "atention"},
        {"lora_layers": "to_q,to_nothing"},
        {"instance_data_dir": "nowhere"},
        {"pictures": "bad"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_errors_are_those_of_the_run(
    base: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
) -> None:
    options = {"pretrained_model_name_or_path": base, "instance_data_dir": images, **changes}
    if options.pop("pictures", None):
        options["instance_data_dir"] = make_images(tmp_path / "pictures")
        (tmp_path / "pictures" / "bad.png").write_bytes(b"no picture")
    told = []
    for dry in (True, None):
        with pytest.raises(SystemExit) as caught:
            main(arguments(output_dir=tmp_path / "out", dry_run=dry, **options))
        text = capsys.readouterr().err
        told.append((caught.value.code, text[text.index("error: ") :]))
    assert told[0] == told[1]
    assert told[0][0] == 2


def test_buckets_are_planned_as_they_are_trained(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": make_shapes(tmp_path / "pictures", [(30, 20), (20, 20), (20, 40)]),
        "output_dir": tmp_path / "out",
        "aspect_ratio_buckets": "16,24;16,16;32,16",
        "num_train_epochs": 2,
        "max_train_steps": None,
    }
    plan = plan_of(**options)
    with accelerate_left_as_it_was():
        trainer = trainer_of(**options)
    assert plan.steps == trainer.max_steps == 2 * 3  # each of three buckets fills a batch of two
    assert plan.image_size == max(trainer.data.instance.targets, key=math.prod) == (32, 16)
    monkeypatch.setattr(ModelFamily, "size_divisor", lambda self, pipe: 16)
    with pytest.raises(ConfigError, match=r"contains 16,24; .*multiples of 16 for this base"):
        plan_of(**options)


def test_measurements_of_held_out_images_are_planned(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options |= {"max_train_steps": 3, "held_out_steps": 2, "held_out_noises": 2}
    without = plan_of(**options)
    options["held_out_data_dir"] = make_images(tmp_path / "held out", 2, seed=1)
    plan = plan_of(**options)
    assert (without.held_out, without.measurements) == (0, 0)
    text = format_plan(plan)
    assert "2 images, measured 3 times: 36 rows forward, beside 6 rows forward and" in text
    measured = [row for row in metrics(run(**options)) if "held_out" in row]
    assert plan.measurements == len(measured) + 1  # the frozen base
    with accelerate_left_as_it_was():
        trainer = trainer_of(**options | {"overwrite_output_dir": True})
    cached = bytes_in(cached_tensors(trainer.held_out_data.cache))
    assert plan.cached - without.cached == cached > 0


def test_layers_that_differ_are_named() -> None:
    model = adapt(stable_diffusion()).unet
    layers = [m for m in model.modules() if isinstance(m, GraloraLayer)]
    for layer in layers[:7]:
        layer.gralora_k["a"] = 1
    plan = _adapter_plan("unet", model, "a")
    assert [len(names) for names in plan.layers.values()] == [len(layers) - 7, 7]
    first, second = _adapter_lines(plan)
    assert first.startswith(
        f"  unet: {len(layers)} layers, {plan.parameters:,} parameters; rank 8 "
    )
    assert second.startswith("    but rank 8 + 2, k 1, scaling 1.6 in 7: down_blocks.0.resnets.0.")
    assert second.endswith(f"{layers[4].module_name} and 2 more")


def test_what_is_elsewhere_is_not_counted(base: Path, images: Path, tmp_path: Path) -> None:
    """A GPU of two, as far as the CPU can tell: what is on it, and what is said of it."""
    shared = {"instance_data_dir": images, "output_dir": tmp_path / "out"}
    here = plan_of(pretrained_model_name_or_path=base, **shared, use_ema=True)
    models = [row for row in here.memory if row.name in ("unet", "vae", "text_encoder")]
    assert [tuple(row.bytes) for row in models] == [("pictures", "prompts", "steps")] * 3
    chosen, family = here.config, get_family("stable-diffusion")

    def there(phase: str, **changes: Any) -> set[str]:
        return _models_there(phase, replace(chosen, **changes), family, ["unet"])

    assert (there("pictures"), there("prompts")) == ({"vae"}, {"text_encoder"})
    assert there("steps") == {"unet"}
    assert there("steps", cache_latents=False) == {"unet", "vae"}
    assert there("steps", train_text_encoder=True) == {"unet", "text_encoder"}

    plan = replace(here, device="cuda", processes=2, apart=True)
    lines = format_plan(plan).splitlines()
    assert lines[-1].startswith("plus encoded images and prompts on the cpu: 0.0")
    assert any(line.startswith("Memory in MiB (cuda of each process)") for line in lines)
    assert [line for line in lines if line.startswith("rate")] == [
        f"rate    {chosen.learning_rate:g}, about as fast as a LoRA of this rank at "
        f"{chosen.learning_rate / chosen.gralora_k**0.5:.2g}"
    ]
    assert chosen.gralora_k > 1
    as_lora = replace(plan, config=replace(chosen, gralora_k=1))
    assert "about as fast" not in format_plan(as_lora)
    peaks = next(line.split()[1:] for line in lines if line.startswith("  peak"))
    assert peaks == [f"{plan.peak(phase) / 2**20:.2f}" for phase in plan.phases]
    assert next(line for line in lines if "EMA" in line).endswith("0.03")


def test_a_base_that_decides_by_values_is_refused(
    base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = get_family("stable-diffusion")
    predict = type(family).predict

    def peeks(self: Any, denoiser: Any, noisy: Tensor, *others: Any) -> Tensor:
        return predict(self, denoiser, noisy if noisy.sum().item() else -noisy, *others)

    monkeypatch.setattr(type(family), "predict", peeks)
    with pytest.raises(ConfigError, match=r"depends on values .* Leave out --dry_run"):
        plan_of(
            pretrained_model_name_or_path=base,
            instance_data_dir=images,
            output_dir=tmp_path / "out",
        )


def test_stable_diffusion_of_its_real_size(images: Path, tmp_path: Path) -> None:
    """Its numbers are known, and 4 GB of weights are not."""
    stable_diffusion().save_pretrained(tmp_path / "tiny")
    base = without_weights(tmp_path / "tiny", tmp_path / "base")
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=768,
            attention_head_dim=8,
            sample_size=64,
        )
        encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_attention_heads=12,
                num_hidden_layers=12,
                eos_token_id=2,
            )
        )
    unet.save_config(base / "unet")
    encoder.config.save_pretrained(base / "text_encoder")
    plan = plan_of(
        pretrained_model_name_or_path=base,
        instance_data_dir=images,
        output_dir=tmp_path / "out",
        resolution=None,
        rank=16,
        train_batch_size=1,
    )
    sizes = {name: in_steps(plan, name) for name in ("unet", "text_encoder", "adapter")}
    assert sizes == {
        "unet": 4 * 859_520_964,
        "text_encoder": 4 * 123_060_480 + 8 * 77,  # with the numbers of the positions
        "adapter": 4 * 3_188_736,
    }
    assert plan.trained_parameters == 3_188_736
    assert plan.image_size == (128, 128)  # 64 latents a side; the tiny VAE shrinks by 2
    assert "adapter file: 12.8 MB" in format_plan(plan)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"train_batch_size": 4},
        {"train_batch_size": 4, "mixed_precision": "fp16"},
        {"train_batch_size": 8, "mixed_precision": "bf16", "gradient_checkpointing": True},
        {**TEACHER, "train_text_encoder": True},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_cuda_takes_what_was_planned(
    options: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """``torch.cuda.max_memory_allocated`` of the steps, as the model card reports it."""
    options |= {"resolution": 256, **changes}
    options["pretrained_model_name_or_path"] = save_base(tmp_path / "base", 64, 128, 256)
    plan = plan_of(**options)
    assert plan.device == "cuda"
    folder = run(**options, skip_final_inference=True)
    card = (folder / "README.md").read_text(encoding="utf-8")
    found = re.search(r"peak memory of the steps, GiB \| ([\d.]+)", card)
    assert found is not None
    assert plan.peak("steps") / 2**30 == pytest.approx(float(found[1]), rel=WITHIN)


def test_a_base_in_parts(saved_base: Callable[[str], Path], images: Path, tmp_path: Path) -> None:
    """Each process has half of the denoiser and of each text encoder that can be read in parts."""
    base = saved_base("flux")
    shared = {"instance_data_dir": images, "max_sequence_length": 8, "output_dir": tmp_path}

    def planned(source: Path, apart: bool = True, **others: Any) -> Plan:
        chosen = config(pretrained_model_name_or_path=source, **shared, **others)
        accelerator = Processes(cpu=True)
        accelerator.count = 2
        family, examples = find_base_family(chosen), find_images(chosen)
        return plan_run(chosen, family, examples, [], accelerator, Sharding(), apart)

    def of(plan: Plan, name: str) -> dict[str, int]:
        return next(row.bytes for row in plan.memory if row.name == name)

    pipe, plan = PIPELINES["flux"](), planned(base)
    encoders = [pipe.text_encoder, pipe.text_encoder_2]
    needed = [Sharding().bytes_needed(m, 2) for m in (pipe.transformer, *encoders)]
    buffers = [sum(b.nbytes for b in m.buffers()) for m in encoders]
    assert of(plan, "transformer") == {"steps": needed[0][0]}
    assert of(plan, "text_encoder") == {"prompts": needed[1][0] + buffers[0]}
    assert of(plan, "text_encoder_2") == {"prompts": needed[2][0] + buffers[1]}
    assert of(plan, "gathered") == {"prompts": needed[1][1] + needed[2][1], "steps": needed[0][1]}
    # on the CPU, it is read after everything is encoded
    assert of(planned(base, apart=False), "transformer") == {"steps": needed[0][0]}
    assert plan.blocks == {}
    assert fitted(plan, 0, denoiser=False).offloading == NOTHING  # there is nothing to stream
    assert "transformer" in (text := format_plan(plan))
    assert text.count(", in 2 parts") == 3
    trained = planned(base, train_text_encoder=True)
    assert format_plan(trained).count(", in 2 parts") == 1
    damaged = shutil.copytree(base, tmp_path / "base")
    weights = damaged / "text_encoder_2" / "model.safetensors"
    stored = load_file(weights)
    del stored["encoder.final_layer_norm.weight"]
    save_file(stored, weights)
    whole = sum(t.nbytes for t in (*encoders[1].parameters(), *encoders[1].buffers()))
    assert of(planned(damaged), "text_encoder_2") == {"prompts": whole}
