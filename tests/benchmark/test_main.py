"""The command: every trial runs once, in spite of errors and interruptions."""

import json
import subprocess
import time

import pytest

from gralora_diffusion.benchmark import main as command
from gralora_diffusion.benchmark.command import main
from gralora_diffusion.benchmark.evaluation.results import RESULT_NAME, Failure, read_results
from gralora_diffusion.benchmark.ledger import FAILURE_NAME
from gralora_diffusion.benchmark.main import benchmark
from gralora_diffusion.benchmark.run_config import check_same_run, save_run_config
from gralora_diffusion.benchmark.tasks import read_tasks
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.runtime.folder_lock import owned
from tests.benchmark import judges, runs
from tests.forked import fork_ranks

TRIALS = [
    ("subject", subject, method, 0)
    for subject in ("cat2", "dog")
    for method in ("gralora-r4-k2", "lora-r4")
]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """An uninterrupted run in this process."""
    output = tmp_path_factory.mktemp("whole")
    assert benchmark(runs.settings(world, output)) == 0
    return output


def scores(output):
    """Unit -> its scores; every result file can be read."""
    results, unreadable = read_results(output)
    assert unreadable == []
    return {tuple(result.key): dict(result.scores) for result in results}


def result_files(output):
    return sorted(output.rglob(RESULT_NAME))


def test_every_trial_and_the_report(whole):
    assert sorted(scores(whole)) == TRIALS
    report = json.loads((whole / "report" / "report.json").read_text())
    assert set(report["protocols"]) == {"subject"}
    page = (whole / "report" / "index.html").read_text()
    assert "gralora-r4-k2" in page
    for file in (whole / "report").iterdir():  # which may be shared
        assert str(whole.parent) not in file.read_text(), file.name
    assert not list(whole.rglob(".work*"))


def test_finished_trials_are_not_repeated(whole, world):
    before = {path: path.stat().st_mtime_ns for path in result_files(whole)}
    (whole / "report" / "index.html").unlink()
    assert benchmark(runs.settings(world, whole)) == 0
    assert {path: path.stat().st_mtime_ns for path in result_files(whole)} == before
    assert (whole / "report" / "index.html").exists()


def test_the_report_alone(whole, tmp_path, capsys):
    """Also where the images and the base are not."""
    moved = tmp_path / "moved"
    subprocess.run(["cp", "-r", whole, moved], check=True)
    config = moved / "benchmark.yaml"
    config.write_text(config.read_text().replace("/dreambooth", "/nowhere"))
    (moved / "report" / "report.md").unlink()
    (lost := result_files(moved)[0]).unlink()
    main(["--report_only", "--output_dir", str(moved)])
    assert (moved / "report" / "report.md").is_file()
    key = lost.parent.relative_to(moved / "units").parts
    report = json.loads((moved / "report" / "report.json").read_text())
    assert [tuple(missing.values())[:3] for missing in report["missing"]] == [key[:3]]
    assert str(moved / "report" / "index.html") in capsys.readouterr().out


def test_an_unreadable_result_is_made_again(whole, world, tmp_path):
    output = tmp_path / "out"
    subprocess.run(["cp", "-r", whole, output], check=True)
    broken, *others = result_files(output)
    broken.write_text(broken.read_text()[:200])
    settings = runs.settings(world, output)
    before = {path: path.stat().st_mtime_ns for path in others}
    assert benchmark(settings) == 0
    assert scores(output) == scores(whole)
    assert {path: path.stat().st_mtime_ns for path in others} == before


def test_a_trial_that_fails_does_not_stop_the_others(world, tmp_path, capsys):
    options = {"methods": ["lora-r4-lr1e30", "lora-r4"], "subjects": ["dog"]}
    line = runs.arguments(world, tmp_path, **options)
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 1
    assert "failed trials: 1" in capsys.readouterr().err
    assert [key[2] for key in scores(tmp_path)] == ["lora-r4"]
    (failure,) = tmp_path.rglob(FAILURE_NAME)
    error = json.loads(failure.read_text())["error"]
    assert error.startswith("TrainingDiverged: step 2: the loss is ")
    assert error.endswith("Give --methods lora-r4-lr<rate> with a lower rate (it is 1e+30).")
    assert "TrainingDiverged" in (tmp_path / "report" / "report.md").read_text()
    when = failure.stat().st_mtime_ns
    assert benchmark(runs.settings(world, tmp_path, **options)) == 1
    assert failure.stat().st_mtime_ns == when
    assert benchmark(runs.settings(world, tmp_path, retry_failed=True, **options)) == 1
    assert failure.stat().st_mtime_ns > when


def test_the_report_has_the_trials_in_the_order_in_which_they_are_done(
    world, tmp_path, monkeypatch
):
    """Seed by seed, so that methods have as many as each other whenever it is stopped."""
    done = []

    def fail(runner, trial, ledger):
        done.append(tuple(trial.key))
        ledger.fail(trial, Failure("ValueError: no", ""))

    monkeypatch.setattr(command, "Runner", lambda *_: None)
    monkeypatch.setattr(command, "_do", fail)
    methods = ["lora-r8", "base", "lora-r4"]
    settings = runs.settings(world, tmp_path, methods=methods, seeds=[2, 0])
    assert benchmark(settings) == 12
    assert done == [
        ("subject", subject, method, seed)
        for seed in (2, 0)
        for subject in ("cat2", "dog")
        for method in methods
    ]
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [tuple(missing.values()) for missing in report["missing"]] == done


