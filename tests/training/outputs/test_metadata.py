"""What the trainer's file says of itself, as interfaces read it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gralora_diffusion import get_family
from gralora_diffusion.adapters.adapter_file import WEIGHTS_NAME, read_adapter
from gralora_diffusion.io.tensor_files import file_hashes
from gralora_diffusion.training.outputs.metadata import tag_frequency
from tests.training.optimization.test_masked_loss import write_mask
from tests.training.runs import make_images, make_shapes, run

TIMES = {"modelspec.date", "ss_training_started_at", "ss_training_finished_at"}


def metadata(folder: Path) -> dict[str, str]:
    return read_adapter(folder).metadata


def test_folders_of_concepts_are_told_as_kohyas(base: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "pictures" / "3_sks dog", count=2)
    make_images(tmp_path / "pictures" / "1_zwx cat", count=1, seed=1)
    told = metadata(
        run(
            pretrained_model_name_or_path=base,
            instance_data_dir=tmp_path / "pictures",
            instance_prompt=None,
            output_dir=tmp_path / "out",
            num_train_epochs=1,
            max_train_steps=None,
            repeats=2,
        )
    )
    assert json.loads(told["ss_dataset_dirs"]) == {
        "1_zwx cat": {"n_repeats": 2, "img_count": 1},
        "3_sks dog": {"n_repeats": 6, "img_count": 2},
    }
    assert json.loads(told["ss_tag_frequency"]) == {
        "1_zwx cat": {"zwx cat": 1},
        "3_sks dog": {"sks dog": 2},
    }
    assert told["ss_num_train_images"] == "14"
    assert told["ss_max_train_steps"] == "7"


def test_a_run_tells_what_it_was(base: Path, tmp_path: Path) -> None:
    began = time.time()
    subject = make_images(tmp_path / "my dog", count=3)
    (subject / "0.txt").write_text("a sks dog, Snow,, snow ")
    out = run(
        pretrained_model_name_or_path=base,
        instance_data_dir=subject,
        output_dir=tmp_path / "rex",
        repeats=2,
        lora_alpha=8,
        lora_dropout=0.1,
        snr_gamma=5.0,
        with_prior_preservation=True,
        class_data_dir=make_images(tmp_path / "dogs", count=2, seed=2),
        class_prompt="a dog",
        num_class_images=2,
        pretrained_vae_model_name_or_path=base / "vae",
        seed=7,
    )
    told = metadata(out)
    ended = time.time()
    date = datetime.fromisoformat(told.pop("modelspec.date").replace("Z", "+00:00")).timestamp()
    assert int(began) <= date <= ended
    started, finished = (float(told.pop(f"ss_training_{n}_at")) for n in ("started", "finished"))
    assert began <= started <= finished <= ended
    hashes = file_hashes(out / WEIGHTS_NAME)
    assert {key: told.pop(key) for key in hashes} == hashes
    # what AUTOMATIC1111 reads as JSON
    read = {key: json.loads(value) for key, value in told.items() if value.startswith("{")}
    assert read == {
        "ss_dataset_dirs": {"my dog": {"n_repeats": 2, "img_count": 3}},
        "ss_reg_dataset_dirs": {"dogs": {"n_repeats": 1, "img_count": 2}},
        "ss_tag_frequency": {"my dog": {"a sks dog": 3, "snow": 2}},
        "ss_network_args": {
            "algo": "gralora",
            "gralora_k": "2",
            "hybrid_rank": "0",
            "target_preset": "attention",
        },
    }
    assert {key: value for key, value in told.items() if key not in read} == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/gralora",
        "modelspec.implementation": "gralora-diffusion",
        "modelspec.title": "rex",
        "modelspec.trigger_phrase": "a sks dog",
        "modelspec.resolution": "16x16",
        "modelspec.prediction_type": "epsilon",
        "ss_output_name": "rex",
        "ss_sd_model_name": base.name,
        "ss_vae_name": "vae",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_network_module": "gralora_diffusion",
        "ss_network_dim": "4",
        "ss_network_alpha": "8",
        "ss_network_dropout": "0.1",
        "ss_num_train_images": "6",
        "ss_num_reg_images": "2",
        "ss_resolution": "(16, 16)",
        "ss_enable_bucket": "False",
        "ss_random_crop": "True",
        "ss_flip_aug": "False",
        "ss_cache_latents": "True",
        "ss_caption_dropout_rate": "0.0",
        "ss_prior_loss_weight": "1.0",
        "ss_num_batches_per_epoch": "3",
        "ss_num_epochs": "2",
        "ss_max_train_steps": "6",
        "ss_steps": "6",
        "ss_epoch": "2",
        "ss_batch_size_per_device": "2",
        "ss_total_batch_size": "2",
        "ss_gradient_accumulation_steps": "1",
        "ss_gradient_checkpointing": "False",
        "ss_mixed_precision": "no",
        "ss_seed": "7",
        "ss_optimizer": "adamw",
        "ss_learning_rate": "0.01",
        "ss_unet_lr": "0.01",
        "ss_lr_scheduler": "constant",
        "ss_lr_warmup_steps": "0",
        "ss_max_grad_norm": "1.0",
        "ss_min_snr_gamma": "5.0",
    }
    assert str(tmp_path) not in (out / WEIGHTS_NAME).read_bytes().decode(errors="replace")


def test_only_the_times_tell_a_run_from_its_resumed_twin(
    base: Path, images: Path, tmp_path: Path
) -> None:
    data: dict[str, Any] = {"pretrained_model_name_or_path": base, "instance_data_dir": images}
    data["checkpointing_steps"] = 2
    whole = run(output_dir=tmp_path / "one" / "rex", max_train_steps=4, **data)
    twin = tmp_path / "two" / "rex"
    # as if the first had been killed after its second step
    (twin.parent).mkdir()
    (whole / "checkpoint-2").rename(twin.parent / "checkpoint-2")
    twin.mkdir()
    (twin.parent / "checkpoint-2").rename(twin / "checkpoint-2")
    run(output_dir=twin, max_train_steps=4, resume_from_checkpoint="latest", **data)
    one, two = metadata(whole), metadata(twin)
    assert one.keys() >= TIMES
    assert {k: v for k, v in one.items() if k not in TIMES} == {
        k: v for k, v in two.items() if k not in TIMES
    }
    checkpoints = [folder / "checkpoint-4" / WEIGHTS_NAME for folder in (whole, twin)]
    assert checkpoints[0].read_bytes() == checkpoints[1].read_bytes()
    assert not TIMES & metadata(checkpoints[0]).keys()
    assert metadata(twin / "checkpoint-2" / WEIGHTS_NAME)["ss_steps"] == "2"


def test_buckets_and_ranks_of_single_layers(base: Path, tmp_path: Path) -> None:
    shapes = make_shapes(tmp_path / "shapes", [(40, 20), (20, 40), (41, 21)])
    for side in ("0.png", "2.png"):
        assert Image.open(shapes / side).width > 30
    out = run(
        pretrained_model_name_or_path=base,
        instance_data_dir=shapes,
        output_dir=tmp_path / "out",
        use_aspect_ratio_buckets=True,
        aspect_ratio_buckets="16,32;32,16",
        rank_pattern=["to_q=8"],
        max_train_steps=1,
    )
    told = metadata(out)
    assert json.loads(told["ss_bucket_info"]) == {
        "buckets": {  # width first, as sd-scripts has it
            "0": {"resolution": [32, 16], "count": 2},
            "1": {"resolution": [16, 32], "count": 1},
        }
    }
    assert told["ss_network_dim"] == told["ss_network_alpha"] == "Dynamic"
    assert json.loads(told["ss_network_args"])["rank_pattern"] == {"to_q": 8}


def test_what_changes_loss_and_rates(base: Path, tmp_path: Path) -> None:
    """What sd-scripts has no field for has none of its names."""
    images = make_images(tmp_path / "images", count=2)
    write_mask(images / "0.mask.png", 0)
    out = run(
        pretrained_model_name_or_path=base,
        instance_data_dir=images,
        output_dir=tmp_path / "out",
        max_train_steps=1,
        snr_gamma=5.0,
        soft_min_snr=True,
        min_timestep=200,
        loraplus_lr_ratio=16,
        masked_loss=True,
        mask_outside="weight",
        normalize_masked_area_loss=True,
    )
    told = metadata(out)
    assert told["gralora_soft_min_snr"] == "5.0"
    assert "ss_min_snr_gamma" not in told
    assert told["modelspec.timestep_range"] == "200,999"
    assert json.loads(told["ss_network_args"])["loraplus_lr_ratio"] == "16.0"
    assert {key: value for key, value in told.items() if "mask" in key} == {
        "ss_masked_loss": "True",
        "gralora_mask_outside": "weight",
        "gralora_mask_outside_weight": "0.1",
        "gralora_normalize_masked_area_loss": "True",
    }


@pytest.mark.parametrize(
    ("name", "architecture", "version"),
    [
        ("stable-diffusion-3", "stable-diffusion-v3.5-medium/gralora", "sd3-5-medium"),
        ("flux", "flux-1-dev/gralora", "flux1"),
    ],
)
def test_a_family_without_prediction_types(
    name: str,
    architecture: str,
    version: str,
    images: Path,
    tmp_path: Path,
    saved_base: Callable[[str], Path],
) -> None:
    base = saved_base(name)
    out = run(
        pretrained_model_name_or_path=base,
        instance_data_dir=images,
        output_dir=tmp_path / "out",
        max_train_steps=1,
    )
    told = metadata(out)
    assert told["modelspec.architecture"] == architecture
    assert told["ss_base_model_version"] == version
    assert told["ss_weighting_scheme"] == get_family(name).training_defaults["weighting_scheme"]
    assert "modelspec.prediction_type" not in told
    assert "ss_min_snr_gamma" not in told


def test_tags_are_counted_as_sd_scripts_does() -> None:
    assert tag_frequency(["1girl, Smile", "smile,, SMILE ,", ""]) == {"1girl": 1, "smile": 3}
