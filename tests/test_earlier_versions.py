"""What version 0.1 wrote is read today: ``data/version_0.1`` was made by it, and is never remade.

Both runs had ``samples/tiny-base`` as their base and two of its layers adapted.
"""

import csv
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gralora_diffusion.adapters.adapter_file import WEIGHTS_NAME, read_adapter
from gralora_diffusion.benchmark import command as benchmark
from gralora_diffusion.benchmark.evaluation.results import RESULT_NAME, read_results
from gralora_diffusion.training.checks.options import validate
from gralora_diffusion.training.config.training_config import parse_config
from gralora_diffusion.training.run import train
from tests import ROOT
from tests.training.runs import metrics

WRITTEN = ROOT / "tests" / "data" / "version_0.1"
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TO_V = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # their configs name the base from there


@pytest.mark.parametrize(
    ("name", "prefix", "weights"),
    [
        ("run", "unet.", WEIGHTS_NAME),
        ("run/checkpoint-2", "unet.", WEIGHTS_NAME),
        ("peft", "base_model.model.", "unet/adapter_model.safetensors"),
    ],
)
def test_adapter(name, prefix, weights):
    component = read_adapter(WRITTEN / name).components["unet"]
    stored = load_file(WRITTEN / name / weights)
    assert {prefix + key for key in component.tensors} == stored.keys()
    assert all(torch.equal(stored[prefix + k], v) for k, v in component.tensors.items())
    config: Any = component.config
    assert (config.r, config.gralora_k, config.hybrid_r, config.alpha) == (4, 2, 2, 6)
    assert config.alpha_pattern == {".*to_v": 3.0}


def test_options():
    line = ["--config", str(WRITTEN / "run" / "training_config.yaml")]
    config = parse_config([*line, "--resume_from_checkpoint", "latest"])
    assert config.alpha_pattern == [".*to_v=3"]
    assert config.lora_layers == f"{TO_Q},{TO_V}"
    assert (config.rank, config.hybrid_rank, config.max_train_steps) == (4, 2, 4)
    assert (config.use_ema, config.text_encoder_lr, config.mixed_precision) == (True, 5e-6, "no")
    validate(config)


def test_checkpoint(tmp_path):
    """Resumed, the run ends where it ended then, but for the rounding of another machine."""
    output = shutil.copytree(WRITTEN / "run", tmp_path / "run")
    (output / WEIGHTS_NAME).unlink()
    line = ["--config", str(output / "training_config.yaml"), "--output_dir", str(output)]
    train(parse_config([*line, "--resume_from_checkpoint", "latest"]))
    then, now = (load_file(folder / WEIGHTS_NAME) for folder in (WRITTEN / "run", output))
    assert then.keys() == now.keys()
    for key, tensor in then.items():
        torch.testing.assert_close(now[key], tensor, rtol=1e-3, atol=1e-5)
    start = load_file(output / "checkpoint-2" / WEIGHTS_NAME)
    assert any(not torch.equal(start[key], tensor) for key, tensor in now.items())
    rows_then, rows_now = metrics(WRITTEN / "run"), metrics(output)
    assert rows_now[:2] == rows_then[:2]  # kept as they are, without what is logged today
    assert [row["loss"] for row in rows_now] == pytest.approx([r["loss"] for r in rows_then], 1e-3)
    assert all(row["grad_norm"] > 0 for row in rows_now[2:])


def test_benchmark(tmp_path):
    """Its trials are done: none is repeated, and the report has the scores of then."""
    output = shutil.copytree(WRITTEN / "benchmark", tmp_path / "benchmark")
    written = {path: path.read_bytes() for path in output.rglob(RESULT_NAME)}
    assert len(written) == 2
    results, unreadable = read_results(output)
    assert sorted(result.key.method for result in results) == ["gralora-r4-k2", "lora-r4"]
    assert not unreadable
    config = output / "benchmark.yaml"
    places = {
        "pretrained_model_name_or_path": ["samples/tiny-base"],
        "dreambooth_dir": [str(WRITTEN / "dreambooth")],
        "encoders": ["dino=samples/tiny-encoders/dino", "clip=samples/tiny-encoders/clip"],
        "output_dir": [str(output)],
    }
    line = [word for name, values in places.items() for word in (f"--{name}", *values)]
    benchmark.main(["--config", str(config), *line])
    assert {path: path.read_bytes() for path in output.rglob(RESULT_NAME)} == written
    then = csv.DictReader((WRITTEN / "benchmark_scores.csv").open(encoding="utf-8"))
    now = csv.DictReader((output / "report" / "scores.csv").open(encoding="utf-8"))
    assert list(now) == list(then)
