"""What a run is asked for, and what it says: through files that may hold anything."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.control_command import main
from gralora_diffusion.training.runtime.control import RunControl, read_status, request
from gralora_diffusion.training.runtime.folder_lock import CONFIG_NAME, LOCK_NAME, owned

STATUS = ".gralora.status"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / CONFIG_NAME).touch()
    return tmp_path


def test_a_request_is_taken_once_and_answered(folder: Path) -> None:
    with owned(folder, ""):
        assert read_status(folder).state == "preparing"
        control = RunControl(folder)
        control.begin(3, 10)
        assert not control.is_asked()
        request(folder, "save")
        request(folder, "save")
        request(folder, "stop")
        assert read_status(folder).pending == ("save", "stop")
        control._looked = 0.0
        assert control.is_asked()
        assert control.is_asked_to_stop()
        assert control.take() == {"save", "stop"}
        assert not control.is_asked()
        assert control.take() == frozenset()
        control.progress(4, 0.5)
        control.answer("save", "wrote it")
        status = read_status(folder)
        assert (status.state, status.alive, status.pending) == ("training", True, ())
        assert (status.step, status.steps, status.loss) == (4, 10, 0.5)
        assert status.owner is not None
        assert f"process {os.getpid()} on " in status.owner
        assert status.seconds_left is not None
        assert status.answers == {"save": {"number": 1, "step": 4, "text": "wrote it"}}
        control.say("stopped")
    status = read_status(folder)
    assert (status.state, status.alive, status.owner) == ("stopped", False, None)
    with pytest.raises(ConfigError, match=r"no run is alive in .*: it was stopped at step 4 of 10"):
        request(folder, "save")
    assert not list(folder.glob(".gralora.request*"))


def test_a_killed_run_has_ended_whatever_it_said_last(folder: Path) -> None:
    with owned(folder, ""):
        RunControl(folder).begin(0, 10)
    (folder / LOCK_NAME).touch()  # left behind; nothing holds it
    assert read_status(folder).state == "ended"
    assert (folder / LOCK_NAME).exists()
    with owned(folder, ""):  # the next run, before its first step
        said = json.loads((folder / STATUS).read_text())
        (folder / STATUS).write_text(json.dumps({**said, "pid": -1}))
        assert read_status(folder).state == "preparing"
        assert read_status(folder).step is None


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("status", "save"):
        with pytest.raises(SystemExit) as caught:
            main([str(tmp_path / "none"), what])
        assert caught.value.code == 2
        assert f"there is no run in {tmp_path / 'none'}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[1]", "cannot be read"),
        (" " * 20_000, "cannot be read"),
        (None, "it is a named pipe"),
        ('{"state": "\\u001b[2J", "step": "1", "steps": 1e999, "loss": [], "answers": [1]}', ""),
        (
            '{"state": "training", "step": -1, "loss": NaN, "answers": {"save": {"number": "x"}}}',
            "",
        ),
    ],
)
def test_a_status_may_hold_anything(folder: Path, text: str | None, said: str) -> None:
    if text is None:
        os.mkfifo(folder / STATUS)
    else:
        (folder / STATUS).write_text(text)
    if said:
        with pytest.raises(ConfigError, match=said):
            read_status(folder)
    else:
        status = read_status(folder)
        assert status.state == "ended"
        values: list[Any] = [status.step, status.steps, status.loss, dict(status.answers)]
        assert values == [None, None, None, {}]


def test_the_command_says_what_was_answered(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with owned(folder, ""):
        control = RunControl(folder)
        control.begin(5, 9)

        def answer(seconds: float) -> None:  # while the command waits
            for what in control.take():
                control.answer(what, "wrote \x1b[2J")

        monkeypatch.setattr("gralora_diffusion.training.control_command.time.sleep", answer)
        main([str(folder), "save"])
        assert capsys.readouterr().out == "step 5: wrote \\x1b[2J\n"
        main([str(folder), "status", "--json"])
        assert json.loads(capsys.readouterr().out)["answers"]["save"]["number"] == 1
        main([str(folder), "sample", "--wait", "0"])
        assert capsys.readouterr().out == "requested; the run answers after its step\n"
        main([str(folder), "status"])
        shown = capsys.readouterr().out
        for text in ("state    training, process", "step     5 of 9", "pending  sample"):
            assert text in shown
        control.say("finished")
        with pytest.raises(SystemExit) as caught:
            main([str(folder), "save"])
        assert caught.value.code == 1
        assert "the run finished before it saw the request" in capsys.readouterr().err


def test_requests_of_an_earlier_run_are_discarded(folder: Path) -> None:
    (folder / ".gralora.request-stop").touch()
    control = RunControl(folder)
    control.discard_requests()
    assert not control.is_asked()
    assert not RunControl(None).is_asked()


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_only_has_the_name_of_a_request_is_none(folder: Path, kind: str) -> None:
    """A run could not remove a folder, and a link would let the command write elsewhere."""
    path = folder / ".gralora.request-stop"
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(folder / "elsewhere")
    else:
        os.mkfifo(path)
    with owned(folder, ""):
        with pytest.raises(ConfigError, match=r"\.gralora\.request-stop is in the way\. Delete it"):
            request(folder, "stop")
        assert read_status(folder).pending == ()
        request(folder, "save")
        control = RunControl(folder)
        assert not control.is_asked_to_stop()
        assert control.is_asked()
        assert control.take() == {"save"}
        assert not RunControl(folder).is_asked()
    assert not (folder / "elsewhere").exists()
    assert os.path.lexists(path)
