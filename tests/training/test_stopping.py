"""Runs that are asked to save, to sample or to stop: nothing is lost, and nothing changes."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gralora_diffusion.adapters.adapter_file import WEIGHTS_NAME
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.config.training_config import parse_config
from gralora_diffusion.training.outputs.metrics import MetricsFile
from gralora_diffusion.training.run import train
from gralora_diffusion.training.runtime import control
from gralora_diffusion.training.runtime.control import read_status, request
from tests.forked import Forked
from tests.training.runs import adapter, assert_same_run, learned, metrics, run, start

STATUS, LOCK, OWNER = ".gralora.status", ".gralora.lock", ".gralora.owner"


@pytest.fixture
def data(base: Path, images: Path) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": base, "instance_data_dir": images}


def wait_until(ready: Callable[[], bool], running: list[Forked]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert all(process.process.is_alive() for process in running), running[0].wait()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def ended(running: list[Forked]) -> str:
    """Return what the first process of a run says that ends well."""
    found = [process.wait() for process in running]
    assert [code for code, _ in found] == [0] * len(running), found
    return found[0][1]


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def requested(folder: Path, monkeypatch: pytest.MonkeyPatch, **at: int) -> None:
    """Have a run in this process find a request when it has written the metrics of a step."""
    plain = MetricsFile.add
    monkeypatch.setattr(control, "_LOOK_SECONDS", 0.0)

    def add(self: MetricsFile, row: Any) -> None:
        plain(self, row)
        for what, step in at.items():
            if row["step"] == step:
                request(folder, what)

    monkeypatch.setattr(MetricsFile, "add", add)


def test_saved_sampled_and_stopped_as_requested(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = {
        **data,
        "validation_prompt": "a dog",
        "num_validation_images": 1,
        "validation_steps": 1000,
        "validation_inference_steps": 2,
        "use_ema": True,
        "lora_dropout": 0.1,
    }
    whole, out = run(output_dir=tmp_path / "whole", **options), tmp_path / "out"
    assert "stopped at" not in capsys.readouterr().out
    with monkeypatch.context() as patch:
        # step 2 is told of the first, and finds the second, too
        requested(out, patch, save=1, sample=2, stop=3)
        run(output_dir=out, **options)
    shown = capsys.readouterr().out
    assert (
        f"stopped at step 4 of 6. To resume, run\n  gralora train --config {out}/training" in shown
    )
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert {path.name for path in (out / "validation").iterdir()} == {"step-000000", "step-000002"}
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4]
    saved = torch.load(out / "checkpoint-4" / "optimizer.bin", weights_only=True)
    assert saved["state"][0]["step"] == 4
    assert all(
        torch.equal(tensor, adapter(out / "checkpoint-4")[key])
        for key, tensor in adapter(out).items()
    )
    status = read_status(out)
    assert (status.state, status.alive, status.step, status.steps) == ("stopped", False, 4, 6)
    assert {what: (a["number"], a["step"], a["text"]) for what, a in status.answers.items()} == {
        "save": (1, 2, "wrote checkpoint-2"),
        "sample": (1, 2, "wrote validation/step-000002/grid.png"),
        "stop": (1, 4, "wrote checkpoint-4 and the adapter"),
    }
    line = ["--config", str(out / "training_config.yaml"), "--resume_from_checkpoint", "latest"]
    assert " ".join(line) in shown
    train(parse_config(line))
    assert_same_run(whole, out)
    assert read_status(out).state == "finished"
    with pytest.raises(ConfigError, match=r"no run is alive in .*: it finished at step 6 of 6"):
        request(out, "save")


def test_images_that_there_are_no_prompts_for(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested(tmp_path / "out", monkeypatch, sample=1)
    out = run(output_dir=tmp_path / "out", **data)
    assert read_status(out).answers["sample"]["text"] == "no images: no --validation_prompt"


def test_a_request_at_the_last_step_does_not_make_the_run_partial(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    requested(tmp_path / "out", monkeypatch, stop=5, save=6)
    out = run(output_dir=tmp_path / "out", **data)
    assert "stopped at" not in capsys.readouterr().out
    assert read_status(out).state == "finished"
    assert not list(out.glob(".gralora.request*"))


# -- from outside ----------------------------------------------------------------------------------


def stop(way: str, running: list[Forked], folder: Path) -> None:
    """Stop a run in one of the ways; a signal goes to one process of several, or to all."""
    if way == "control":
        request(folder, "stop")
        return
    name, _, to = way.partition(" to ")
    chosen = {"first": running[:1], "last": running[-1:]}.get(to, running)
    for process in chosen:
        assert process.process.pid is not None
        os.kill(process.process.pid, getattr(signal, name))


@pytest.mark.parametrize(
    ("processes", "ways"),
    [
        (1, ["SIGINT", "control", "SIGTERM"]),
        (2, ["SIGINT to all", "SIGTERM to last", "control"]),
    ],
)
def test_stopped_at_random_moments_and_resumed(
    data: dict[str, Any], tmp_path: Path, processes: int, ways: list[str]
) -> None:
    options = {**data, "train_batch_size": 1, "max_train_steps": 80, "lora_dropout": 0.1}
    ended(start(processes, output_dir=tmp_path / "whole", **options))
    out = tmp_path / "out"
    options |= {"output_dir": out, "resume_from_checkpoint": "latest"}
    moments = random.Random(processes)
    for way in ways:
        before = lines(out)
        running = start(processes, **options)
        goal = before + moments.randrange(1, 12)
        wait_until(lambda goal=goal: lines(out) >= goal, running)
        time.sleep(moments.random() * 0.02)
        stop(way, running, out)
        text = ended(running)
        step = lines(out)
        assert goal <= step < 80
        (shown,) = re.findall(r"stopped at step (\d+) of 80", text)
        assert int(shown) == step
        assert (out / f"checkpoint-{step}").is_dir()
        assert (out / WEIGHTS_NAME).is_file()
        assert not list(out.glob(".unfinished*"))
        assert not (out / LOCK).exists()
    ended(start(processes, **options))
    assert_same_run(tmp_path / "whole", out)


def test_signals_before_the_first_step_end_the_run(data: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is trained yet, and nothing is left behind."""
    out = tmp_path / "out"
    for number, code, said in (
        (signal.SIGTERM, -signal.SIGTERM, "ended by SIGTERM"),
        (signal.SIGINT, 130, "interrupted. No checkpoint was written yet"),
    ):
        running = start(output_dir=out, **data)
        wait_until((out / OWNER).exists, running)  # which is written once the folder is locked
        stop(signal.Signals(number).name, running, out)
        found, text = running[0].wait()
        assert found == code, text
        assert said in text
        assert not out.exists()


