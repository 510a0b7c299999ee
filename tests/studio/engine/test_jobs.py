"""Commands in processes of their own, found again by their files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gralora_diffusion.io.json_files import read_object
from gralora_diffusion.studio.engine import job_process
from gralora_diffusion.studio.engine import jobs as engine
from gralora_diffusion.studio.engine.job_process import CANCELLED, STARTED
from gralora_diffusion.studio.engine.jobs import Jobs, gralora
from gralora_diffusion.studio.engine.signatures import STATE, key_path
from tests import ROOT

#: What tests run besides what the studio may.
SCRIPTS = (("-c",), ("-m", "gralora_diffusion"))
#: Says that it runs, and ends when the file that it is given appears.
WAIT = (
    "import pathlib,sys,time\nprint('here', flush=True)\n"
    "while not pathlib.Path(sys.argv[1]).exists(): time.sleep(.02)"
)


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path / "jobs", programs=SCRIPTS)


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_command_its_output_and_its_files(jobs):
    job = jobs.add(
        "try", "a try", ["-c", "print(open('{folder}/a.txt').read())"], files={"a.txt": "é<b>"}
    )
    assert job.wait(20) == "done"
    assert (job.code, job.log()) == (0, "é<b>\n")
    assert jobs.find(job.name) == job


def test_a_command_that_fails(jobs):
    job = jobs.add("try", "a try", ["-c", "raise SystemExit(3)"])
    assert job.wait(20) == "failed"
    assert job.code == 3


def test_gralora_is_started(tmp_path):
    jobs = Jobs(tmp_path / "jobs")
    job = jobs.add("try", "version", gralora("--version"))
    assert job.wait(60) == "done"
    assert job.log().startswith("gralora ")


def test_other_programs_of_a_folder_from_somebody_else_are_not_run(jobs, tmp_path):
    made = tmp_path / "made"
    waiting = jobs.folder / "20260101-000000-000000000-train-0000"
    waiting.mkdir(parents=True)
    facts = {"kind": "train", "title": "a", "output": None, "queued": True}
    for command in (
        ["-c", f"open({str(made)!r}, 'w')"],
        ["-m", "timeit", f"open({str(made)!r}, 'w')"],
        ["-m", "gralora_diffusion.studio.engine.job_process", str(waiting)],
        [],
    ):
        (waiting / "job.json").write_text(json.dumps(facts | {"command": command}))
        theirs = Jobs(jobs.folder)
        theirs.start_waiting()
        assert theirs.list() == []
        assert sorted(path.name for path in waiting.iterdir()) == ["job.json"]
    assert not made.exists()


def test_of_a_bar_the_last_state_is_shown(jobs):
    job = jobs.add("try", "bar", ["-c", "print('1%\\r2%\\r3%\\nend')"])
    job.wait(20)
    assert job.log() == "3%\nend\n"


def test_stopped_in_the_middle(jobs, tmp_path):
    job = jobs.add("try", "long", ["-c", WAIT, str(tmp_path / "never")])
    until(lambda: "here" in job.log())
    job.stop()
    assert job.wait(20) == "stopped"


def test_one_runs_at_a_time_and_the_next_after_it(jobs, tmp_path):
    first, second, third = (
        jobs.add("try", name, ["-c", WAIT, str(tmp_path / name)], queued=True) for name in "abc"
    )
    assert [job.state for job in (first, second, third)] == ["running", "waiting", "waiting"]
    second.stop()
    (tmp_path / "a").touch()
    assert first.wait(20) == "done"
    jobs.start_waiting()
    assert [job.state for job in (first, second, third)] == ["done", "cancelled", "running"]
    (tmp_path / "c").touch()
    assert third.wait(20) == "done"


def test_what_another_studio_left_is_found_and_goes_on(jobs, tmp_path):
    running, waiting = (
        jobs.add("try", name, ["-c", WAIT, str(tmp_path / name)], queued=True) for name in "ab"
    )
    again = Jobs(jobs.folder, programs=SCRIPTS)
    assert [(j.title, j.state) for j in again.list()] == [("a", "running"), ("b", "waiting")]
    again.start_waiting()
    assert waiting.state == "waiting"
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    assert running.wait(20) == "done"
    again.start_waiting()
    assert waiting.wait(20) == "done"


def test_a_job_survives_the_process_that_started_it(tmp_path):
    line = ["-c", WAIT, str(tmp_path / "go")]
    program = (
        "import os; from pathlib import Path\n"
        "from gralora_diffusion.studio.engine.jobs import Jobs\n"
        f"Jobs(Path({str(tmp_path / 'jobs')!r}), programs={SCRIPTS!r}).add('try', 'a', {line!r})\n"
        "os.kill(0, 9)"
    )
    subprocess.run([sys.executable, "-c", program], start_new_session=True)
    (job,) = Jobs(tmp_path / "jobs", programs=SCRIPTS).list()
    assert job.state == "running"
    (tmp_path / "go").touch()
    assert job.wait(20) == "done"


def test_a_job_is_run_by_one_process_alone(jobs):
    job = jobs.add("try", "once", ["-c", "print('ran')"])
    job.wait(20)
    line = [sys.executable, "-m", "gralora_diffusion.studio.engine.job_process", str(job.folder)]
    subprocess.run(line, check=True)
    assert job.log() == "ran\n"


def test_a_job_whose_process_was_killed_has_failed(jobs, tmp_path):
    job = jobs.add("try", "long", ["-c", WAIT, str(tmp_path / "go")])
    os.kill(read_object(job.folder / STARTED)["pid"], signal.SIGKILL)
    assert job.wait(20) == "failed"
    assert job.code is None
    (tmp_path / "go").touch()  # what it ran ends, too


def put_in_the_queue(jobs, tmp_path):
    """A job that waits behind another one that is still running."""
    first = jobs.add("try", "first", ["-c", WAIT, str(tmp_path / "go")], queued=True)
    line = ["-c", "print(open('{folder}/a.txt').read())"]
    waiting = jobs.add("try", "second", line, queued=True, files={"a.txt": "mine"})
    (tmp_path / "go").touch()
    assert (first.wait(20), waiting.state) == ("done", "waiting")
    return waiting


def change(path, **facts):
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_only_jobs_that_this_user_has_put_there_are_started(jobs, tmp_path, monkeypatch):
    mine = put_in_the_queue(jobs, tmp_path)

    other = tmp_path / "another"
    shutil.copytree(jobs.folder, other)  # moved: it was not put there
    for spoil in (
        lambda: None,
        lambda: change(other / mine.name / "job.json", signature=None),
    ):
        spoil()
        theirs = Jobs(other, programs=SCRIPTS)
        theirs.start_waiting()
        assert [job.state for job in theirs.list()] == ["done", "cancelled"]
    line = [sys.executable, "-m", engine._PROCESS, str(other / mine.name)]
    refused = subprocess.run(line, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "not made by this user" in refused.stderr
    assert not (other / mine.name / STARTED).exists()

    def state():
        return Jobs(jobs.folder, programs=SCRIPTS).find(mine.name).state

    assert state() == "waiting"
    (mine.folder / "a.txt").write_text("changed")
    assert state() == "cancelled"
    (mine.folder / "a.txt").write_text("mine")
    change(mine.folder / "job.json", command=["-c", "print('changed')"])
    assert state() == "cancelled"
    change(mine.folder / "job.json", command=list(mine.command))
    assert state() == "waiting"
    with monkeypatch.context() as patch:
        patch.setenv(STATE, str(tmp_path / "another user"))
        assert state() == "cancelled"
        assert not key_path().exists()  # reading writes nothing
    again = Jobs(jobs.folder, programs=SCRIPTS)
    again.start_waiting()
    assert again.find(mine.name).wait(20) == "done"
    assert mine.log() == "mine\n"


def test_the_key_is_the_users_alone_and_stays(jobs, tmp_path, monkeypatch):
    monkeypatch.setenv(STATE, str(tmp_path / "state"))
    jobs.add("try", "a", ["-c", "pass"]).wait(20)
    key = key_path().read_bytes()
    assert os.name == "nt" or key_path().stat().st_mode & 0o777 == 0o600
    jobs.add("try", "b", ["-c", "pass"]).wait(20)
    assert key_path().read_bytes() == key
    assert os.listdir(tmp_path / "state") == ["studio.key"]
    key_path().write_bytes(b"")
    with pytest.raises(OSError, match="damaged"):
        jobs.add("try", "c", ["-c", "pass"])


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_log_is_a_file_of_its_own(jobs, tmp_path, kind):
    waiting = put_in_the_queue(jobs, tmp_path)
    theirs = tmp_path / "theirs.txt"
    theirs.write_text("kept")
    log = waiting.folder / "log.txt"
    log.symlink_to(theirs) if kind == "link" else os.mkfifo(log)
    assert waiting.log() == ""
    jobs.start_waiting()
    assert waiting.wait(20) == "done"
    assert (waiting.log(), theirs.read_text()) == ("mine\n", "kept")


def test_the_folder_of_a_job_is_not_a_link(jobs):
    job = jobs.add("try", "a try", ["-c", "pass"])
    (jobs.folder / "linked").symlink_to(job.folder)
    assert Jobs(jobs.folder, programs=SCRIPTS).list() == [job]


def test_modules_of_the_current_folder_are_not_run(jobs, tmp_path, monkeypatch):
    theirs = tmp_path / "theirs"
    (theirs / "gralora_diffusion").mkdir(parents=True)
    for name in ("gralora_diffusion/__init__.py", "psutil.py", "json.py"):
        (theirs / name).write_text("raise SystemExit('theirs')")
    monkeypatch.chdir(theirs)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # as in a clone that is not installed
    job = jobs.add("try", "version", gralora("--version"))
    assert job.wait(60) == "done", job.log()


def test_a_clock_that_was_set_does_not_end_a_job(jobs, tmp_path):
    job = jobs.add("try", "long", ["-c", WAIT, str(tmp_path / "go")])
    facts = read_object(job.folder / STARTED)
    assert job.state == "running"
    # a later process has the number
    (job.folder / STARTED).write_text(json.dumps({"pid": os.getpid()}))
    assert job.state == "failed"
    (job.folder / STARTED).write_text(json.dumps(facts | {"since": 0}))
    assert job.state == "running"
    (tmp_path / "go").touch()
    assert job.wait(20) == "done"


def test_stopped_while_it_starts(jobs, tmp_path, monkeypatch):
    # it is cancelled after the process was started, and before that claims it
    waiting = put_in_the_queue(jobs, tmp_path)
    (waiting.folder / CANCELLED).write_text("{}")
    monkeypatch.setattr(sys, "argv", ["job_process", str(waiting.folder)])
    job_process.main()
    assert (waiting.state, waiting.code) == ("cancelled", -signal.SIGTERM)
    assert waiting.log() == ""
    # it is cancelled after the process has looked for that
    running = jobs.add("try", "long", ["-c", WAIT, str(tmp_path / "never")])
    until(lambda: "here" in running.log())
    started = (running.folder / STARTED).read_text()
    (running.folder / STARTED).unlink()
    assert running.state == "waiting"
    original = engine.write

    def write(path, content):
        original(path, content)
        if path.name == CANCELLED:
            original(running.folder / STARTED, json.loads(started))

    monkeypatch.setattr(engine, "write", write)
    running.stop()
    assert running.wait(20) == "stopped"


def test_damaged_folders_are_left_out(jobs):
    job = jobs.add("try", "a try", ["-c", "pass"])
    for name, text in (("x", "{"), ("y", "[]"), ("z", '{"kind": 1}')):
        (jobs.folder / name).mkdir()
        (jobs.folder / name / "job.json").write_text(text)
    (jobs.folder / "w").mkdir()
    assert jobs.list() == [job]
