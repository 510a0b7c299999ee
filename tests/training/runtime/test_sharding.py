"""A base in parts, in two processes: the same numbers, and only a share of the weights in each."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gralora_diffusion.base_models.loading import load_base
from gralora_diffusion.base_models.streaming import blocks_of
from gralora_diffusion.families import get_family
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.runtime.acceleration import check_sharding
from gralora_diffusion.training.runtime.sharding import Sharding, requested_sharding
from tests.base_models.test_single_file import scaled_fp8
from tests.forked import fork_ranks
from tests.models import PIPELINES
from tests.originals import ORIGINALS
from tests.performance.recipes import Processes
from tests.performance.sharding import GROWTH, make_base, write_file
from tests.training.runs import (
    PROGRAM,
    adapter,
    arguments,
    assert_close,
    assert_same_run,
    config,
    make_images,
    metrics,
    run_two,
)

#: Forward and backward pass of an adapted UNet, whole and in parts.
PARTS = """
import json, sys, torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from gralora_diffusion.base_models.options import BaseModelOptions
from gralora_diffusion.base_models.unread_weights import unread_model
from gralora_diffusion.families import get_family
from gralora_diffusion.training.runtime.acceleration import share_only_what_is_trained
from gralora_diffusion.training.runtime.sharding import Sharding
from tests import models

base = BaseModelOptions(pretrained_model_name_or_path=sys.argv[1])
dist.init_process_group("gloo")
results, bytes_held = [], []
for sharding, reads_part in (
    (None, False),
    (Sharding(), False),
    (Sharding(), True),
    (Sharding(reshard_after_forward=False), True),
):
    pipe, unread = models.stable_diffusion(), None
    if reads_part:
        pipe.unet, unread = unread_model(base, get_family(pipe), "unet", torch.float32)
    unet = models.adapt(pipe).unet
    unet.requires_grad_(False)
    trained = [p for name, p in unet.named_parameters() if "gralora" in name]
    for parameter in trained:
        parameter.requires_grad_(True)

    def held():
        sizes = {p: p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes
                 for p in unet.parameters() if not p.requires_grad}
        return sum(sizes.values())

    if sharding is not None:
        sharding.shard(unet, torch.device("cpu"), unread)
    torch.manual_seed(dist.get_rank())
    noisy, text = torch.randn(1, 4, 8, 8), torch.randn(1, 4, unet.config.cross_attention_dim)
    share_only_what_is_trained(unet)
    model = DistributedDataParallel(unet)
    before = held()
    out = model(noisy, torch.tensor([3]), text).sample
    out.square().mean().backward()
    results.append([out.detach(), *(p.grad.clone() for p in trained)])
    bytes_held.append(before)
    for p in trained:
        p.grad = None
worst = max(
    float((a - b).abs().max() / a.abs().max())
    for other in results[1:]
    for a, b in zip(results[0], other, strict=True)
)
smallest = min(float(tensor.abs().max()) for tensor in results[0])
print(json.dumps({"worst": worst, "held": bytes_held, "smallest": smallest}))
dist.destroy_process_group()
"""


def test_the_same_numbers_and_half_of_the_weights(saved_base: Callable[[str], Path]) -> None:
    for code, text in fork_ranks(PARTS, saved_base("stable-diffusion")):
        assert code == 0, text[-3000:]
        found = json.loads(text.splitlines()[-1])
        whole, *parts = found["held"]
        assert found["worst"] < 1e-4
        assert found["smallest"] > 0
        # a tensor whose first dimension is odd has one more row in the first process
        assert all(whole / 2 * 0.9 < part < whole / 2 * 1.1 for part in parts)


#: Loads a model in parts, computes with it if it is a text encoder, and prints how far the memory
#: grew.
LOADED = f"""
import sys, torch
import torch.distributed as dist
from gralora_diffusion.base_models.options import BaseModelOptions
from gralora_diffusion.base_models.unread_weights import unread_model
from gralora_diffusion.families import get_family
from gralora_diffusion.training.runtime.sharding import Sharding