def test_a_second_signal_ends_the_run_at_once(data: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = start(output_dir=out, max_train_steps=10_000, checkpointing_steps=5, **data)
    wait_until(lambda: lines(out) > 6, running)
    stop("SIGINT", running, out)
    stop("SIGTERM", running, out)
    code, text = running[0].wait()
    assert code == -signal.SIGTERM
    assert "stopping after this step" in text
    assert "ended by SIGTERM" in text
    assert not (out / WEIGHTS_NAME).exists()
    assert not list(out.glob(".unfinished*"))
    assert (out / "checkpoint-5").is_dir()
    assert read_status(out).state == "ended"


def test_validation_images_do_not_hold_up_a_stop(data: dict[str, Any], tmp_path: Path) -> None:
    """Neither the first ones nor those at the end."""
    slow = {"validation_prompt": "a dog", "validation_inference_steps": 1000}
    slow |= {"num_validation_images": 100, "max_train_steps": 3}
    out = tmp_path / "first"
    running = start(output_dir=out, **data, **slow)
    wait_until((out / STATUS).exists, running)
    stop("SIGTERM", running, out)
    code, text = running[0].wait()
    assert code == 0, text
    assert "the validation images of step 0 are left out, because the run stops" in text
    assert len(metrics(out)) == 1
    assert (out / "checkpoint-1").is_dir()

    # resumed at a step that is not due
    running = start(output_dir=out, resume_from_checkpoint="latest", **data, **slow)
    wait_until((out / "pytorch_gralora_weights.safetensors").exists, running)
    wait_until(lambda: lines(out) == 3 and read_status(out).state == "saving", running)
    stop("SIGINT", running, out)
    code, text = running[0].wait()
    assert code == 0, text
    assert "the validation images of step 3 are left out" in text
    assert "stopped at" not in text
    assert read_status(out).state == "finished"
    assert (out / "README.md").is_file()
    assert len(learned(out)) == 3
    shutil.rmtree(out)
