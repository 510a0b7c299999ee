"""Runs as their own files describe them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.studio.engine.jobs import Jobs
from gralora_diffusion.studio.engine.runs import JOB_CONFIG, differing_options, find_runs
from gralora_diffusion.training.config.training_config import parse_config

ROWS = [{"step": i, "loss": 1 / i, "performance": {"samples_per_second": 2.0}} for i in (1, 2, 3)]
#: Owns the folder that it is given, until it is asked to end.
OWNER = (
    "import sys,time; from pathlib import Path;"
    "from gralora_diffusion.training.runtime.folder_lock import owned\n"
    "with owned(Path(sys.argv[1]), 'x'): print('owned', flush=True); time.sleep(60)"
)


def make_run(folder: Path, options="rank: 8\nmax_train_steps: 9\n", *, finished=False) -> Path:
    folder.mkdir(parents=True)
    (folder / "training_config.yaml").write_text(options)
    lines = [json.dumps(row) for row in ROWS]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "lo']))
    if finished:
        (folder / "pytorch_gralora_weights.safetensors").touch()
    return folder


def test_runs_of_a_terminal_are_found_without_a_job(tmp_path):
    first = make_run(tmp_path / "runs/first", finished=True)
    second = make_run(tmp_path / "second")
    for step in (3, 6):
        (second / f"checkpoint-{step}").mkdir()
    for step in (0, 3):
        folder = second / f"validation/step-{step:06d}"
        folder.mkdir(parents=True)
        for name in ("00-00.png", "00-01.png", "grid.png"):
            (folder / name).touch()
    make_run(tmp_path / "benchmark/trial")
    (tmp_path / "benchmark/benchmark.yaml").touch()
    make_run(tmp_path / ".hidden/run")
    os.utime(first / "training_config.yaml", (0, 0))
    runs = find_runs(tmp_path, [])
    assert [(run.name, run.state) for run in runs] == [
        ("second", "interrupted"),
        ("runs/first", "finished"),
    ]
    run = runs[0]
    assert list(run.rows) == ROWS
    assert (run.steps, run.options["rank"]) == (9, "8")
    assert run.checkpoints == [3, 6]
    assert [(s, [p.name for p in paths]) for s, paths in run.validations] == [
        (step, ["00-00.png", "00-01.png"]) for step in (0, 3)
    ]
    with (second / "metrics.jsonl").open("a") as file:
        file.write(f"\n{json.dumps({'step': 5, 'loss': 0.5})}\n")
    assert run.rows[-1] == {"step": 5, "loss": 0.5}


def test_a_run_of_a_terminal_is_asked_and_may_be_killed(tmp_path):
    folder = make_run(tmp_path / "run", finished=True)
    (run,) = find_runs(tmp_path, [])
    with pytest.raises(ConfigError, match="the run is finished, so it cannot save now"):
        run.ask("save")
    line = [sys.executable, "-c", OWNER, str(folder)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "owned\n"
        assert run.state == "running"
        with pytest.raises(ConfigError, match="no validation_prompt, so it cannot sample"):
            run.ask("sample")
        run.ask("save")
        assert run.status.pending == ("save",)
        (folder / "training_config.yaml").write_text("validation_prompt: [a dog]\n")
        run.ask("sample")
        assert run.status.pending == ("save", "sample")
        process.kill()
    assert run.state == "finished"
    (folder / ".gralora.status").write_text('{"state": "stopped", "step": 3, "steps": 12}')
    assert (run.state, run.steps) == ("stopped", 12)


def test_jobs_tell_of_runs_without_a_folder_and_of_failures(tmp_path):
    jobs = Jobs(tmp_path / ".studio/jobs", programs=[("-c",)])
    line = ["-c", "import time; time.sleep(60)"]
    failed = jobs.add("train", "a", ["-c", "raise SystemExit(2)"], make_run(tmp_path / "a"))
    failed.wait(20)
    running = jobs.add("train", "b", line, tmp_path / "b", queued=True)
    waiting = jobs.add("train", "c", line, tmp_path / "c", queued=True)
    jobs.add("export", "d", ["-c", "pass"], tmp_path / "d")
    runs = {run.name: run for run in find_runs(tmp_path, jobs.list())}
    assert {name: run.state for name, run in runs.items()} == {
        "a": "failed",
        "b": "running",
        "c": "waiting",
    }
    runs["c"].ask("stop")
    assert waiting.state == "cancelled"
    runs["b"].ask("stop")
    assert running.wait(20) == "stopped"
    states = {"a": "failed", "b": "stopped", "c": "stopped"}
    assert {run.name: run.state for run in find_runs(tmp_path, jobs.list())} == states
    make_run(tmp_path / "b")
    assert {run.name: run.state for run in find_runs(tmp_path, jobs.list())} == states


def test_a_run_that_was_stopped_before_it_had_a_folder_has_its_options(tmp_path):
    jobs = Jobs(tmp_path / ".studio/jobs", programs=[("-c",)])
    line = ["-c", "import time; time.sleep(60)"]
    first = jobs.add("train", "a", line, tmp_path / "a", queued=True)
    files = {JOB_CONFIG: "rank: 4\nmax_train_steps: 9\n"}
    second = jobs.add("train", "b", line, tmp_path / "b", queued=True, files=files)
    second.stop()
    first.stop()
    run = next(run for run in find_runs(tmp_path, jobs.list()) if run.name == "b")
    assert (run.state, run.steps, run.options["rank"]) == ("stopped", 9, "4")
    assert run.config == second.folder / JOB_CONFIG
    with pytest.raises(ConfigError, match="Duplicate it to start again"):
        run.resume_command()
    make_run(tmp_path / "b", "rank: 8\n")
    assert run.options == {"rank": "8"}


def test_a_run_outside_of_the_folder_is_found_until_it_is_deleted(tmp_path):
    jobs = Jobs(tmp_path / "studio/.studio/jobs", programs=[("-c",)])
    job = jobs.add("train", "a", ["-c", "pass"], make_run(tmp_path / "elsewhere"))
    assert job.wait(20) == "done"
    (run,) = find_runs(tmp_path / "studio", jobs.list())
    assert run.folder == tmp_path / "elsewhere"
    shutil.rmtree(run.folder)
    assert find_runs(tmp_path / "studio", jobs.list()) == []


def test_options_that_differ(tmp_path):
    make_run(tmp_path / "a", "rank: 8\nseed: 1\n")
    make_run(tmp_path / "b", "rank: 4\nseed: 1\noptimizer: prodigy\n")
    runs = sorted(find_runs(tmp_path, []), key=lambda run: run.name)
    assert differing_options(runs) == {"optimizer": [None, "prodigy"], "rank": ["8", "4"]}


def test_options_are_plain_texts_and_short_lists(tmp_path):
    lines = ["a: &a [x, {y: z}, 1e-4]", *(f"b{i}: *a" for i in range(9)), "max_train_steps: 0x10"]
    odd = ["c: !!timestamp never", "d: 2026-99-99", "e: {f: g}", "h: null", f"i: {[1] * 500}"]
    make_run(tmp_path / "a", "\n".join([*lines, *odd]))
    (run,) = find_runs(tmp_path, [])
    lists = {key: ["x", "1e-4"] for key in ["a", *(f"b{i}" for i in range(9))]}
    plain = {"max_train_steps": "0x10", "c": "never", "d": "2026-99-99", "i": ["1"] * 100}
    assert (run.options, run.steps) == (lists | plain, None)


def test_rows_with_impossible_steps_are_skipped(tmp_path):
    folder = make_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        for step in (-1, 2**53, 10**400):
            file.write(f'\n{{"step": {step}, "loss": 1}}\n')
    (run,) = find_runs(tmp_path, [])
    assert list(run.rows) == ROWS


@pytest.mark.parametrize("steps", ["", "9", "6", "0", "-1", "1e3", "x", "9" * 20])
def test_a_run_is_not_resumed_without_a_step_that_is_left(tmp_path, steps):
    folder = make_run(tmp_path / "a", finished=True)
    (folder / "checkpoint-6").mkdir()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 9, "loss": 1}\n')
    (run,) = find_runs(tmp_path, [])
    told = "has 9 steps already|the steps in all are .*; give a whole number"
    with pytest.raises(ConfigError, match=told):
        run.resume_command(steps)


def test_a_run_that_loads_says_so(tmp_path):
    line = ["-c", "import time; time.sleep(60)"]
    jobs = Jobs(tmp_path / "jobs", programs=[("-c",)])
    job = jobs.add("train", "a", line, tmp_path / "a", queued=True)
    (run,) = find_runs(tmp_path, [job])
    with pytest.raises(ConfigError, match="cannot save yet: it is loading"):
        run.ask("save")
    run.ask("stop")
    assert job.wait(20) == "stopped"


@pytest.mark.parametrize(
    "content", ["- a", "a: [", "\0", "x" * (2 << 20), r'a: "\UFFFFFFFF"', "[" * 5000]
)
def test_damaged_options(tmp_path, content):
    make_run(tmp_path / "a", content)
    (run,) = find_runs(tmp_path, [])
    assert (run.options, run.steps, run.state) == ({}, None, "interrupted")


def test_a_run_is_resumed_in_its_folder(tmp_path):
    folder = make_run(tmp_path / "a", "rank: 8\noutput_dir: elsewhere\n")
    (run,) = find_runs(tmp_path, [])
    with pytest.raises(ConfigError, match="no checkpoint to resume from"):
        run.resume_command()
    (folder / "checkpoint-6").mkdir()
    module, name, command, *options = run.resume_command()
    assert (module, name, command) == ("-m", "gralora_diffusion", "train")
    config = parse_config(options)
    assert (config.output_dir, config.rank) == (str(folder), 8)
    assert (config.resume_from_checkpoint, config.max_train_steps) == ("latest", None)
    *_, more, _ = run.resume_command(" 7 ")
    assert more == "--max_train_steps=7"
    shutil.rmtree(folder)
    assert run.rows == ()