dist.init_process_group("gloo")
{GROWTH}
source, rest, component = sys.argv[1:]
base = BaseModelOptions(
    pretrained_model_name_or_path=source, base_config=rest if source != rest else None
)
model, unread = unread_model(base, get_family("flux"), component, torch.bfloat16)
model.requires_grad_(False)
visits = component != "transformer"
Sharding().shard(model, torch.device("cpu"), unread, visits=visits)
print(growth())
if visits:
    with torch.no_grad():
        model(torch.arange(8)[None])
    model.to("cpu")
    print(growth())
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("large")
    return folder / "base", make_base(folder / "base", 120_000_000, 512, 300_000_000)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts the peak of the memory")
@pytest.mark.parametrize(
    ("component", "in_file"),
    [("transformer", False), ("transformer", True), ("text_encoder_2", False)],
)
def test_no_process_ever_holds_more_than_its_part(
    component: str, in_file: bool, large: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, pipe = large
    source = write_file(folder, tmp_path / "file.safetensors") if in_file else folder
    model = getattr(pipe, component)
    half, gathered = Sharding().bytes_needed(model, 2, visits=True)
    assert half > 50_000_000
    for code, text in fork_ranks(LOADED, source, folder, component):
        assert code == 0, text[-3000:]
        loaded, *used = map(int, text.splitlines()[-1 if component == "transformer" else -2 :])
        assert loaded < 1.15 * half + 20_000_000  # and a buffer of the file
        # and what libraries keep after their first products
        assert all(size < 1.15 * (half + gathered) + 40_000_000 < 2 * half for size in used)


@pytest.mark.parametrize("family", ["flux", "stable-diffusion", "stable-diffusion-xl"])
def test_a_run_is_the_same_and_is_resumed_without(
    family: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saved_base: Callable[[str], Path],
) -> None:
    """With validation images, EMA and checkpoints.

    The text encoder is trained, too, or in parts. The one of SDXL returns its hidden states.
    """
    base = saved_base(family)
    options = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "gradient_checkpointing": True,
        "use_ema": True,
        "validation_prompt": "a dog",
        "num_validation_images": 1,
        "validation_inference_steps": 1,
        "validation_steps": 2,
        "held_out_data_dir": make_images(tmp_path / "held out", 3, seed=1),
        "held_out_steps": 2,
    }
    if family == "stable-diffusion":
        options |= {"train_text_encoder": True, "gradient_accumulation_steps": 2}
    whole = run_two(
        output_dir=tmp_path / "whole", latent_cache_dir=tmp_path / "whole cache", **options
    )
    options["latent_cache_dir"] = tmp_path / "cache"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")  # as accelerate launch does
    run_two(output_dir=tmp_path / "parts", **options | {"max_train_steps": 2})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    resumed = run_two(output_dir=tmp_path / "parts", resume_from_checkpoint="latest", **options)
    caches = [tmp_path / name for name in ("cache", "whole cache")]
    cached = [{path.name for path in cache.glob("*.safetensors")} for cache in caches]
    assert cached[0] == cached[1] != set()
    if family == "flux":
        assert_same_run(whole, resumed)
    else:  # a convolution depends on how its weight lies in memory
        assert_close(whole, resumed, 1e-3)
    assert [row["step"] for row in metrics(resumed) if "held_out" in row] == [0, 2, 4]
    best = [adapter(folder / "best") for folder in (whole, resumed)]
    for key, tensor in best[0].items():
        assert float((best[1][key] - tensor).abs().max()) <= 1e-3 * float(tensor.abs().max())
    names = [sorted(p.relative_to(f) for p in f.rglob("*.png")) for f in (whole, resumed)]
    assert names[0] == names[1] != []


