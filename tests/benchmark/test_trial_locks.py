"""Claims between real processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from gralora_diffusion.benchmark import trial_locks
from gralora_diffusion.benchmark.trial_locks import LOCK_NAME, WORK_NAME, claim, holder

CONTEND = """
import importlib.util, sys, time
from pathlib import Path
# the file alone: the whole package takes many seconds to import
spec = importlib.util.spec_from_file_location("claims", sys.argv.pop(1))
claims = importlib.util.module_from_spec(spec)
spec.loader.exec_module(claims)
folder, start = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0, start - time.time()))
won = []
for number in range(40):
    held = claims.claim(folder / str(number))
    if held is not None:
        won.append(number)
print(won, flush=True)
time.sleep(600)
"""


def contend(folder, start):
    return subprocess.Popen(
        [sys.executable, "-c", CONTEND, trial_locks.__file__, str(folder), str(start)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_one_at_a_time(tmp_path):
    held = claim(tmp_path / "unit")
    with held:
        assert held.is_held()
        assert claim(tmp_path / "unit") is None
        assert holder(tmp_path / "unit") == f"process {os.getpid()} on {os.uname().nodename}"
    assert holder(tmp_path / "unit") is None
    assert list((tmp_path / "unit").iterdir()) == []
    with claim(tmp_path / "unit"):
        pass


def test_given_up_when_the_work_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path):
        1 / 0  # noqa: B018
    assert claim(tmp_path) is not None


def test_work_is_of_one_claim(tmp_path):
    """Gone with it, and what a process that was killed left goes with the next."""
    (tmp_path / f"{WORK_NAME}killed" / "pictures").mkdir(parents=True)
    (tmp_path / "adapter").mkdir()
    with claim(tmp_path) as held:
        assert [*tmp_path.glob(f"{WORK_NAME}*")] == [held.work]
        assert list(held.work.iterdir()) == []
        (held.work / "pictures").mkdir()
        (held.work / "pictures/0.png").write_text("new")
        (held.work / "notes").mkdir()
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures/1.png").write_text("old")
        held.hand_over("pictures", "adapter")
        assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["0.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_processes_at_once_share_all_and_double_none(tmp_path):
    """And what they leave when they are killed goes to those that come next, once too."""
    for _ in ("first come", "their heirs"):
        processes = [contend(tmp_path, time.time() + 2) for _ in range(3)]
        try:
            won = [json.loads(process.stdout.readline()) for process in processes]
        finally:
            for process in processes:
                process.send_signal(signal.SIGKILL)
                process.communicate()
        assert sorted(n for numbers in won for n in numbers) == list(range(40))


def test_a_claim_of_another_machine_is_kept_while_it_is_touched(tmp_path):
    path = tmp_path / LOCK_NAME
    path.write_text(json.dumps({"token": "theirs", "host": "elsewhere", "pid": 1}))
    assert claim(tmp_path, patience=60) is None
    old = time.time() - 61
    os.utime(path, (old, old))
    with claim(tmp_path, patience=60) as held:
        assert held.is_held()
    assert list(tmp_path.iterdir()) == []


def test_a_host_of_the_same_name_is_not_this_machine(tmp_path):
    """Another machine's processes: their ids say nothing about processes here."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    facts = {"token": "theirs", "host": os.uname().nodename, "pid": ended.pid}
    (tmp_path / LOCK_NAME).write_text(json.dumps({**facts, "machine": "another"}))
    assert claim(tmp_path, patience=60) is None


@pytest.mark.parametrize(
    "text",
    [
        '{"tok',
        *(json.dumps({"token": t}) for t in ("../x", "/../../x", "\0", "a" * 300, ["a"], None)),
    ],
)
def test_one_that_is_not_readable_waits_for_its_age(text, tmp_path):
    path = tmp_path / LOCK_NAME
    path.write_text(text)
    assert claim(tmp_path, patience=60) is None
    old = time.time() - 61
    os.utime(path, (old, old))
    assert claim(tmp_path, patience=60) is not None
    assert list(tmp_path.iterdir()) == [path]


def test_is_touched_while_the_work_goes_on(tmp_path):
    with claim(tmp_path, touch_seconds=0.05) as held:
        os.utime(held.path, (0, 0))
        deadline = time.time() + 10
        while held.path.stat().st_mtime < 1 and time.time() < deadline:
            time.sleep(0.02)
        assert held.path.stat().st_mtime > 1


def test_is_touched_also_after_it_could_not_be_read(tmp_path, monkeypatch):
    """As when a file system is away for a moment."""
    away = threading.Event()
    read = trial_locks._read
    monkeypatch.setattr(trial_locks, "_read", lambda path: away.set() or {})
    with claim(tmp_path, touch_seconds=0.05) as held:
        assert away.wait(10)
        monkeypatch.setattr(trial_locks, "_read", read)
        os.utime(held.path, (0, 0))
        deadline = time.time() + 10
        while held.path.stat().st_mtime < 1 and time.time() < deadline:
            time.sleep(0.02)
        assert held.path.stat().st_mtime > 1


def test_one_that_was_taken_over_is_not_given_up_for_the_other(tmp_path):
    with claim(tmp_path) as held:
        held.path.write_text(json.dumps({"token": "theirs", "host": "elsewhere", "pid": 1}))
        assert not held.is_held()
    assert json.loads((tmp_path / LOCK_NAME).read_text())["token"] == "theirs"