def test_a_device_that_breaks_ends_the_command(world, tmp_path, monkeypatch, capsys):
    class Broken:
        def __init__(self, *_):
            pass

        def run(self, *_):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(command, "Runner", Broken)
    with pytest.raises(SystemExit) as caught:
        main(runs.arguments(world, tmp_path))
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert "error: subject, cat2, lora-r4, seed 0: CUDA error: an illegal memory access" in said
    assert len(list(tmp_path.rglob(FAILURE_NAME))) == 1
    assert not list(tmp_path.rglob(".work*"))


def test_broken_images_are_found_before_anything_is_done(world, tmp_path, capsys):
    folder = runs.clone(tmp_path / "broken")
    (folder / "dataset" / "dog" / "2.png").write_bytes(b"half")
    with pytest.raises(SystemExit) as caught:
        main(runs.arguments(world, tmp_path / "out", dreambooth_dir=folder))
    assert caught.value.code == 2
    assert "2.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["pretrained_model_name_or_path", "encoders"])
def test_a_misspelt_base_or_encoder_does_not_bind_the_folder(world, tmp_path, option):
    wrong = {
        "pretrained_model_name_or_path": world / "bse",
        "encoders": f"dinov2={world / 'dinov'}",
    }
    with pytest.raises(SystemExit) as caught:
        main(runs.arguments(world, tmp_path, **{option: wrong[option]}))
    assert caught.value.code == 2
    check_same_run(runs.settings(world, tmp_path))
    assert not list(tmp_path.rglob(".work*"))


def test_other_options_in_the_same_folder_are_refused(whole, world, capsys):
    with pytest.raises(SystemExit) as caught:
        main(runs.arguments(world, whole, max_train_steps=4))
    assert caught.value.code == 2
    assert "--max_train_steps is 4, but 3 in" in capsys.readouterr().err


def test_an_encoder_that_is_not_there(world, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(runs.arguments(world, tmp_path, encoders=["dinov2=nobody/nothing"]))
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "--encoders: encoder 'nobody/nothing' cannot be loaded" in said
    assert "Give a Hub id, or a folder" in said
    assert not list(tmp_path.rglob(".work*"))


def test_a_run_that_is_refused_leaves_the_images_held_out(world, tmp_path, capsys):
    """Units that are there, or under way, are compared with them."""
    for number, path in enumerate(judges.draw(tmp_path / "set", 5)):
        path.with_suffix(".txt").write_text(f"picture {number}", encoding="utf-8")
    options = {"dreambooth_dir": None, "subjects": None, "captioned_dir": tmp_path / "set"}
    settings = runs.settings(world, tmp_path / "out", held_out=2, **options)
    (task,) = read_tasks(settings)
    save_run_config(settings)
    before = [path.read_bytes() for path in task.real]
    with pytest.raises(SystemExit):
        main(runs.arguments(world, tmp_path / "out", held_out=3, **options))
    assert "--held_out is 3, but 2 in" in capsys.readouterr().err
    assert [path.read_bytes() for path in task.real] == before
    assert len(list((tmp_path / "out" / "held_out").iterdir())) == 3


def test_killed_and_started_again(whole, world, tmp_path):
    killed = runs.start(world, tmp_path)
    until(lambda: result_files(tmp_path), killed)
    killed.process.kill()
    killed.wait()
    done = {path: path.stat().st_mtime_ns for path in result_files(tmp_path)}
    assert benchmark(runs.settings(world, tmp_path)) == 0
    assert scores(tmp_path) == scores(whole)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert not list(tmp_path.rglob(".work*"))


def test_a_launcher_of_several_processes_is_refused(world, tmp_path):
    """Each would run every trial."""
    said = fork_ranks(
        "from gralora_diffusion.benchmark.command import main; main()",
        *runs.arguments(world, tmp_path),
    )
    assert [code for code, _ in said] == [2, 2]
    assert [text.count("error: ") for _, text in said] == [1, 0]
    assert "a launcher has started 2 processes, but a benchmark is one process" in said[0][1]
    assert "start it without a launcher and with --ray auto" in said[0][1]
    assert not list(tmp_path.iterdir())


def test_one_owner(whole, world):
    """A second command would run the same trials; a report may be written meanwhile."""
    with owned(whole, "--output_dir"):
        with pytest.raises(ConfigError, match=r"is in use by process \d+ on "):
            benchmark(runs.settings(world, whole))
        assert benchmark(runs.settings(world, whole, report_only=True)) == 0
    assert benchmark(runs.settings(world, whole)) == 0


def test_captioned_from_the_command(world, tmp_path, caplog):
    for number, path in enumerate(judges.draw(tmp_path / "set", 5)):
        path.with_suffix(".txt").write_text(f"picture {number}", encoding="utf-8")
    options = {"captioned_dir": tmp_path / "set", "held_out": 2}
    output = tmp_path / "out"
    options |= {"methods": ["gralora-r4-k2", "base"]}
    assert benchmark(runs.settings(world, output, **options)) == 0
    assert "no effect with --captioned_dir: --dreambooth_dir and --subjects" in caplog.text
    assert {key[:3] for key in scores(output)} == {
        ("captioned", "set", "gralora-r4-k2"),
        ("captioned", "set", "base"),
    }


def until(happened, forked=None, seconds=400):
    deadline = time.monotonic() + seconds
    while not happened():
        assert forked is None or forked.process.is_alive(), forked.wait()[1]
        assert time.monotonic() < deadline, forked and forked.said
        time.sleep(0.05)
