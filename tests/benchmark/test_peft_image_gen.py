"""PEFT's comparison: its split, its drift, and the suite at tiny size through a dataset."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch

from gralora_diffusion.benchmark.evaluation.encoders import load_encoder
from gralora_diffusion.benchmark.evaluation.results import read_results
from gralora_diffusion.benchmark.main import benchmark
from gralora_diffusion.benchmark.run_config import parse_settings
from gralora_diffusion.benchmark.tasks import read_tasks
from gralora_diffusion.io.errors import ConfigError
from tests.benchmark import judges
from tests.tiny import flux2_klein

SUITE = ["--suite", "peft-image-gen"]


@pytest.fixture(scope="module")
def cats(tmp_path_factory):
    """Twenty images in a dataset with the columns of PEFT's, two of them equal."""
    folder = tmp_path_factory.mktemp("cats")
    drawn = judges.draw(folder / "drawn", 20)
    drawn[7].write_bytes(drawn[3].read_bytes())
    rows = datasets.Dataset.from_dict({"image": [str(path) for path in drawn]})
    rows.cast_column("image", datasets.Image()).save_to_disk(str(folder / "set"))
    return folder / "set", drawn


def rows_of_peft():
    """As ``get_train_valid_test_datasets`` in PEFT's data.py shuffles and splits the rows."""
    np.random.seed(0)
    indices = np.arange(20)
    np.random.shuffle(indices)
    return indices[:14], indices[14:16], indices[16:20]


def test_the_split_is_that_of_peft(cats, tmp_path):
    place, drawn = cats
    settings = parse_settings(
        [*SUITE, "--dataset_name", str(place), "--output_dir", str(tmp_path / "out")]
    )
    (task,) = read_tasks(settings)
    train, _, test = rows_of_peft()
    texts = settings.captions
    assert [(e.read_bytes(), e.caption) for e in task.examples] == [
        (drawn[i].read_bytes(), texts[i]) for i in train
    ]
    assert list(task.prompts) == [texts[i] for i in test]
    assert [path.read_bytes() for path in task.real] == [drawn[i].read_bytes() for i in test]


def test_the_settings_are_those_of_peft():
    settings = parse_settings(SUITE)
    training = settings.training
    assert len(settings.captions) == 20
    assert len(settings.drift_prompts) == 10
    assert (settings.validation, settings.held_out, settings.split) == (2, 4, "peft")
    assert (training.max_train_steps, training.train_batch_size) == (750, 2)
    assert (training.learning_rate, training.adam_weight_decay) == (1e-4, 1e-4)
    assert (settings.inference_steps, settings.drawing_guidance_scale) == (20, 3.5)
    assert (settings.images_per_prompt, settings.drift_images) == (3, 1)
    assert settings.encoder_sources == {"dinov2": "facebook/dinov2-base"}
    assert settings.comparisons == ["gralora-r32-k2:lora-r32"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--captions", "a", "b"], "--captions has 2 texts, but the dataset has 20 images"),
        (["--held_out", "18"], "--held_out is 18 and --validation 2, but there are 20 images"),
    ],
)
def test_what_does_not_fit_the_dataset(cats, tmp_path, options, problem):
    line = [*SUITE, "--dataset_name", str(cats[0]), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ConfigError) as caught:
        read_tasks(parse_settings([*line, *options]))
    assert problem in str(caught.value)


def test_the_suite_at_tiny_size(cats, tmp_path, dinov2):
    """A tiny FLUX.2 klein learns it; similarity and drift are computed again from the files."""
    flux2_klein.build().save_pretrained(tmp_path / "base")
    small = {
        "pretrained_model_name_or_path": tmp_path / "base",
        "dataset_name": cats[0],
        "encoders": f"dinov2={dinov2}",
        "output_dir": tmp_path / "out",
        "methods": "gralora-r4-k2",
        "seeds": 0,
        "resolution": 16,
        "max_train_steps": 2,
        "inference_steps": 1,
        "learning_rate": 1.0,
        "mixed_precision": "no",
        "max_sequence_length": 32,
    }
    line = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    assert benchmark(parse_settings([*SUITE, *line])) == 0
    (result,), unreadable = read_results(tmp_path / "out")
    assert unreadable == []
    embed = load_encoder(str(dinov2), device=torch.device("cpu")).embed_images
    _, _, test = rows_of_peft()
    pictures = result.folder / "pictures"
    cosines = []
    for prompt, row in enumerate(test):
        files = [pictures / f"{prompt:03d}_{number}.png" for number in range(3)]
        generated, (real,) = (normal(embed(f)) for f in (files, [cats[1][row]]))
        cosines.append((generated @ real).mean())
    assert result.scores["dinov2"] == pytest.approx(np.mean(cosines), abs=1e-8)
    names = [f"drift-{prompt:03d}_0.png" for prompt in range(10)]
    base = tmp_path / "out" / "base" / "seed0" / "set"
    after, before = (normal(embed([f / name for name in names])) for f in (pictures, base))
    drift = (1 - (after * before).sum(axis=1).mean()) / 2  # measure_drift in PEFT's run.py
    assert drift > 2e-5
    assert result.scores["peft_drift_dinov2"] == pytest.approx(drift, abs=1e-8)
    assert result.scores["drift_dinov2"] == pytest.approx(2 * drift, abs=1e-8)
    assert len(list(pictures.iterdir())) == 4 * 3 + 10


def normal(embeddings):
    values = embeddings.double().cpu().numpy()
    return values / np.linalg.norm(values, axis=1, keepdims=True)
