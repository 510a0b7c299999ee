"""Class images: drawn once, the same however often the drawing was interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator

from gralora_diffusion.adapters.injection import adapters_disabled
from gralora_diffusion.families import get_family, list_families
from gralora_diffusion.training.checks.options import find_problems
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.class_images import (
    _generation_dtype,
    existing_class_images,
    generate_class_images,
)
from gralora_diffusion.training.data.data_module import find_class_images
from tests.models import adapt, stable_diffusion
from tests.training.runs import config, make_images

FAMILY = get_family("stable-diffusion")


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def prior(base: Path, folder: Path, **options: Any) -> TrainingConfig:
    return config(
        pretrained_model_name_or_path=base,
        class_prompt="a dog",
        class_data_dir=folder,
        sample_batch_size=2,
        **{"with_prior_preservation": True, "num_class_images": 5, **options},
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_interrupted_drawing_goes_on_to_the_same_images(
    base: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    chosen = prior(base, tmp_path / "a")
    assert generate_class_images(chosen, FAMILY, accelerator)
    whole = contents(tmp_path / "a")
    assert sorted(whole) == [f"class-{number:05d}.png" for number in range(5)]
    assert len(set(whole.values())) == 5
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for number in (1, 2, 4):
        (tmp_path / "b" / f"class-{number:05d}.png").unlink()
    (tmp_path / "b" / ".class-00002.png.77").write_bytes(b"half")
    assert generate_class_images(prior(base, tmp_path / "b"), FAMILY, accelerator)
    (tmp_path / "b" / ".class-00002.png.77").unlink()
    assert contents(tmp_path / "b") == whole
    assert not generate_class_images(chosen, FAMILY, accelerator)


def test_images_of_others_count_and_are_kept(
    base: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    folder = make_images(tmp_path / "class", 3)
    shutil.copy(folder / "1.png", folder / "1_mask.png")  # which is no image to learn
    before = contents(folder)
    chosen = prior(base, folder)
    assert existing_class_images(chosen) == 3
    generate_class_images(chosen, FAMILY, accelerator)
    after = contents(folder)
    drawn = ["class-00000.png", "class-00001.png"]
    assert sorted(after) == ["0.png", "1.png", "1_mask.png", "2.png", *drawn]
    assert before.items() <= after.items()
    assert len(find_class_images(chosen)) == 5


def test_images_in_folders_with_repeats_count_and_none_are_drawn_beside_them(
    base: Path, tmp_path: Path
) -> None:
    make_images(tmp_path / "class" / "2_dog", 3)
    make_images(tmp_path / "class" / "1_a cat", 2, seed=1)
    chosen = prior(base, tmp_path / "class", instance_data_dir=make_images(tmp_path / "images"))
    assert existing_class_images(chosen) == 5
    assert find_problems(chosen) == []
    found = [(image.caption, image.repeats) for image in find_class_images(chosen)]
    assert found == [("a cat", 1)] * 2 + [("dog", 2)] * 3
    more = prior(
        base, tmp_path / "class", instance_data_dir=tmp_path / "images", num_class_images=6
    )
    (problem,) = find_problems(more)
    assert "(1_a cat, 2_dog) contain 5 images, and --num_class_images is 6" in problem
    assert problem.endswith("Give --num_class_images 5, or another folder")


def test_nothing_is_drawn_for_a_teacher_or_without_a_prior(
    base: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    choices: list[dict[str, Any]] = [
        {"prior_source": "teacher"},
        {"with_prior_preservation": False},
    ]
    for options in choices:
        chosen = prior(base, tmp_path / "class", **options)
        assert not generate_class_images(chosen, FAMILY, accelerator)
    assert not (tmp_path / "class").exists()


@pytest.mark.parametrize("precision", ["bf16", None])
def test_precision_of_drawing(
    base: Path, tmp_path: Path, accelerator: Accelerator, precision: str | None
) -> None:
    chosen = prior(base, tmp_path, prior_generation_precision=precision, num_class_images=1)
    assert generate_class_images(chosen, FAMILY, accelerator)


@pytest.mark.parametrize("name", list_families())
def test_precision_of_drawing_on_a_gpu(name: str, tmp_path: Path) -> None:
    """In fp16 T5 and FLUX's activations are clipped, and no VAE but SDXL's is spared it."""
    family, cuda = get_family(name), torch.device("cuda")
    wanted = torch.float16 if family.objective == "ddpm" else torch.bfloat16
    assert _generation_dtype(prior(tmp_path, tmp_path), family, cuda) == wanted
    chosen = prior(tmp_path, tmp_path, prior_generation_precision="fp32")
    assert _generation_dtype(chosen, family, cuda) == torch.float32


def lora(pipe) -> None:
    """PEFT's LoRA on the UNet, which changes what it predicts."""
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, pipe.unet)


@pytest.mark.parametrize("adapted", [adapt, lora])
def test_frozen_base_predicts_without_the_adapter(adapted) -> None:
    pipe = stable_diffusion()
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 16, 32))
    with torch.no_grad():
        expected = pipe.unet(*inputs).sample
    adapted(pipe)
    with adapters_disabled(pipe.unet):
        assert torch.equal(pipe.unet(*inputs).sample, expected)
    after = pipe.unet(*inputs).sample
    assert after.requires_grad
    assert not torch.allclose(after, expected)
