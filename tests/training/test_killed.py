"""Runs on a data file that are killed at random moments: resumed, they end as if nothing was.

``KILLS=20 python -m pytest tests/training/test_killed.py`` kills each of them twenty times.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import (
    adapter,
    assert_close,
    assert_same_run,
    learned,
    make_images,
    make_shapes,
    metrics,
    run,
    run_two,
    start,
)
from tests.training.test_stopping import ended, lines

KILLS = int(os.environ.get("KILLS", "0"))
STEPS = 24
SETS = """\
- {folder: dogs, prompt: "sks, old, red dog", repeats: 2, shuffle_tags: true, tag_dropout: 0.2}
- folder: cats
  prompt: a cat
  share: 0.4
  loss_weight: 0.5
  resolutions: [16, 24]
  use_aspect_ratio_buckets: true
  caption_dropout: 0.3
- {folder: others, role: prior, prompt: a dog, loss_weight: 0.7}
- {folder: unseen, role: held_out, prompt: sks dog}
- {folder: unseen cats, role: held_out, prompt: a cat, resolution: 24}
"""


@pytest.fixture
def options(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("dogs", "others", "unseen", "unseen cats")):
        make_images(tmp_path / name, 2, seed=number)
    make_shapes(tmp_path / "cats", [(40, 20), (20, 40), (30, 30)], seed=9)
    (tmp_path / "data.yaml").write_text(SETS, encoding="utf-8")
    return {
        "pretrained_model_name_or_path": base,
        "data_config": "data.yaml",
        "instance_prompt": None,
        "train_batch_size": 1,
        "held_out_steps": 3,
        "random_flip": True,
        "lora_dropout": 0.1,
        "use_ema": True,
    }


@pytest.mark.parametrize(("processes", "kills"), [(1, KILLS or 3), (2, KILLS or 1)])
def test_killed_at_random_moments_and_resumed(
    options: dict[str, Any], tmp_path: Path, processes: int, kills: int
) -> None:
    """Also while images are encoded into a cache, and while checkpoints are written."""
    options |= {"max_train_steps": STEPS, "checkpointing_steps": 2}
    whole, out = tmp_path / "whole", tmp_path / "out"
    ended(start(processes, output_dir=whole, **options))
    options |= {"latent_cache_dir": tmp_path / "cache", "resume_from_checkpoint": "latest"}
    moments = random.Random(processes)
    killed = 0
    while killed < kills:
        running = start(processes, output_dir=out, **options)
        goal = lines(out) + moments.randrange(0, max(2, 2 * STEPS // kills))
        until = time.monotonic() + 60
        while lines(out) < goal and all(p.process.is_alive() for p in running):
            assert time.monotonic() < until
            time.sleep(0.002)
        time.sleep(moments.random() * (0.05 if goal else 2))
        killed += all(process.process.is_alive() for process in running)
        for process in running:
            process.process.kill()
        for process in running:
            process.process.join()
    ended(start(processes, output_dir=out, **options))
    assert_same_run(whole, out)
    assert len([row for row in learned(out) if "held_out" in row]) == STEPS // 3 + 1
    best, again = adapter(whole / "best"), adapter(out / "best")
    assert all(torch.equal(tensor, again[key]) for key, tensor in best.items())


def test_two_processes_train_on_what_one_does(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"max_train_steps": 3, "adam_epsilon": 1e-4, "lora_dropout": 0.0}
    one = run(output_dir=tmp_path / "one", gradient_accumulation_steps=2, **options)
    two = run_two(output_dir=tmp_path / "two", **options)
    assert_close(one, two, 1e-3)
    rows = list(zip(metrics(one), metrics(two), strict=True))
    losses = torch.tensor([[row["loss"] for row in pair] for pair in rows[1:]])
    torch.testing.assert_close(losses[:, 0], losses[:, 1])
    for ours, theirs in (rows[0], rows[-1]):
        for name, value in ours["held_out"].items():
            assert theirs["held_out"][name] == pytest.approx(value, rel=1e-3, abs=1e-5)