def test_prompts_and_class_images_of_a_single_file(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saved_base: Callable[[str], Path],
) -> None:
    """Text encoders in parts encode the same, and an odd number of batches is shared out.

    The weights of the file are in scaled fp8.
    """
    family = "stable-diffusion"
    tensors = ORIGINALS[family](PIPELINES[family]())
    file, _ = scaled_fp8(tensors, "tensors", tmp_path / "file.safetensors")

    def trained(name: str) -> Path:
        return run_two(
            pretrained_model_name_or_path=file,
            base_config=saved_base(family),
            instance_data_dir=images,
            output_dir=tmp_path / name,
            max_train_steps=2,
            with_prior_preservation=True,
            class_prompt="a dog",
            class_data_dir=tmp_path / name / "class",
            num_class_images=5,
            sample_batch_size=2,
            latent_cache_dir=tmp_path / name / "cache",
        )

    whole = trained("whole")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    parts = trained("parts")
    assert_close(whole, parts, 1e-3)  # a convolution depends on how its weight lies in memory
    drawn = sorted(path.name for path in (whole / "class").glob("*.png"))
    assert len(drawn) == 5
    for name in drawn:
        pixels = [np.asarray(Image.open(folder / "class" / name)) for folder in (whole, parts)]
        assert np.abs(np.subtract(*pixels, dtype=int)).max() <= 1
    # their names contain a hash of the text encoder and of what it encodes
    cached = [{p.name for p in (f / "cache").glob("*.safetensors")} for f in (whole, parts)]
    assert cached[0] == cached[1] != set()


@pytest.mark.parametrize(
    ("options", "why", "instead"),
    [
        ({"quantization": "torchao-int8"}, "torchao's weights do not have", "stream the base"),
        ({"quantization": "bnb-nf4"}, "4-bit weights have not been tried", "the whole base"),
        ({"bnb_quantization_config_path": "a"}, "the scales of 8-bit weights", "the whole base"),
        ({"pretrained_model_name_or_path": "a.gguf"}, "without their formats", "stream the base"),
    ],
)
def test_quantized_bases_are_refused(options: dict[str, Any], why: str, instead: str) -> None:
    accelerator = Processes(cpu=True)
    accelerator.count = 2
    with pytest.raises(ConfigError) as caught:
        check_sharding(TrainingConfig(**options), accelerator)
    (problem,) = caught.value.problems
    assert "cannot be used with FSDP: " in problem
    assert why in problem
    assert "Either give FSDP the base in 16 bits or as a file in scaled fp8, or " in problem
    assert instead in problem


def test_a_base_that_is_quantized_on_disk_is_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_base: Callable[[str], Path]
) -> None:
    family = get_family("stable-diffusion")
    base = config(
        pretrained_model_name_or_path=saved_base(family.name), quantization="torchao-int8"
    )
    load_base(base, family, torch.float32).save_pretrained(tmp_path / "base")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    line = arguments(
        pretrained_model_name_or_path=tmp_path / "base",
        instance_data_dir=images,
        output_dir=tmp_path / "out",
    )
    (code, text), (other, _) = fork_ranks(PROGRAM, *line)  # only the first process reports it
    assert code == other == 2
    assert "the base's UNet2DConditionModel is quantized on disk" in text, text[-3000:]


def test_what_accelerate_is_set_to(monkeypatch: pytest.MonkeyPatch) -> None:
    with requested_sharding() as sharding:
        assert sharding is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with requested_sharding() as sharding:
        assert sharding == Sharding(offload=False, reshard_after_forward=True)
        assert os.environ["ACCELERATE_USE_FSDP"] == "false"
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "SHARD_GRAD_OP")
    with requested_sharding() as sharding:
        assert sharding == Sharding(offload=True, reshard_after_forward=False)


class Block(nn.Module):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5, bias=False)
        self.inner = inner


class Outer(Block):
    pass


class Model(nn.Module):
    _no_split_modules = ("Block", "Outer")

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3, bias=False)
        self.blocks = nn.ModuleList([Outer(Block()), Block(), Block()])


def test_bytes() -> None:
    model = Model()
    outer, inner = model.blocks[0], model.blocks[0].inner
    blocks = blocks_of(model)
    assert blocks.index(inner) < blocks.index(outer)
    assert set(blocks) == {outer, inner, *model.blocks[1:]}
    block, rest = 4 * 20, 4 * 12
    assert Sharding().bytes_needed(model, 2) == ((rest + 4 * block) // 2, rest + 2 * block)
    assert Sharding(offload=True).bytes_needed(model, 2)[0] == 0
    assert Sharding(reshard_after_forward=False).bytes_needed(model, 3) == (
        -(-(rest + 4 * block) // 3),
        rest + 4 * block,
    )
    other = Sharding(offload=True, reshard_after_forward=False)
    assert other.bytes_needed(model, 2, visits=True) == Sharding().bytes_needed(model, 2)
